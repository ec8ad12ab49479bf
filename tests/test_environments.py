"""What crosses the edge to an environment: on toys, on the suite, and on Gymnasium's own."""

import json
import runpy
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ENDINGS, Probe, Toy, small_args, toys
from dm_control import suite
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from running import exits

IDLE = np.zeros(3, np.float32)
SUITE_TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
MUJOCO = [x for x, spec in gym.registry.items() if "gymnasium.envs.mujoco" in str(spec.entry_point)]
GYM_IDS = [x for x in MUJOCO if x.endswith("-v5")] + ["Pendulum-v1", "MountainCarContinuous-v0"]
QUICK = {"cartpole-swingup", "quadruped-walk", "humanoid-walk", "Hopper-v5", "Pendulum-v1"}

# All six scripts share the text; what is not said to be on another backend is on toys.
pytestmark = [pytest.mark.algorithms("sac"), pytest.mark.backends("gym")]
on_dmc, on_both = pytest.mark.backends("dmc"), pytest.mark.backends("dmc", "gym")


@pytest.fixture
def toy(script):
    """`toy(**kwargs)` is a Toy behind the script's interface, and the Toy itself."""

    def build(kind=Toy, action_repeat=1, **kwargs):
        made = toys(kind, **kwargs)
        return interface(script, "Toy-v0", action_repeat=action_repeat), made[-1]

    return build


def interface(script, env_id: str, **flags):
    return script.Interface(small_args(script, env_id=env_id, **flags))


def refusal(script, capsys, *words: str) -> str:
    """The one sentence with which `python SCRIPT WORDS` ends before anything is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *words])
        code, message = exits(capsys, runpy.run_path, script.__file__, run_name="__main__")
    assert code == 2 and message.count("\n") == 1
    return message


def received(toy, box: Box, actions) -> np.ndarray:
    """What an environment with this space is sent, all of it inside."""
    env, inner = toy(actions=box)
    env.reset(0)
    for action in actions:
        env.step(np.float32(action))
    assert all(box.contains(action) for action in inner.actions)
    return np.array(inner.actions)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_never_leave_the_box(toy, dtype):
    """Of two axes; rounding to float32 would leave random bounds in a quarter of all cases."""
    rng = np.random.default_rng(0)
    low = (rng.normal(0, 1, (50, 10)) * 10 ** rng.uniform(-3, 5, (50, 10))).astype(dtype)
    high = low + (10 ** rng.uniform(-3, 5, (50, 10))).astype(dtype)
    actions = [-np.ones(500), np.ones(500), *rng.uniform(-1, 1, (20, 500))]
    found = received(toy, Box(low, high, dtype=dtype), actions)
    np.testing.assert_array_equal(found[:2], [low, high])


@pytest.mark.parametrize(
    "low, high, dtype", [(0, 1, "int8"), (-100, 100, "int8"), (0, 255, "uint8")]
)
def test_integer_actions(toy, low, high, dtype):
    found = received(toy, Box(low, high, (1,), np.dtype(dtype)), np.linspace([-1], [1], 501))
    np.testing.assert_allclose(found.ravel(), np.linspace(low, high, 501), atol=0.501)
    assert len(np.unique(found)) == high - low + 1


def test_actuators_without_limits_are_driven_in_the_unit_box(toy):
    bounds = np.array([[-1e10, 1e10], [-np.inf, np.inf], [-np.inf, 0.5], [0, np.inf], [-3, 7]])
    found = received(toy, Box(*np.float32(bounds.T)), [-np.ones(5), np.ones(5)])
    np.testing.assert_allclose(found, [[-1, -1, -1, 0, -3], [1, 1, 0.5, 1, 7]])


@pytest.mark.parametrize("actions", [Discrete(3), Dict(a=Box(-1, 1))], ids=["Discrete", "Dict"])
def test_other_actions_are_refused(script, actions, capsys):
    toys(actions=actions)
    message = refusal(script, capsys, "--env-id", "Toy-v0")
    assert "Toy-v0" in message and str(actions) in message


@pytest.mark.parametrize(
    "space",
    [
        Dict(position=Box(-1, 1, (2, 3)), speed=Box(-1, 1, ())),
        Tuple([Box(-1, 1, (2, 3)), Box(-1, 1, (1,), np.float64)]),
        Box(-1, 1, (7,), np.float64),
        Box(0, 255, (7,), np.uint8),
    ],
    ids=["Dict", "Tuple", "float64", "uint8"],
)
def test_observations(toy, space):
    seen = []
    env, _ = toy(observations=space, answer=lambda toy, x: seen.append(x[0]) or x)
    assert env.obs_dim == 7
    for obs, native in zip([env.reset(0), env.step(IDLE)[0]], seen, strict=True):
        assert obs.shape == (7,) and obs.dtype == np.float32
        np.testing.assert_array_equal(obs, np.float32(gym.spaces.flatten(space, native)))


def in_step(place: int, value):
    """An answer with this value, or error, where `step` returns this, in an episode's second."""

    def answer(toy, outcome):
        if toy.time == 2 and isinstance(value, Exception):
            raise value
        return (*outcome[:place], value, *outcome[place + 1 :]) if toy.time == 2 else outcome

    return answer


@pytest.mark.parametrize(
    "reward", [2, np.array([2.0]), [2.0], np.array(2.0), np.float32(2), np.array([[2]])], ids=str
)
def test_rewards_of_one_entry_are_numbers(toy, reward):
    env, _ = toy(answer=in_step(1, reward))
    env.reset(0)
    rewards = [env.step(np.ones(3, np.float32))[1] for _ in range(3)]
    assert rewards == [3.0, 2.0, 3.0] and {type(x) for x in rewards} == {float}


def in_reset(change):
    """An answer with a changed observation at the beginning of an episode."""
    return lambda toy, outcome: change(outcome[0]) if toy.time == 0 else outcome


WRONG = {
    "obs of one": in_step(0, np.zeros(1, np.float32)),
    "obs of more": in_step(0, np.zeros(6, np.float32)),
    "no obs": in_step(0, None),
    "nan obs": in_step(0, np.float32([0, np.nan])),
    "infinite obs": in_step(0, np.float64([0, np.inf])),
    "nan reward": in_step(1, np.nan),
    "infinite reward": in_step(1, -np.inf),
    "reward of two": in_step(1, np.ones(2)),
    "no reward": in_step(1, None),
    "four values": lambda toy, x: x[:3] + x[4:] if toy.time == 2 else x,
    "obs of another size": in_reset(lambda obs: (obs[1:], {})),
    "nan obs at reset": in_reset(lambda obs: (obs * np.nan, {})),
    "old API": in_reset(lambda obs: obs),  # of two entries, which look like an observation and info
    "raises": in_step(0, RuntimeError("The robot fell off the table.")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_used_is_an_error(toy, wrong):
    env, inner = toy(observations=Box(-1, 1, (2,)), answer=WRONG[wrong])
    with pytest.raises(gym.error.Error, match="environment broke down") as error:
        env.reset(0)
        env.step(IDLE)
        env.step(IDLE)
    assert inner.time == 2 or wrong in ("obs of another size", "nan obs at reset", "old API")
    assert "\n" not in str(error.value) and ("robot" in str(error.value) or wrong != "raises")


def test_a_termination_is_no_truncation_and_a_time_limit_no_termination(toy):
    """Statistics come with the last step alone, though Probe's info is always the same object."""
    env, _ = toy(Probe)
    for length, kind in ENDINGS:
        env.reset(0)
        steps = [env.step(IDLE) for _ in range(length)]
        next_obs, _, terminated, truncated, info = steps[-1]
        assert (terminated, truncated) == ("terminated" in kind, kind == "truncated")
        assert next_obs[1] == length, "the last observation, not the one after a reset"
        assert info["episode"]["l"] == length
        assert not any(step[2] or step[3] or "episode" in step[4] for step in steps[:-1])


def test_repeated_actions_count_the_steps_of_the_environment(toy):
    """Ten steps, three at a time: four actions, the last of which is held for one step."""
    env, probe = toy(Probe, action_repeat=3, endings=((10, "truncated"),))
    rewards, info = [], {}
    env.reset(0)
    while "episode" not in info:
        _, reward, _, _, info = env.step(np.ones(3, np.float32))
        rewards.append(reward)
    # A step adds 1/2 to the three positions, whose sum is the reward.
    np.testing.assert_allclose(rewards, 1.5 * np.array([1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9, 10]))
    assert (info["episode"]["l"], info["episode"]["r"]) == (10, pytest.approx(1.5 * 55))
    assert len(probe.actions) == 10


def test_an_environment_without_a_time_limit_has_one(toy):
    env, _ = toy()
    env.reset(0)
    ends = [env.step(IDLE)[2:4] for _ in range(10_000)]
    assert ends == [(False, False)] * 9_999 + [(False, True)]


def test_seeds_of_episodes(toy):
    """A function of all the numbers, and below 2^31."""
    env, inner = toy()
    numbers = [(seed, kind, k) for seed in (0, 2**31 - 1) for kind in (0, 1) for k in range(50)]
    starts = [env.reset(*x) for x in (*numbers, *numbers)]
    np.testing.assert_array_equal(starts[:200], starts[200:])
    assert len(set(inner.seeds)) == 200 and 0 <= min(inner.seeds) and max(inner.seeds) < 2**31


# The nearest name of this backend, or where the other backend's are used.
WRONG_IDS = {
    "dmc": {"cartpole-swingu": "cartpole-swingup", "HalfCheetah-v5": "*_gym.py"},
    "gym": {
        "HalfCheeta-v5": "HalfCheetah", "HalfCheetah-v55": "v5", "cartpole-swingup": "*_dmc.py",
        "no_package:Hopper-v5": "no_package",
    },
}  # fmt: skip


@on_both
def test_ids_that_do_not_exist(script, capsys):
    for env_id, word in WRONG_IDS[script.backend].items():
        message = refusal(script, capsys, "--env-id", env_id)
        assert env_id in message and word in message


@on_both
def test_arguments_of_the_environment(script, capsys):
    """Of which a time limit truncates."""
    env_id, kwargs, steps = {
        "dmc": ("dm_control/cartpole-swingup-v0", {"task_kwargs": {"time_limit": 0.05}}, 5),
        "gym": ("Pendulum-v1", {"max_episode_steps": 7, "g": 0.0}, 7),
    }[script.backend]
    env = interface(script, env_id, env_kwargs=json.dumps(kwargs))
    env.reset(0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    assert getattr(env.unwrapped, "g", 0) == 0
    for text in ("{", "3", '{"no_such_argument": 1}'):
        assert f"--env-kwargs {text}" in refusal(script, capsys, "--env-kwargs", text)


def test_old_gym(script):
    """Plays as Gymnasium does; steps of four values need a word in --env-kwargs."""
    old = pytest.importorskip("gym", reason="needs gym==0.26.2")
    envs = [interface(script, env_id) for env_id in ("old_gym/Pendulum-v1", "Pendulum-v1")]
    np.testing.assert_allclose(*[env.reset(1, 2) for env in envs], rtol=1e-5)
    for t in range(200):
        a, b = (env.step(np.float32([0.3])) for env in envs)
        np.testing.assert_allclose([*a[0], a[1]], [*b[0], b[1]], rtol=1e-4, atol=1e-5)
        assert a[2:4] == b[2:4] == (False, t == 199)
    space = old.spaces.Box(-1, 1, (3,))
    methods = dict(
        observation_space=space, action_space=space, seed=lambda self, seed: space.seed(seed),
        reset=lambda self: space.sample(), step=lambda self, _: (space.sample(), 1.0, False, {}),
    )  # fmt: skip
    old.envs.registry.pop("Old-v0", None)
    old.register("Old-v0", type("Old", (old.Env,), methods), max_episode_steps=2)
    env = interface(script, "old_gym/Old-v0", env_kwargs='{"apply_api_compatibility": true}')
    start = env.reset(1)
    assert [env.step(IDLE)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    np.testing.assert_array_equal(env.reset(1), start)


@on_dmc
@pytest.mark.parametrize("task", SUITE_TASKS)
def test_every_task_of_the_suite(script, task):
    """Finite observations; actions of -1 and 1 are each dimension's bounds, or -1 and 1."""
    env = interface(script, task)
    native, sent = env.unwrapped._env, []
    spec, step = native.action_spec(), native.step
    native.step = lambda action: sent.append(np.array(action)) or step(action)
    assert env.reset(0, 0).shape == (env.obs_dim,)
    for sign in (-1, 1, 0.3):
        assert env.step(np.full(spec.shape, sign, np.float32))[2:4] == (False, False)
    for x, sign, bound in zip(sent, (-1, 1), (spec.minimum, spec.maximum)):
        np.testing.assert_allclose(x, np.where(np.abs(bound) < 1e10, bound, sign))


def check_repeats(script, env_id: str):
    """To the last bit, in another environment, after another episode and in the midst of one."""
    env, again, rng = interface(script, env_id), interface(script, env_id), np.random
    actions = rng.default_rng(0).uniform(-1, 1, (2, 20, env.low.size)).astype(np.float32)
    env.reset(0, 0)
    for action in actions[0]:
        env.step(action)
    np.testing.assert_array_equal(env.reset(0, 1), again.reset(0, 1))
    for action in actions[1]:
        for x, y in zip(env.step(action)[:4], again.step(action)[:4], strict=True):
            np.testing.assert_array_equal(x, y)


def mark_slow(env_ids: list[str]) -> list:
    return [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in env_ids]


@on_dmc
@pytest.mark.parametrize("task", mark_slow(SUITE_TASKS))
def test_the_suite_repeats_its_episodes(script, task):
    check_repeats(script, task)


@pytest.mark.parametrize("env_id", mark_slow(GYM_IDS))
def test_gymnasium_repeats_its_episodes(script, env_id):
    check_repeats(script, env_id)


@on_dmc
def test_lqr_is_the_plant_of_the_run(script):
    """Drawn from the run's seed alone, however often it is made; it terminates at rest."""
    envs = [interface(script, "lqr-lqr_2_1", seed=seed) for seed in (3, 3, 4)]
    for k, env in enumerate(envs):
        env.reset(k)
    physics = [env.unwrapped._env.physics for env in envs]
    a, b, c = (x.model.jnt_stiffness.tolist() for x in physics)
    assert a == b != c
    with physics[0].reset_context():
        physics[0].data.qpos[:] = physics[0].data.qvel[:] = 0
    assert envs[0].step(np.zeros(1, np.float32))[2:4] == (True, False)


class Filmed(Toy):
    """A Toy that draws how long its episode has lasted."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, **kwargs):
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 20 * self.time, np.uint8)


def test_the_first_episode_is_filmed(script, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    toys(Filmed, length=6)
    env = script.Interface(small_args(script, env_id="Toy-v0"), tmp_path / "videos/1000")
    for k in range(2):
        env.reset(k)
        while not env.step(IDLE)[3]:
            pass
    env.close()
    (film,) = tmp_path.rglob("videos/1000/*")
    meta, *frames = imageio_ffmpeg.read_frames(film)
    brightness = [np.frombuffer(frame, np.uint8).mean() for frame in frames]
    np.testing.assert_allclose(brightness, 20 * np.arange(7), atol=4)
    assert meta["fps"] == 10
