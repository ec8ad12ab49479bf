"""Each script trains for a moment on a real task, and leaves behind all that it promises."""

import json
from pathlib import Path
from typing import Any, NamedTuple

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
# Odd, so that delayed updates do not happen in the very steps that are logged, and enough for MPO
# to copy its target networks.
UPDATES = 101


class Run(NamedTuple):
    """What one run of a script did."""

    args: Any
    directory: Path
    before: Any  # the state before the first update
    after: Any  # buffer, state and evaluations at the end
    metrics: list[dict]  # of each update


RUNS: dict[str, Run] = {}


def train(script, directory: Path) -> Run:
    args = small_args(
        script, **TASKS[script.backend], run_dir=str(directory), total_timesteps=300,
        learning_starts=300 - UPDATES, eval_frequency=250,
    )  # fmt: skip
    states, metrics, learn = [], [], script.learn

    def watched_learn(state, *rest):
        states.append(state)
        new_state, metric = learn(state, *rest)
        metrics.append(metric)
        return new_state, metric

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "learn", watched_learn)
        running.run(script, args)
    return Run(args, directory, states[0], saved(script, args, directory), metrics)


@pytest.fixture
def run(script, tmp_path_factory) -> Run:
    """The one run of this script that all tests here look at."""
    if script.__name__ not in RUNS:
        RUNS[script.__name__] = train(script, tmp_path_factory.mktemp("smoke") / "run")
    return RUNS[script.__name__]


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


def test_evaluates(run):
    """One row for each episode of the evaluation, whose mean is on the chart."""
    rows = evaluations(run.directory)
    keys = [(row["global_step"], row["seed"], row["episode"]) for row in rows]
    assert keys == [("250", "0", "0"), ("250", "0", "1")]
    assert all(0 < int(row["length"]) <= 1000 for row in rows)
    ((step, mean),) = scalars(run.directory)["eval/episodic_return"]
    assert step == 250 and mean == pytest.approx(np.mean([float(row["return"]) for row in rows]))


def test_files(run):
    """config.json holds what it takes to make the run again, and nothing else is left about."""
    config = json.loads((run.directory / "config.json").read_text())
    assert config["args"] == config["history"]["0"] == run.args.model_dump()
    names = {path.name for path in run.directory.iterdir() if ".tfevents." not in path.name}
    assert names == {"checkpoint", "config.json", "eval.csv", "policy.npz"}
    (checkpoint,) = (run.directory / "checkpoint").iterdir()
    assert int(checkpoint.stem) == 300


def greedy(script, run: Run, obs):
    """The action [B, A] in [-1, 1] that JAX's policy has without noise."""
    obs, actor = script.normalize(obs, run.after.buffer, run.args), run.after.state.actor.params
    action = jax.jit(jax.vmap(lambda x: script.policy(actor, x, run.args)))(obs)
    action = action if script.algorithm == "td3" else action[0]  # else with a deviation
    return jax.numpy.tanh(action) if script.algorithm == "sac" else jax.numpy.clip(action, -1, 1)


def readme_function():
    """`greedy_action(policy, obs)` of README.md, which needs NumPy and nothing else."""
    blocks = (REPOSITORY / "README.md").read_text().split("```")
    (block,) = [x for x in blocks if x.startswith("python\n") and "def greedy_action" in x]
    exec(block[block.index("def greedy_action") :], names := {"np": np})
    return names["greedy_action"]


def test_policy(script, run):
    """policy.npz acts as JAX does without noise, in the README also in the environment's units."""
    policy, env = arrays(run.directory / "policy.npz"), script.Interface(run.args)
    mean, var = np.asarray(run.after.buffer.mean), np.asarray(run.after.buffer.var)
    noise = np.random.default_rng(0).normal(0, 1, (50, env.obs_dim))
    obs = np.float32(mean + np.sqrt(var) * noise)
    wanted = np.asarray(greedy(script, run, obs))
    assert np.ptp(wanted, axis=0).min() > 1e-3
    ours = [script.greedy_action(policy, x) for x in obs]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    native = [readme_function()(policy, x) for x in obs]
    low, high = np.float64(env.low), np.float64(env.high)
    np.testing.assert_allclose(native, low + (wanted + 1) / 2 * (high - low), rtol=1e-5, atol=1e-5)
    assert all(env.action_space.contains(x) for x in native)
