"""Each script trains for a moment on a real task, and leaves behind all that it promises."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import running
from conftest import REPOSITORY, small_args
from running import arrays, evaluations, saved, scalars

# Observations and actions of these have the same sizes, so that compilations are shared.
TASKS = {
    "dmc": dict(env_id="cheetah-run", env_kwargs='{"task_kwargs": {"time_limit": 1.5}}'),
    "gym": dict(env_id="Walker2d-v5"),
}
UPDATES = 101  # odd, so that delayed updates are not in the steps logged; MPO copies its targets


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """Flags, directory, states before the first update and at the end, metrics of each update."""
    directory = tmp_path_factory.mktemp("smoke") / "run"
    args = small_args(
        script, **TASKS[script.backend], run_dir=str(directory), total_timesteps=300,
        learning_starts=300 - UPDATES, eval_frequency=250,
    )  # fmt: skip
    states, metrics, learn = [], [], script.learn

    def watched_learn(state, *rest):
        states.append(state)
        state, metric = learn(state, *rest)
        metrics.append(metric)
        return state, metric

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "learn", watched_learn)
        running.run(script, args)
    after = saved(script, args, directory)
    return SimpleNamespace(
        args=args, directory=directory, before=states[0], after=after, metrics=metrics
    )


def test_learns(run):
    """One update for every step after the warm-up; every parameter is another, and finite."""
    assert len(run.metrics) == UPDATES
    for before, after in zip(*map(jax.tree.leaves, (run.before, run.after.state)), strict=True):
        assert np.isfinite(after).all() and (np.asarray(before) != after).any()
    assert int(run.after.buffer.count) == 300 and int(run.after.buffer.episode) > 0
    for name in run.metrics[0]:  # delayed updates leave nan now and then
        assert any(np.isfinite(metric[name]) for metric in run.metrics), name


def test_logs(run):
    """Every metric of an update and every episode, against environment steps."""
    found = scalars(run.directory)
    losses = {f"losses/{name}" for name in run.metrics[0]}
    charts = {"charts/episodic_return", "charts/episodic_length", "eval/episodic_return"}
    assert set(found) == losses | charts
    for tag in losses:
        steps, values = zip(*found[tag])
        assert steps == tuple(range(200, 301, 10)) and np.isfinite(values[-1]), tag
    ends = [step for step, _ in found["charts/episodic_return"]]
    assert ends == list(np.cumsum([length for _, length in found["charts/episodic_length"]]))
    events = running.EventAccumulator(str(run.directory)).Reload()
    assert all(event.value > 0 for event in events.Scalars("charts/SPS"))


def test_files(run):
    """All it takes to make the run again; one row for each episode, whose mean is on the chart."""
    config = json.loads((run.directory / "config.json").read_text())
    assert config["args"] == config["history"]["0"] == run.args.model_dump()
    names = {path.name for path in run.directory.iterdir() if ".tfevents." not in path.name}
    assert names == {"checkpoint", "config.json", "eval.csv", "policy.npz"}
    assert [int(path.stem) for path in (run.directory / "checkpoint").iterdir()] == [300]
    rows = evaluations(run.directory)
    keys = [(row["global_step"], row["seed"], row["episode"]) for row in rows]
    assert keys == [("250", "0", "0"), ("250", "0", "1")]
    assert all(0 < int(row["length"]) <= 1000 for row in rows)
    ((step, mean),) = scalars(run.directory)["eval/episodic_return"]
    assert step == 250 and mean == pytest.approx(np.mean([float(row["return"]) for row in rows]))


def readme_function():
    """`greedy_action(policy, obs)` of README.md, which needs NumPy and nothing else."""
    blocks = (REPOSITORY / "README.md").read_text().split("```")
    (block,) = [x for x in blocks if x.startswith("python\n") and "def greedy_action" in x]
    exec(block[block.index("def greedy_action") :], names := {"np": np})
    return names["greedy_action"]


def test_policy(script, run):
    """policy.npz is that of the last state; in the README it acts in the environment's units."""
    policy, env = arrays(run.directory / "policy.npz"), script.Interface(run.args)
    buffer, state, _ = run.after
    np.testing.assert_equal(policy, script.export(state, buffer, env, run.args))
    noise = np.random.default_rng(0).normal(0, 1, (50, env.obs_dim))
    obs = np.float32(policy["obs_mean"] + policy["obs_std"] * noise)
    ours = np.array([script.greedy_action(policy, x) for x in obs])
    assert np.ptp(ours, axis=0).min() > 1e-3
    native = [readme_function()(policy, x) for x in obs]
    low, high = np.float64(env.low), np.float64(env.high)
    np.testing.assert_allclose(native, low + (ours + 1) / 2 * (high - low), rtol=1e-5, atol=1e-5)
    assert all(env.action_space.contains(x) for x in native)
