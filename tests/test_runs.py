"""What a run of `main` stores and is a function of; backends share `main`, one stands for both."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ENDINGS, HIGH, LOW, Probe, Toy, small_args, toys
from running import arrays, evaluations, exits, newest, run, saved, scalars

FLAGS = dict(
    env_id="Toy-v0", run_dir="run", seed=5, total_timesteps=120, learning_starts=30, n_step=2,
    eval_frequency=60, checkpoint_frequency=0, updates_per_step=2,
)  # fmt: skip
IDLE = FLAGS | dict(learning_starts=1000)  # without learning, which takes longest to compile

# Most of the text is shared by all.
pytestmark = [pytest.mark.algorithms("sac"), pytest.mark.backends("gym")]
every = pytest.mark.algorithms("sac", "td3", "mpo")


def run_in(script, folder: Path, **flags) -> Path:
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(script, small_args(script, **flags))
    return folder / "run"


@pytest.fixture
def toy() -> list[Toy]:
    return toys(length=8)


@pytest.fixture(scope="module")
def record(script, tmp_path_factory):
    """Transitions, policy and probes of a run in which updates change nothing."""
    probes = toys(Probe)
    flags = dict(total_timesteps=60, learning_starts=20, eval_frequency=40, normalize_obs=False)
    flags |= dict(env_id="Toy-v0", run_dir="run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "learn", lambda state, *_: (state, {"qf_loss": 0.0}))
        run_dir = run_in(script, tmp_path_factory.mktemp("recording"), **flags)
    rows = saved(script, small_args(script, **flags), run_dir).rows()
    return rows, arrays(run_dir / "policy.npz"), probes


def native(action):
    """The place of an action [..., A] between the bounds."""
    return LOW + (np.float64(action) + 1) / 2 * (HIGH - LOW)


@every
def test_stored_transitions_are_what_happened(record):
    """They lead to each other but not across episodes; only a termination has a discount of 0."""
    rows, _, (training, *_) = record
    np.testing.assert_allclose(native(rows.action), training.actions, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(rows.next_obs[:, 0], rows.obs[:, 0])  # the same episode
    np.testing.assert_array_equal(rows.next_obs[:, 1], rows.obs[:, 1] + 1)
    np.testing.assert_allclose(rows.reward, rows.next_obs[:, 2:].sum(axis=-1), atol=1e-5)
    lengths, kinds = zip(*[ENDINGS[int(episode) % 3] for episode in rows.obs[:, 0]])
    ended = rows.next_obs[:, 1] == lengths
    np.testing.assert_array_equal(rows.obs[1:][~ended[:-1]], rows.next_obs[:-1][~ended[:-1]])
    assert not rows.obs[1:][ended[:-1]][:, 1:].any()  # a new episode begins at time 0
    terminated = ended & np.array(["terminated" in kind for kind in kinds])
    np.testing.assert_array_equal(rows.discount, ~terminated)
    assert terminated.any() and (ended & ~terminated).any()


@every
def test_training_explores_and_evaluation_does_not(script, record):
    """Uniformly before learning starts, and about the policy afterwards."""
    rows, policy, (_, evaluated, *_) = record
    warm_up, action, obs = rows.action[:20], rows.action[20:], rows.obs[20:]
    np.testing.assert_allclose(warm_up.std(), 1 / np.sqrt(3), rtol=0.15)
    greedy = np.array([script.greedy_action(policy, x) for x in obs])
    free = np.abs(greedy) < 0.9  # elsewhere the squashing or the clipping hides the noise
    assert free.sum() > 30 and np.abs(action - greedy)[free].mean() > 0.05
    inside = rows.action[np.abs(rows.action) < 1]
    assert len(np.unique(inside)) > 0.99 * inside.size
    # Whole episodes, whose first observations differ in the number of the episode.
    assert len(evaluated.actions) == ENDINGS[0][0] + ENDINGS[1][0]
    for k, begin in enumerate((0, ENDINGS[0][0])):
        wanted = native(script.greedy_action(policy, np.float32([k, 0, 0, 0, 0])))
        np.testing.assert_allclose(evaluated.actions[begin], wanted, rtol=1e-5, atol=1e-6)


def counted(script, name: str, traced: list[str], **options):
    function = getattr(script, name).__wrapped__

    @functools.wraps(function)
    def counting(*args):
        traced.append(name)
        return function(*args)

    return jax.jit(counting, static_argnames="args", **options)


@pytest.fixture(scope="module")
def baseline(script, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run, and the names of jitted functions, each time that JAX runs their Python."""
    script.explore = counted(script, "explore", traced := [])
    script.learn = counted(script, "learn", traced)
    script.insert = counted(script, "insert", traced, donate_argnames="buffer")
    toys(length=8)
    return run_in(script, tmp_path_factory.mktemp("baseline"), **FLAGS), list(traced)


@every
def test_same_seed_same_run(script, toy, baseline, tmp_path):
    """And everything is compiled once."""
    run_dir, traced = baseline
    again = run_in(script, tmp_path, **FLAGS)
    np.testing.assert_equal(newest(run_dir), newest(again))
    assert (run_dir / "eval.csv").read_bytes() == (again / "eval.csv").read_bytes()
    assert sorted(traced) == ["explore", "insert", "learn"]


def test_another_seed_another_run(script, toy, tmp_path):
    """In networks, random actions, and episodes of training and evaluation."""
    runs = []
    for seed in (5, 6):
        run_dir = run_in(script, tmp_path / str(seed), **IDLE | dict(seed=seed))
        runs.append(saved(script, small_args(script, **IDLE), run_dir))
    a, b = (x.state.critic.params["params"]["Dense_0"]["kernel"] for x in runs)
    assert not np.isin(a, b).any() and not np.isin(a[0], a[1]).any(), "two critics of each"
    actions, obs = ([getattr(x.rows(), name) for x in runs] for name in ("action", "obs"))
    assert not np.isin(*actions).any() and not np.isin(*obs).any()
    assert not np.isin(*[x.results[:, 3] for x in runs]).any()


@pytest.mark.parametrize(
    "changes",
    [dict(eval_frequency=0), dict(eval_frequency=20, eval_episodes=1, checkpoint_frequency=9)],
    ids=["never", "often"],
)
def test_watching_changes_no_number_of_training(script, changes, toy, baseline, tmp_path):
    """Without evaluations the environment is made once: it may be a robot, or hold a port."""
    other, training, losses = run_in(script, tmp_path, **FLAGS | changes), [], []
    assert (len(toy) == 1) == (changes["eval_frequency"] == 0)
    for run_dir in (baseline[0], other):
        *rest, _ = newest(run_dir).values()  # the last array holds the rows of eval.csv
        training.append({str(i): x for i, x in enumerate(rest)})
        tags = scalars(run_dir)
        losses.append({tag: x for tag, x in tags.items() if not tag.startswith("eval")})
    np.testing.assert_equal(*training)
    assert losses[0] == losses[1] and any(tag.startswith("losses/") for tag in losses[0])


def test_episodes_begin_differently(script, toy, tmp_path):
    """Each one of training; those of an evaluation the same way each time, and in other ways."""
    flags = IDLE | dict(eval_episodes=3, normalize_obs=False)  # nothing changes the policy
    returns = [row["return"] for row in evaluations(run_in(script, tmp_path, **flags))]
    assert len(set(returns)) == 3 and returns[:3] == returns[3:]
    training, *evaluating = [made.seeds for made in toy]
    assert len(evaluating) == 2 and evaluating[0] == evaluating[1]
    assert len(training) == 120 // 8 + 1 and len(evaluating[0]) == 3
    assert len({*training, *evaluating[0]}) == len(training) + 3


def test_lengths_are_steps_of_the_environment(script, tmp_path):
    toys(length=10)
    flags = IDLE | dict(action_repeat=3, eval_frequency=30, total_timesteps=90)
    run_dir = run_in(script, tmp_path, **flags)
    assert {row["length"] for row in evaluations(run_dir)} == {"10"}
    assert {length for _, length in scalars(run_dir)["charts/episodic_length"]} == {10}
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]] == [30, 60, 90]
    assert int(saved(script, small_args(script, **flags), run_dir).buffer.count) == 30


def test_video_that_cannot_be_made_stops_no_training(script, toy, tmp_path, capsys):
    """Toy's constructor knows no render_mode."""
    run_dir = run_in(script, tmp_path, **IDLE | dict(capture_video=True))
    assert "--capture-video is off" in capsys.readouterr().err
    assert len(evaluations(run_dir)) == 4 and not list(run_dir.rglob("*.mp4"))


@every
def test_nan_in_the_networks_stops_the_run(script, toy, tmp_path, monkeypatch, capsys):
    """At the next logging, though the environment accepts any action."""
    losses = iter([0.0] * 15 + [np.nan] * 100)
    monkeypatch.setattr(script, "learn", lambda state, *_: (state, {"qf_loss": next(losses)}))
    code, message = exits(capsys, run_in, script, tmp_path, **FLAGS | dict(log_frequency=20))
    assert code == 1 and "NaN at step 60" in message and "--run-dir run" in message


def test_a_buffer_too_large_for_memory(script, toy, tmp_path, capsys):
    code, message = exits(capsys, run_in, script, tmp_path, **IDLE | dict(buffer_size=10**12))
    assert code == 2 and message.count("\n") == 1 and toy[0].seeds == []
    assert "--buffer-size 1000000000000" in message and "GiB" in message


def test_two_runs_of_the_same_name_in_the_same_second(script, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.time, "time", lambda: 1234567890.5)
    for _ in range(2):
        flags = IDLE | dict(run_dir=None, total_timesteps=10, exp_name="my name")
        run_in(script, tmp_path, **flags)
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda path: len(path.name))
    assert first.name == "Toy-v0__my name__5__1234567890" and second.name.startswith(first.name)
    assert all((path / "policy.npz").exists() for path in (first, second))
    assert first.name in capsys.readouterr().err, "where it is, is printed"
