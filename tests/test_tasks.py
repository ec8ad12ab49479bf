"""The scripts' `Environments` on every task of the suite and on all kinds of Gymnasium spaces.

The algorithms share the text of their section "environments" (test_siblings.py): one is tested.
"""

import gymnasium as gym
import numpy as np
import pytest
from conftest import small_args
from dm_control import suite
from gymnasium.spaces import Box, Dict, Discrete, Tuple

SUITE_TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
MUJOCO_IDS = [
    env_id
    for env_id, spec in gym.registry.items()
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco") and env_id.endswith("-v5")
]
UNIT = Box(-1, 1, (2,))


def environments(script, env_id: str, seeds=(7, 8)):
    return script.Environments(small_args(script, env_id=env_id), seeds)


def native_actions(envs, monkeypatch) -> list[np.ndarray]:
    """From now on, the actions that the first environment is sent."""
    sent, step = [], envs.envs[0].step

    def watched_step(action):
        sent.append(np.array(action))
        return step(action)

    monkeypatch.setattr(envs.envs[0], "step", watched_step)
    return sent


def play(envs, steps: int = 5) -> list[np.ndarray]:
    """The first observations, then all that `step` returns to the same random actions."""
    rng, seen = np.random.default_rng(0), [envs.reset_all()]
    for _ in range(steps):
        seen += envs.step(rng.uniform(-1, 1, (len(envs.envs), envs.action_dim)))
    return seen


def assert_same(a: list[np.ndarray], b: list[np.ndarray]):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def check_steps(envs):
    """Observations are finite float32 [N, O], the rest is [N]; the same seeds show the same."""
    seen, n = play(envs), len(envs.envs)
    for i, x in enumerate(seen):
        is_observation = i == 0 or i % 4 == 1
        assert x.shape == ((n, envs.obs_dim) if is_observation else (n,))
        assert np.isfinite(x).all()
        assert x.dtype == np.float32 or not is_observation
    assert_same(seen, play(envs))


def check_lockstep(script, env_id: str, steps: int = 20):
    """Each environment of a batch does what it does alone, whatever becomes of the others."""
    seeds, rng = (3, 4, 5), np.random.default_rng(0)
    batch = environments(script, env_id, seeds)
    alone = [environments(script, env_id, [seed]) for seed in seeds]
    np.testing.assert_array_equal(batch.reset_all(), [envs.reset_all()[0] for envs in alone])
    for step in range(steps):
        active = np.array([True, step % 2 == 0, step < steps // 2])
        action = rng.uniform(-1, 1, (3, batch.action_dim))
        outcome = batch.step(action, active)
        for i, envs in enumerate(alone):
            if active[i]:
                assert_same([x[i] for x in outcome], [x[0] for x in envs.step(action[i : i + 1])])
            else:
                assert not any(np.any(x[i]) for x in outcome)
        if step == steps // 2:
            np.testing.assert_array_equal(batch.reset(1), alone[1].reset(0))
    assert len(np.unique(batch.reset_all(), axis=0)) == 3


@pytest.mark.algorithms("sac")
@pytest.mark.backends("dmc")
class TestSuite:
    @pytest.mark.parametrize("task", SUITE_TASKS)
    def test_task(self, script, task, monkeypatch):
        """Actions of -1 and 1 are the bounds of each dimension, [-1, 1] where MuJoCo has none."""
        envs = environments(script, task)
        check_steps(envs)
        spec = envs.envs[0].action_spec()
        sent = native_actions(envs, monkeypatch)
        for sign, bound in ((-1, spec.minimum), (1, spec.maximum)):
            envs.step(np.full((2, envs.action_dim), sign))
            np.testing.assert_allclose(sent[-1], np.where(np.abs(bound) < 1e10, bound, sign))

    def test_tasks_are_special(self, script):
        """The suite still has the peculiarities for which these tests exist."""
        assert len(SUITE_TASKS) >= 50
        quadruped = environments(script, "quadruped-walk")
        assert len(set(zip(quadruped.low, quadruped.high))) > 1, "bounds differ per dimension"
        assert not np.allclose(quadruped.low, -quadruped.high), "bounds are asymmetric"
        entries = environments(script, "walker-walk").envs[0].observation_spec().values()
        assert any(entry.shape == () for entry in entries), "an observation is 0-d"

    @pytest.mark.parametrize("name", ["cartpole-swingup", "dm_control/cartpole-swingup-v0"])
    def test_ids(self, script, name):
        assert environments(script, name).obs_dim == 5

    def test_time_limit_truncates(self, script):
        seen = play(environments(script, "cartpole-swingup"), steps=1000)
        terminated, truncated = np.stack(seen[3::4]), np.stack(seen[4::4])
        assert not terminated.any() and not truncated[:-1].any() and truncated[-1].all()

    def test_lqr_terminates(self, script, monkeypatch):
        """The only task without a time limit, and the only one that terminates, when at rest."""
        envs = environments(script, "lqr-lqr_2_1")
        seen = play(envs, steps=1100)
        assert not np.any(seen[3::4]) and not np.any(seen[4::4])
        monkeypatch.setattr(envs.envs[1].task, "_TERMINAL_TOL", np.inf)
        _, _, terminated, truncated = envs.step(np.zeros((2, envs.action_dim)))
        assert terminated.tolist() == [False, True] and not truncated.any()

    def test_lockstep_is_independent(self, script):
        check_lockstep(script, "cheetah-run")


class Toy(gym.Env):
    """Random observations; the constructor knows no render mode."""

    def __init__(self, observations: gym.Space, actions: gym.Space):
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


@pytest.fixture
def toy(script, monkeypatch):
    """`toy(observations, actions)` is environments of these spaces."""

    def build(observations: gym.Space, actions: gym.Space):
        kwargs = dict(observations=observations, actions=actions)
        spec = gym.envs.registration.EnvSpec("Toy-v0", entry_point=Toy, kwargs=kwargs)
        monkeypatch.setitem(gym.registry, "Toy-v0", spec)
        return environments(script, "Toy-v0")

    return build


@pytest.mark.algorithms("sac")
@pytest.mark.backends("gym")
class TestGymnasium:
    @pytest.mark.parametrize("env_id", [*MUJOCO_IDS, "Pendulum-v1", "MountainCarContinuous-v0"])
    def test_id(self, script, env_id, monkeypatch):
        envs = environments(script, env_id)
        check_steps(envs)
        sent, space = native_actions(envs, monkeypatch), envs.envs[0].action_space
        for sign, bound in ((-1, space.low), (1, space.high)):
            envs.step(np.full((2, envs.action_dim), sign))
            np.testing.assert_array_equal(sent[-1], bound)
            assert sent[-1].dtype == space.dtype

    def test_all_mujoco_ids_are_known(self, script):
        assert {"HalfCheetah-v5", "Humanoid-v5", "Reacher-v5"} <= set(MUJOCO_IDS)
        assert len(MUJOCO_IDS) >= 11

    @pytest.mark.parametrize(
        "observations",
        [
            Dict(position=Box(-1, 1, (2, 3)), speed=Box(-1, 1, ())),
            Tuple([Box(-1, 1, (2, 3)), Box(-1, 1, (1,), np.float64)]),
            Box(-1, 1, (7,), np.float64),
            Box(0, 255, (7,), np.uint8),
        ],
        ids=["Dict", "Tuple", "float64", "uint8"],
    )
    def test_observations(self, toy, observations):
        envs = toy(observations, UNIT)
        assert envs.obs_dim == 7
        check_steps(envs)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_actions(self, toy, dtype, monkeypatch):
        """An action of two axes, with bounds of its own in each dimension."""
        low = np.array([[-1, -2, -3], [0, 1, -9]], dtype)
        high = np.array([[1, 2, 4], [5, 2, -8]], dtype)
        envs = toy(UNIT, Box(low, high, dtype=dtype))
        assert envs.action_dim == 6
        envs.reset_all()
        sent, action = native_actions(envs, monkeypatch), np.zeros((2, 6))
        action[0] = [-1, 1, 0, 1, 0, -1]
        envs.step(action)
        np.testing.assert_allclose(sent[-1], [[-1, 2, 0.5], [5, 1.5, -9]])
        assert sent[-1].dtype == dtype

    @pytest.mark.parametrize(
        "actions",
        [Discrete(3), Dict(a=UNIT), Box(-np.inf, np.inf, (2,)), Box(0, np.inf, (2,))],
        ids=["discrete", "dict", "unbounded", "half-bounded"],
    )
    def test_refuses_actions(self, toy, actions, capsys):
        with pytest.raises(SystemExit) as end:
            toy(UNIT, actions)
        message = capsys.readouterr().err
        assert end.value.code == 2 and "Toy-v0" in message and message.count("\n") == 1

    def test_lockstep_is_independent(self, script):
        check_lockstep(script, "Hopper-v5")
