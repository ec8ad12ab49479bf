"""What crosses the edge: actions, ends of episodes, what `main` stores, and what it evaluates."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import numpy as np
import pytest
from conftest import DmcProbe, GymProbe, Probe, small_args
from oracles import FROZEN, assert_equal, linear_args, step_sizes, without_key

LOW, HIGH = np.array([-1.0, 0.0, -0.3]), np.array([1.0, 4.0, 0.1])  # as different as bounds can be
ENDINGS = ((5, "truncated"), (3, "terminated"), (4, "terminated, truncated"))


def native(action, low, high):
    """The place of an action [..., A] between the bounds."""
    return low + (np.float64(action) + 1) / 2 * (high - low)


# --- one step -------------------------------------------------------------------------------------


def test_every_dimension_of_an_action_has_its_own_bounds(script, use_probes):
    probes = use_probes(LOW, HIGH)
    envs = script.Environments(small_args(script), [0, 1])
    envs.reset_all()
    action = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
    envs.step(action)
    envs.step(np.float32([[-1] * 3, [1] * 3]))
    for i, probe in enumerate(probes):
        np.testing.assert_allclose(probe.actions[0], native(action[i], LOW, HIGH), rtol=1e-6)
        np.testing.assert_allclose(probe.actions[1], (LOW, HIGH)[i], rtol=1e-6)


def test_a_termination_is_no_truncation_and_a_time_limit_no_termination(script, use_probes):
    use_probes(LOW, HIGH, ENDINGS)
    envs = script.Environments(small_args(script), [0])
    ends = {}
    for length, kind in ENDINGS:
        envs.reset(0)
        for _ in range(length):
            next_obs, _, terminated, truncated = envs.step(np.zeros((1, 3), np.float32))
        ends[kind] = terminated[0], truncated[0]
        assert next_obs[0, 1] == length, "the last observation, not the one after a reset"
    assert ends["truncated"] == (False, True)
    assert ends["terminated"] == ends["terminated, truncated"] == (True, False)


def test_environments_that_are_not_active_stay_where_they_are(script, use_probes):
    probes = use_probes(LOW, HIGH)
    envs = script.Environments(small_args(script), [0, 1, 2])
    envs.reset_all()
    action = np.zeros((3, 3), np.float32)
    obs, reward, terminated, truncated = envs.step(action, np.array([True, False, True]))
    assert [len(probe.actions) for probe in probes] == [1, 0, 1]
    assert not obs[1].any() and obs[0].any()
    assert reward[1] == 0 and not terminated.any() and not truncated.any()


def test_what_is_not_finite_stops_the_run(script, use_probes):
    probes = use_probes(LOW, HIGH)
    envs = script.Environments(small_args(script), [0])
    envs.reset_all()
    probes[0].position[0] = np.nan
    with pytest.raises(FloatingPointError):
        envs.step(np.zeros((1, 3), np.float32))


# --- the environments themselves ------------------------------------------------------------------


@pytest.mark.backends("dmc")
def test_a_task_of_the_suite_receives_actions_between_its_own_bounds(script):
    envs = script.Environments(small_args(script, env_id="quadruped-walk"), [0])
    spec = envs.envs[0].action_spec()
    assert len(np.unique(spec.maximum)) > 1 and (spec.minimum != -spec.maximum).any()
    received = []

    def step(action):
        received.append(action)
        return envs.envs[0].reset()._replace(reward=0.0, discount=1.0)

    envs.envs[0].step = step
    for end in (-1, 1):
        envs.step(np.full((1, envs.action_dim), end, np.float32))
    np.testing.assert_allclose(received, [spec.minimum, spec.maximum], atol=1e-12)


@pytest.mark.backends("dmc")
def test_the_time_limit_of_the_suite_truncates(script):
    envs = script.Environments(small_args(script, env_id="cartpole-swingup"), [0])
    envs.reset_all()
    ends = [envs.step(np.zeros((1, 1), np.float32))[2:] for _ in range(1000)]
    assert_equal(np.flatnonzero([terminated[0] for terminated, _ in ends]), np.array([], int))
    assert_equal(np.flatnonzero([truncated[0] for _, truncated in ends]), np.array([999]))


@pytest.mark.backends("dmc")
def test_the_discount_0_of_the_suite_terminates(script):
    envs = script.Environments(small_args(script, env_id="lqr-lqr_2_1"), [0])
    envs.reset_all()
    physics = envs.envs[0].physics
    with physics.reset_context():  # at rest, where lqr ends its episodes
        physics.data.qpos[:] = physics.data.qvel[:] = 0
    _, _, terminated, truncated = envs.step(np.zeros((1, envs.action_dim), np.float32))
    assert terminated[0] and not truncated[0]


@pytest.mark.backends("gym")
@pytest.mark.parametrize("length, terminates", [(3, True), (5, True), (9, False)])
def test_a_termination_in_the_last_allowed_step_terminates(script, monkeypatch, length, terminates):
    limited = gym.wrappers.TimeLimit(GymProbe(Probe(LOW, HIGH, ((length, "terminated"),))), 5)
    monkeypatch.setattr(script, "make_env", lambda args, seed, video_dir: limited)
    envs = script.Environments(small_args(script), [0])
    envs.reset_all()
    for _ in range(min(length, 5)):
        _, _, terminated, truncated = envs.step(np.zeros((1, 3), np.float32))
    assert (terminated[0], truncated[0]) == (terminates, not terminates)


@pytest.mark.backends("gym")
def test_gymnasium_receives_actions_between_its_own_bounds(script):
    envs = script.Environments(small_args(script, env_id="Humanoid-v5"), [0])
    received = []
    inner = envs.envs[0].unwrapped
    step, inner.step = inner.step, lambda action: received.append(action) or step(action)
    envs.reset_all()
    for end in (-1, 1):
        envs.step(np.full((1, envs.action_dim), end, np.float32))
    np.testing.assert_allclose(received, [[-0.4] * 17, [0.4] * 17], rtol=1e-6)


# --- what main stores -----------------------------------------------------------------------------


class Recording(NamedTuple):
    """A run of `main` on probes, two seeds, with networks that never change."""

    args: Any
    obs: np.ndarray  # [T, S, O]
    action: np.ndarray  # [T, S, A]
    reward: np.ndarray  # [T, S]
    discount: np.ndarray  # [T, S]
    ended: np.ndarray  # [T, S]
    next_obs: np.ndarray  # [T, S, O]
    executed: np.ndarray  # [T, S, A] native actions


@cache
def recording(script, scale: float = 1.0) -> Recording:
    """What a run stores and executes, with bounds `scale` times as wide."""
    flags = dict(num_seeds=2, total_timesteps=60, eval_episodes=1, normalize_obs=False)
    low, high = scale * LOW, scale * HIGH
    rows, probes, insert = [], [], script.insert

    def make_env(args, seed, video_dir):
        probes.append(Probe(low, high, ENDINGS))
        return {"dmc": DmcProbe, "gym": GymProbe}[script.backend](probes[-1])

    def spy(buffer, moments, row):
        rows.append(np.array(row))
        return insert(buffer, moments, row)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(script, "make_env", make_env)
        patch.setattr(script, "insert", spy)
        flags["run_dir"] = str(Path(folder) / "run")
        args = small_args(script, **flags, **step_sizes(script, **FROZEN))
        script.main(args)
    fields = np.split(np.array(rows), np.cumsum([5, 3, 1, 1, 1]), axis=2)
    fields = [x[..., 0] if x.shape[2] == 1 else x for x in fields]
    return Recording(args, *fields, np.stack([probe.actions for probe in probes[:2]], axis=1))


def ends(run: Recording, kind: str) -> np.ndarray:
    """Where [T, S] episodes ended with this kind, by the episode and time in the observation."""
    kinds = np.array([[number, length] for number, (length, k) in enumerate(ENDINGS) if kind in k])
    place = np.stack([run.next_obs[..., 0] % len(ENDINGS), run.next_obs[..., 1]], axis=-1)
    return (place[..., None, :] == kinds).all(axis=-1).any(axis=-1)


def test_the_stored_action_is_the_executed_one(script):
    run = recording(script)
    np.testing.assert_allclose(run.executed, native(run.action, LOW, HIGH), rtol=1e-6, atol=1e-7)


def test_the_stored_discount_is_0_at_terminations_only(script):
    run = recording(script)
    assert ends(run, "terminated").any() and ends(run, "truncated").any()
    assert_equal(run.discount == 0, ends(run, "terminated"))
    assert_equal(run.discount == 1, ~ends(run, "terminated"))


def test_the_end_of_an_episode_is_stored_however_it_ended(script):
    run = recording(script)
    assert_equal(run.ended == 1, ends(run, "terminated") | ends(run, "truncated"))


def test_stored_transitions_lead_to_each_other_but_not_across_episodes(script):
    run = recording(script)
    assert_equal(run.next_obs[..., 0], run.obs[..., 0])  # the same episode
    assert_equal(run.next_obs[..., 1], run.obs[..., 1] + 1)
    ended = (ends(run, "terminated") | ends(run, "truncated"))[:-1]
    assert_equal(run.obs[1:][~ended], run.next_obs[:-1][~ended])
    assert not run.obs[1:][ended][:, 1:].any()  # a new episode begins at time 0
    np.testing.assert_allclose(run.reward, run.next_obs[..., 2:].sum(axis=-1), atol=1e-5)


def test_actions_before_learning_are_uniform_and_differ_between_seeds(script):
    warm_up = recording(script).action[:20]
    np.testing.assert_allclose(warm_up.std(), 1 / np.sqrt(3), rtol=0.15)
    assert np.abs(warm_up).max() <= 1
    assert (warm_up[:, 0] != warm_up[:, 1]).all()


def test_training_explores(script):
    run = recording(script)
    state = script.init(np.arange(2), 5, 3, run.args)  # as at the end: Adam's steps were 1e-30
    obs, action = run.obs[20:].swapaxes(0, 1), run.action[20:].swapaxes(0, 1)
    greedy = np.asarray(script.act(state, obs, run.args))
    free = np.abs(greedy) < 0.9  # elsewhere the squashing or the clipping hides the noise
    assert free.sum() > 30
    assert np.abs(action - greedy)[free].mean() > 0.05


def test_wider_bounds_change_nothing_that_is_learned_from(script):
    narrow, wide = recording(script), recording(script, scale=2.0)
    np.testing.assert_allclose(wide.executed, 2 * narrow.executed, rtol=1e-6)
    for name in ("obs", "action", "reward", "discount", "ended", "next_obs"):
        np.testing.assert_allclose(getattr(wide, name), getattr(narrow, name), atol=1e-5)


# --- evaluation -----------------------------------------------------------------------------------


def test_an_evaluation_is_whole_greedy_episodes_and_changes_nothing(script, use_probes):
    probes = use_probes(LOW, HIGH, ENDINGS)
    args = linear_args(script, num_seeds=2, eval_episodes=2)
    state = script.init(np.arange(2), 5, 3, args)
    before = jax.tree.map(np.array, without_key(state))
    envs = script.Environments(args, range(4))
    for episode, (length, _) in enumerate(ENDINGS):
        returns, lengths = script.evaluate(state, envs, args)
        assert_equal(lengths, np.full((2, 2), length))
        for i, probe in enumerate(probes):
            actions = np.array(probe.actions[-length:])
            positions = np.cumsum((actions - LOW) / (HIGH - LOW) - 0.5, axis=0)
            np.testing.assert_allclose(returns.flat[i], positions.sum(), rtol=1e-4, atol=1e-4)
            start = np.zeros((2, 1, 5), np.float32)
            start[:, :, 0] = episode
            greedy = np.asarray(script.act(state, start, args))[i // 2, 0]
            np.testing.assert_allclose(actions[0], native(greedy, LOW, HIGH), atol=1e-6)
    assert_equal(without_key(state), before)


def test_an_evaluation_without_time_limit_ends_at_its_flag(script, use_probes):
    use_probes(LOW, HIGH, ((1000, "truncated"),))
    args = linear_args(script, num_seeds=1, eval_episodes=2, eval_max_steps=6)
    state = script.init(np.arange(1), 5, 3, args)
    _, lengths = script.evaluate(state, script.Environments(args, range(2)), args)
    assert_equal(lengths, np.full((1, 2), 6))


# --- flags ----------------------------------------------------------------------------------------


def test_every_number_given_as_a_flag_arrives_as_a_number(script):
    numbers = {k: v for k, v in vars(script.Args()).items() if type(v) in (int, float)}
    given = {name: "0.25" if isinstance(value, float) else "1e3" for name, value in numbers.items()}
    command = [x for name in given for x in (f"--{name.replace('_', '-')}", given[name])]
    parsed = script.tyro.cli(script.Args, args=command)
    assert {k: getattr(parsed, k) for k in given} == {k: float(v) for k, v in given.items()}
    assert {k: type(getattr(parsed, k)) for k in given} == {k: type(numbers[k]) for k in given}
