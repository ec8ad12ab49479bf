"""What a run of `main` does: what it stores, what it is made of, and what changes no number of it.

The backends share all of `main`, and so one stands for both.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import Probe, ProbeEnv, Toy, small_args
from running import arrays, assert_same_arrays, evaluations, newest, run, saved, scalars

LOW, HIGH = np.array([-1.0, 0.0, -0.3]), np.array([1.0, 4.0, 0.1])
ENDINGS = ((5, "truncated"), (3, "terminated"), (4, "terminated, truncated"))
FLAGS = dict(
    env_id="Toy-v0", run_dir="run", seed=5, total_timesteps=120, learning_starts=30, n_step=2,
    eval_frequency=60, checkpoint_frequency=0, updates_per_step=2,
)  # fmt: skip
IDLE = FLAGS | dict(learning_starts=1000)  # without learning, which takes longest to compile

pytestmark = pytest.mark.backends("gym")
one = pytest.mark.algorithms("sac")  # where all share the text


def run_in(script, folder: Path, **flags) -> Path:
    """The directory of a run in this folder."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(script, small_args(script, **flags))
    return folder / "run"


@pytest.fixture
def toy(toys) -> list[Toy]:
    """The environments that a run of FLAGS makes."""
    return toys(length=8)


# --- what main stores -----------------------------------------------------------------------------


class Recording(NamedTuple):
    """A run of `main` on probes, in which updates change nothing."""

    rows: Any  # transitions, [T, ...] each
    policy: dict[str, np.ndarray]
    probes: list[Probe]


RECORDINGS: dict[tuple, Recording] = {}


@pytest.fixture
def record(script, tmp_path_factory):
    """`record(scale)` is a run with bounds `scale` times as wide."""

    def recording(scale: float = 1.0) -> Recording:
        if (key := (script.__name__, scale)) in RECORDINGS:
            return RECORDINGS[key]
        probes = []

        def make_env(args, **options):
            probes.append(Probe(scale * LOW, scale * HIGH, ENDINGS))
            return ProbeEnv(probes[-1])

        flags = dict(total_timesteps=60, eval_frequency=40, run_dir="run", normalize_obs=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "make_env", make_env)
            patch.setattr(script, "learn", lambda state, *_: (state, {"qf_loss": 0.0}))
            run_dir = run_in(script, tmp_path_factory.mktemp("recording"), **flags)
            rows = saved(script, small_args(script, **flags), run_dir).rows()
        RECORDINGS[key] = Recording(rows, arrays(run_dir / "policy.npz"), probes)
        return RECORDINGS[key]

    return recording


def native(action):
    """The place of an action [..., A] between the bounds."""
    return LOW + (np.float64(action) + 1) / 2 * (HIGH - LOW)


def ends(rows, kind: str) -> np.ndarray:
    """Where [T] episodes ended with this kind, by the episode and time in the observation."""
    place = [(int(k) % len(ENDINGS), t) for k, t in rows.next_obs[:, :2]]
    return np.array([kind in ENDINGS[k][1] and t == ENDINGS[k][0] for k, t in place])


def test_the_stored_action_is_the_executed_one(record):
    executed = record().probes[0].actions
    np.testing.assert_allclose(native(record().rows.action), executed, rtol=1e-6, atol=1e-7)


def test_the_stored_discount_is_0_at_terminations_only(record):
    rows = record().rows
    assert ends(rows, "terminated").any() and ends(rows, "truncated").any()
    np.testing.assert_array_equal(rows.discount, 1 - ends(rows, "terminated"))


def test_stored_transitions_lead_to_each_other_but_not_across_episodes(record):
    rows = record().rows
    np.testing.assert_array_equal(rows.next_obs[:, 0], rows.obs[:, 0])  # the same episode
    np.testing.assert_array_equal(rows.next_obs[:, 1], rows.obs[:, 1] + 1)
    ended = (ends(rows, "terminated") | ends(rows, "truncated"))[:-1]
    np.testing.assert_array_equal(rows.obs[1:][~ended], rows.next_obs[:-1][~ended])
    assert not rows.obs[1:][ended][:, 1:].any()  # a new episode begins at time 0
    np.testing.assert_allclose(rows.reward, rows.next_obs[:, 2:].sum(axis=-1), atol=1e-5)


def test_actions_before_learning_are_uniform(record):
    warm_up = record().rows.action[:20]
    np.testing.assert_allclose(warm_up.std(), 1 / np.sqrt(3), rtol=0.15)
    assert np.abs(warm_up).max() <= 1 and len(np.unique(warm_up)) == warm_up.size


def test_training_explores_and_evaluation_does_not(script, record):
    rows, policy, (_, evaluated, *_) = record()
    action, obs = rows.action[20:], rows.obs[20:]
    greedy = np.array([script.greedy_action(policy, x) for x in obs])
    free = np.abs(greedy) < 0.9  # elsewhere the squashing or the clipping hides the noise
    assert free.sum() > 30 and np.abs(action - greedy)[free].mean() > 0.05
    inside = action[np.abs(action) < 1]
    assert len(np.unique(inside)) > 0.99 * inside.size
    # Whole episodes, whose first observations differ in the number of the episode.
    assert len(evaluated.actions) == ENDINGS[0][0] + ENDINGS[1][0]
    for k, begin in enumerate((0, ENDINGS[0][0])):
        wanted = native(script.greedy_action(policy, np.float32([k, 0, 0, 0, 0])))
        np.testing.assert_allclose(evaluated.actions[begin], wanted, rtol=1e-5, atol=1e-6)


def test_wider_bounds_change_nothing_that_is_learned_from(record):
    narrow, wide = record(), record(scale=2.0)
    np.testing.assert_allclose(wide.probes[0].actions, 2 * np.array(narrow.probes[0].actions))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), wide.rows, narrow.rows)


def test_exploration_without_noise_is_the_policy_of_normalised_observations(script):
    noiseless = {
        "sac": dict(log_std_min=-20.0, log_std_max=-20.0),
        "td3": dict(exploration_noise=0.0),
        "mpo": dict(initial_stddev=1e-30),
    }[script.algorithm]
    args, rng = small_args(script, **noiseless, env_id="Pendulum-v1"), np.random.default_rng(0)
    actor = script.init(jax.random.key(0), 3, 1, args).actor
    last = actor.params["params"]["Dense_2"]
    last["kernel"] = rng.normal(0, 0.3, last["kernel"].shape).astype(np.float32)  # away from 0
    mean, var = np.float32([5, -3, 100]), np.float32([4, 0.01, 900])
    buffer, actions = script.make_buffer(3, 1, args)._replace(mean=mean, var=var), []
    state = script.init(jax.random.key(0), 3, 1, args)._replace(actor=actor)
    policy = script.export(state, buffer, script.Interface(args), args)
    for step in range(args.learning_starts + 1, args.learning_starts + 21):
        obs = np.float32(rng.normal(mean, np.sqrt(var)))
        inputs = actor.params, buffer, obs, jax.random.key(1), np.int32(step), args
        actions.append(script.explore(*inputs))
        np.testing.assert_allclose(script.greedy_action(policy, obs), actions[-1], atol=1e-5)
    assert np.std(actions) > 0.05


# --- what a run is a function of ------------------------------------------------------------------


class Baseline(NamedTuple):
    """The one run of a script that others are compared with."""

    run_dir: Path
    traced: list[str]  # of jitted functions, each time that JAX runs their Python


BASELINES: dict[str, Baseline] = {}


def counted(script, name: str, traced: list[str], **options):
    """The jitted function, which notes when it is compiled."""
    function = getattr(script, name).__wrapped__

    @functools.wraps(function)
    def counting(*args):
        traced.append(name)
        return function(*args)

    return jax.jit(counting, static_argnames="args", **options)


@pytest.fixture
def baseline(script, toy, tmp_path_factory) -> Baseline:
    if script.__name__ not in BASELINES:
        script.explore = counted(script, "explore", traced := [])
        script.learn = counted(script, "learn", traced)
        script.insert = counted(script, "insert", traced, donate_argnames="buffer")
        run_dir = run_in(script, tmp_path_factory.mktemp("baseline"), **FLAGS)
        BASELINES[script.__name__] = Baseline(run_dir, list(traced))
    return BASELINES[script.__name__]


def test_everything_is_compiled_once(baseline):
    assert sorted(baseline.traced) == ["explore", "insert", "learn"]


def test_same_seed_same_run(script, baseline, tmp_path):
    again = run_in(script, tmp_path, **FLAGS)
    assert_same_arrays(newest(baseline.run_dir), newest(again))
    assert (baseline.run_dir / "eval.csv").read_bytes() == (again / "eval.csv").read_bytes()


@one
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


@one
@pytest.mark.parametrize(
    "changes",
    [dict(eval_frequency=0), dict(eval_frequency=20, eval_episodes=1, checkpoint_frequency=9)],
    ids=["never", "often"],
)
def test_watching_changes_no_number_of_training(script, changes, baseline, tmp_path):
    """The last array of a checkpoint holds the rows of eval.csv."""
    other, training, losses = run_in(script, tmp_path, **FLAGS | changes), [], []
    for run_dir in (baseline.run_dir, other):
        *rest, _ = newest(run_dir).values()
        training.append({str(i): x for i, x in enumerate(rest)})
        tags = scalars(run_dir)
        losses.append({tag: x for tag, x in tags.items() if not tag.startswith("eval")})
    assert_same_arrays(*training)
    assert losses[0] == losses[1] and any(tag.startswith("losses/") for tag in losses[0])


@one
def test_episodes_begin_differently(script, toy, tmp_path):
    """Each one of training; those of an evaluation the same way each time, and in other ways."""
    flags = IDLE | dict(eval_episodes=3, normalize_obs=False)  # nothing changes the policy
    returns = [row["return"] for row in evaluations(run_in(script, tmp_path, **flags))]
    assert len(set(returns)) == 3 and returns[:3] == returns[3:]
    training, *evaluating = [made.seeds for made in toy]
    assert len(evaluating) == 2 and evaluating[0] == evaluating[1]
    assert len(training) == 120 // 8 + 1 and len(evaluating[0]) == 3
    assert len({*training, *evaluating[0]}) == len(training) + 3


# --- what is special ------------------------------------------------------------------------------


@one
def test_an_environment_that_can_exist_only_once(script, toy, tmp_path):
    """As a robot or a port; without evaluations it can be trained."""
    run_in(script, tmp_path, **IDLE | dict(eval_frequency=0))
    assert len(toy) == 1


@one
def test_lengths_are_steps_of_the_environment(script, toys, tmp_path):
    toys(length=10)
    flags = IDLE | dict(action_repeat=3, eval_frequency=30, total_timesteps=90)
    run_dir = run_in(script, tmp_path, **flags)
    assert {row["length"] for row in evaluations(run_dir)} == {"10"}
    assert {length for _, length in scalars(run_dir)["charts/episodic_length"]} == {10}
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]] == [30, 60, 90]
    assert int(saved(script, small_args(script, **flags), run_dir).buffer.count) == 30


@one
def test_video_that_cannot_be_made_stops_no_training(script, toy, tmp_path, capsys):
    """Toy's constructor knows no render_mode."""
    run_dir = run_in(script, tmp_path, **IDLE | dict(capture_video=True))
    assert "--capture-video is off" in capsys.readouterr().err
    assert len(evaluations(run_dir)) == 4 and not list(run_dir.rglob("*.mp4"))


def test_nan_in_the_networks_stops_the_run(script, toy, tmp_path, monkeypatch, capsys):
    """At the next logging, though the environment accepts any action."""
    losses = iter([0.0] * 15 + [np.nan] * 100)
    monkeypatch.setattr(script, "learn", lambda state, *_: (state, {"qf_loss": next(losses)}))
    with pytest.raises(SystemExit) as end:
        run_in(script, tmp_path, **FLAGS | dict(log_frequency=20))
    message = capsys.readouterr().err
    assert end.value.code == 1 and "NaN at step 60" in message and "--run-dir run" in message


@one
def test_a_buffer_too_large_for_memory(script, toy, tmp_path, capsys):
    """A sentence with both sizes, before anything is trained."""
    with pytest.raises(SystemExit) as end:
        run_in(script, tmp_path, **IDLE | dict(buffer_size=10**12))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and toy[0].seeds == []
    assert "--buffer-size 1000000000000" in message and "GiB" in message


@one
def test_two_runs_of_the_same_name_in_the_same_second(script, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.time, "time", lambda: 1234567890.5)
    for _ in range(2):
        flags = IDLE | dict(run_dir=None, total_timesteps=10, exp_name="my name")
        run_in(script, tmp_path, **flags)
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda path: len(path.name))
    assert first.name == "Toy-v0__my name__5__1234567890" and second.name.startswith(first.name)
    assert all((path / "policy.npz").exists() for path in (first, second))
    assert first.name in capsys.readouterr().err, "where it is, is printed"
