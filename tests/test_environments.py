"""What crosses the edge to an environment: on toys, on the suite, and on Gymnasium's own."""

import json
import runpy
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import Toy, small_args
from dm_control import suite
from gymnasium.spaces import Box, Dict, Discrete, Tuple

LOW, HIGH = np.array([-1.0, 0.0, -0.3]), np.array([1.0, 4.0, 0.1])  # as different as bounds can be
IDLE = np.zeros(3, np.float32)
SUITE_TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
GYM_IDS = [
    env_id
    for env_id, spec in gym.registry.items()
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco") and env_id.endswith("-v5")
] + ["Pendulum-v1", "MountainCarContinuous-v0"]
QUICK = {"cartpole-swingup", "quadruped-walk", "humanoid-walk", "Hopper-v5", "Pendulum-v1"}

pytestmark = pytest.mark.algorithms("sac")  # all six share the text
on_gym, on_dmc = pytest.mark.backends("gym"), pytest.mark.backends("dmc")


@pytest.fixture
def toy(script, toys):
    """`toy(**kwargs)` is a Toy behind the script's interface, and the Toy itself."""

    def build(**kwargs):
        made = toys(**kwargs)
        return interface(script, "Toy-v0"), made[-1]

    return build


def interface(script, env_id: str, **flags):
    return script.Interface(small_args(script, env_id=env_id, **flags))


def refusal(script, capsys, *words: str) -> str:
    """The one sentence with which `python SCRIPT WORDS` ends before anything is trained."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script.__file__, *words])
        runpy.run_path(script.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    return message


# --- actions --------------------------------------------------------------------------------------


def test_every_dimension_of_an_action_has_its_own_bounds(script, use_probes):
    probes = use_probes(LOW, HIGH)
    env, action = script.Interface(small_args(script)), np.float32([0.2, -0.7, 0.5])
    env.reset(0)
    for x in (action, -np.ones(3), np.ones(3)):
        env.step(np.float32(x))
    wanted = [LOW + (np.float64(action) + 1) / 2 * (HIGH - LOW), LOW, HIGH]
    np.testing.assert_allclose(probes[0].actions, wanted, rtol=1e-6, atol=1e-7)


@on_gym
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_never_leave_the_box(toy, dtype):
    """Rounding to float32 would leave random bounds in a quarter of all cases."""
    rng = np.random.default_rng(0)
    low = (rng.normal(0, 1, (50, 10)) * 10 ** rng.uniform(-3, 5, (50, 10))).astype(dtype)
    high = low + (10 ** rng.uniform(-3, 5, (50, 10))).astype(dtype)
    env, inner = toy(actions=Box(low, high, dtype=dtype))  # of two axes, too
    env.reset(0)
    for x in (-np.ones(500), np.ones(500), *rng.uniform(-1, 1, (20, 500))):
        env.step(np.float32(x))
        assert inner.action_space.contains(inner.actions[-1])
    np.testing.assert_array_equal(inner.actions[:2], [low, high])


@on_gym
@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 1, np.int8), (-100, 100, np.int8), (0, 255, np.uint8)]
)
def test_integer_actions(toy, low, high, dtype):
    """Every value is received, in its place."""
    env, inner = toy(actions=Box(low, high, (1,), dtype))
    env.reset(0)
    for x in np.linspace(-1, 1, 501):
        env.step(np.float32([x]))
        assert inner.action_space.contains(inner.actions[-1])
    received = np.array(inner.actions, int).ravel()
    np.testing.assert_allclose(received, np.linspace(low, high, 501), atol=0.501)
    assert len(np.unique(received)) == high - low + 1


@on_gym
def test_actuators_without_limits_are_driven_in_the_unit_box(toy):
    bounds = np.array([[-1e10, 1e10], [-np.inf, np.inf], [-np.inf, 0.5], [0, np.inf], [-3, 7]])
    env, inner = toy(actions=Box(*np.float32(bounds.T)))
    env.reset(0)
    for x in (-1, 1):
        env.step(np.full(5, x, np.float32))
    np.testing.assert_allclose(inner.actions, [[-1, -1, -1, 0, -3], [1, 1, 0.5, 1, 7]])


@on_gym
@pytest.mark.parametrize("actions", [Discrete(3), Dict(a=Box(-1, 1))], ids=["Discrete", "Dict"])
def test_other_actions_are_refused(script, toys, actions, capsys):
    toys(actions=actions)
    message = refusal(script, capsys, "--env-id", "Toy-v0")
    assert "Toy-v0" in message and str(actions) in message


# --- what comes back ------------------------------------------------------------------------------

OBSERVATIONS = {
    "Dict": Dict(position=Box(-1, 1, (2, 3)), speed=Box(-1, 1, ())),
    "Tuple": Tuple([Box(-1, 1, (2, 3)), Box(-1, 1, (1,), np.float64)]),
    "float64": Box(-1, 1, (7,), np.float64),
    "uint8": Box(0, 255, (7,), np.uint8),
}


@on_gym
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations(toy, kind):
    seen, space = [], OBSERVATIONS[kind]
    env, _ = toy(observations=space, answer=lambda toy, x: seen.append(x[0]) or x)
    assert env.obs_dim == 7
    for obs, native in zip([env.reset(0), env.step(IDLE)[0]], seen, strict=True):
        assert obs.shape == (7,) and obs.dtype == np.float32
        np.testing.assert_array_equal(obs, np.float32(gym.spaces.flatten(space, native)))


def in_step(place: int, value):
    """An answer with this value in place of what `step` returns there, in an episode's second."""

    def answer(toy, outcome):
        return (*outcome[:place], value, *outcome[place + 1 :]) if toy.time == 2 else outcome

    return answer


def raises(toy, outcome):
    if toy.time == 2:
        raise RuntimeError("The robot fell off the table.")
    return outcome


@on_gym
@pytest.mark.parametrize(
    "reward", [2, np.array([2.0]), [2.0], np.array(2.0), np.float32(2), np.array([[2]])], ids=str
)
def test_rewards_of_one_entry_are_numbers(toy, reward):
    env, _ = toy(answer=in_step(1, reward))
    env.reset(0)
    rewards = [env.step(np.ones(3, np.float32))[1] for _ in range(3)]
    assert rewards == [3.0, 2.0, 3.0] and {type(x) for x in rewards} == {float}


WRONG = {
    "obs of one": in_step(0, np.zeros(1, np.float32)),
    "obs of more": in_step(0, np.zeros(6, np.float32)),
    "no obs": in_step(0, None),
    "nan obs": in_step(0, np.float32([0, 0, np.nan, 0, 0])),
    "infinite obs": in_step(0, np.float64([0, 0, 0, 0, np.inf])),
    "nan reward": in_step(1, np.nan),
    "infinite reward": in_step(1, -np.inf),
    "reward of two": in_step(1, np.ones(2)),
    "no reward": in_step(1, None),
    "four values": lambda toy, x: x[:3] + x[4:],
    "raises": raises,
}
WRONG_RESETS = {
    "obs of another size": lambda obs: (obs[1:], {}),
    "nan obs": lambda obs: (obs * np.nan, {}),
    "old API": lambda obs: obs,  # of two entries, which look like an observation and info
}


@on_gym
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_used_is_an_error(toy, wrong):
    env, _ = toy(answer=lambda toy, x: x if toy.time < 2 else WRONG[wrong](toy, x))
    env.reset(0)
    env.step(IDLE)
    with pytest.raises(gym.error.Error) as error:
        env.step(IDLE)
    message = str(error.value)
    assert "environment broke down" in message and "\n" not in message
    assert "robot" in message or wrong != "raises"


@on_gym
@pytest.mark.parametrize("wrong", WRONG_RESETS)
def test_a_reset_that_cannot_be_used_is_an_error(toy, wrong):
    answer = lambda toy, x: WRONG_RESETS[wrong](x[0])  # noqa: E731
    env, _ = toy(observations=Box(-1, 1, (2,)), answer=answer)
    with pytest.raises(gym.error.Error, match="broke down"):
        env.reset(0)


# --- episodes -------------------------------------------------------------------------------------


def test_a_termination_is_no_truncation_and_a_time_limit_no_termination(script, use_probes):
    endings = (5, "truncated"), (3, "terminated"), (4, "terminated, truncated")
    use_probes(LOW, HIGH, endings)
    env, ends = script.Interface(small_args(script)), {}
    for length, kind in endings:
        env.reset(0)
        for _ in range(length):
            next_obs, _, *ends[kind], info = env.step(IDLE)
        assert next_obs[1] == length, "the last observation, not the one after a reset"
        assert info["episode"]["l"] == length
    assert ends["truncated"] == [False, True]
    assert ends["terminated"] == ends["terminated, truncated"] == [True, False]


def test_repeated_actions_count_the_steps_of_the_environment(script, use_probes):
    """Ten steps, three at a time: four actions, the last of which is held for one step."""
    probes = use_probes(LOW, HIGH, ((10, "truncated"),))
    env, rewards, info = script.Interface(small_args(script, action_repeat=3)), [], {}
    env.reset(0)
    while "episode" not in info:
        _, reward, _, _, info = env.step(np.ones(3, np.float32))
        rewards.append(reward)
    # A step adds 1/2 to the three positions, whose sum is the reward.
    np.testing.assert_allclose(rewards, 1.5 * np.array([1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9, 10]))
    assert (info["episode"]["l"], info["episode"]["r"]) == (10, pytest.approx(1.5 * 55))
    assert len(probes[0].actions) == 10


@on_gym
def test_an_environment_that_returns_one_info_each_time(toy):
    """To which Gymnasium's wrapper adds the statistics of an episode."""
    info = {"mass": 1.0}
    env, _ = toy(length=4, answer=lambda toy, x: (*x[:-1], info))
    for _ in range(3):
        env.reset(0)
        ended = ["episode" in env.step(IDLE)[-1] for _ in range(4)]
        assert ended == [False, False, False, True]


@on_gym
def test_an_environment_without_a_time_limit_has_one(toy):
    env, _ = toy()
    env.reset(0)
    ends = [env.step(IDLE)[2:4] for _ in range(10_000)]
    assert ends == [(False, False)] * 9_999 + [(False, True)]


@on_gym
def test_seeds_of_episodes(toy):
    """A function of all the numbers, and below 2^31."""
    env, inner = toy()
    numbers = [(seed, kind, k) for seed in (0, 2**31 - 1) for kind in (0, 1) for k in range(50)]
    starts = [env.reset(*x) for x in (*numbers, *numbers)]
    np.testing.assert_array_equal(starts[:200], starts[200:])
    assert len(set(inner.seeds)) == 200 and 0 <= min(inner.seeds) and max(inner.seeds) < 2**31


# --- ids ------------------------------------------------------------------------------------------


def test_ids_that_do_not_exist(script, capsys):
    """The nearest name of this backend, or where the other backend's are used."""
    cases = {
        "dmc": {"cartpole-swingu": "cartpole-swingup", "HalfCheetah-v5": "*_gym.py"},
        "gym": {
            "HalfCheeta-v5": "HalfCheetah", "HalfCheetah-v55": "v5", "no_package:Hopper-v5":
            "no_package", "cartpole-swingup": "*_dmc.py",
        },
    }  # fmt: skip
    for env_id, word in cases[script.backend].items():
        message = refusal(script, capsys, "--env-id", env_id)
        assert env_id in message and word in message


def test_arguments_of_the_environment(script, capsys):
    env_id, kwargs, steps = {
        "dmc": ("dm_control/cartpole-swingup-v0", {"task_kwargs": {"time_limit": 0.05}}, 5),
        "gym": ("Pendulum-v1", {"max_episode_steps": 7, "g": 0.0}, 7),
    }[script.backend]
    env = interface(script, env_id, env_kwargs=json.dumps(kwargs))
    env.reset(0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(steps)]
    assert ends == [False] * (steps - 1) + [True] and getattr(env.unwrapped, "g", 0) == 0
    for text in ("{", "3", '{"no_such_argument": 1}'):
        assert f"--env-kwargs {text}" in refusal(script, capsys, "--env-kwargs", text)


@on_gym
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


# --- the suite, and Gymnasium's own ---------------------------------------------------------------


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


@on_gym
@pytest.mark.parametrize("env_id", mark_slow(GYM_IDS))
def test_gymnasium_repeats_its_episodes(script, env_id):
    check_repeats(script, env_id)


@on_dmc
def test_the_time_limit_of_the_suite_truncates(script):
    env = interface(script, "cartpole-swingup")
    env.reset(0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


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


# --- video ----------------------------------------------------------------------------------------


class Filmed(Toy):
    """A Toy that draws how long its episode has lasted."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, **kwargs):
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 20 * self.time, np.uint8)


@on_gym
def test_the_first_episode_is_filmed(script, toys, tmp_path):
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
