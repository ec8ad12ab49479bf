"""Tests of common/ on the packages themselves: dm_control, Gymnasium and, if there, gym 0.26."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dm_env
import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
from dm_env import specs
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

COMMON = Path(__file__).resolve().parents[1] / "common"


def load(name: str):
    """A module of common/, loaded by path as the scripts do it."""
    spec = importlib.util.spec_from_file_location(name, COMMON / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dmc_wrappers, gym_wrappers = load("dmc_wrappers"), load("gym_wrappers")


def python(code: str, *argv, gl: str = "disable") -> subprocess.CompletedProcess:
    """Runs code in an interpreter of its own: dm_control chooses its renderer when imported."""
    env = os.environ | {"MUJOCO_GL": gl, "PYTHONPATH": str(COMMON)}
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "disable"))
        from dm_control import suite
    return suite


# --- action repeat in dm_control ------------------------------------------------------------------


class Halving(dm_env.Environment):
    """Three steps of reward 1 and discount 1/2; has an attribute that dm_env does not know of."""

    task = SimpleNamespace(name="halving")

    def reset(self):
        self.left = 3
        return dm_env.restart(0.0)

    def step(self, action):
        if self.left == 0:
            return self.reset()
        self.left -= 1
        end = dm_env.transition(1.0, 0.0, 0.5)
        return end if self.left else end._replace(step_type=dm_env.StepType.LAST)

    def action_spec(self):
        return specs.BoundedArray((2,), float, -1, 1)

    def observation_spec(self):
        return specs.Array((), float)

    def reward_spec(self):
        return specs.BoundedArray((), float, 0, 1)

    def discount_spec(self):
        return specs.BoundedArray((), float, 0, 0.5)


@pytest.mark.parametrize(
    "task", [("cartpole", "swingup"), ("quadruped", "walk"), ("lqr", "lqr_2_1")]
)
def test_dmc_repeat_is_the_steps_of_the_environment(suite, task):
    plain = suite.load(*task, task_kwargs={"random": 1})
    env = dmc_wrappers.ActionRepeat(suite.load(*task, task_kwargs={"random": 1}), 3)
    plain.reset(), env.reset()
    spec, rng = env.action_spec(), np.random.default_rng(0)
    for _ in range(5):
        action = rng.uniform(-1, 1, spec.shape)
        steps = [plain.step(action) for _ in range(3)]
        timestep = env.step(action)
        assert timestep.reward == sum(step.reward for step in steps)
        assert timestep.discount == 1
        for key, value in steps[-1].observation.items():
            np.testing.assert_array_equal(timestep.observation[key], value)
    assert env.physics.time() == plain.physics.time()
    assert env.control_timestep() == pytest.approx(3 * plain.control_timestep())


def test_dmc_repeat_stops_at_a_time_limit(suite):
    env = suite.load("cartpole", "swingup", task_kwargs={"random": 1, "time_limit": 0.1})
    env = dmc_wrappers.ActionRepeat(env, 4)
    env.reset()
    episode = [env.step([0.0]) for _ in range(3)]  # of 4, 4 and 2 steps
    assert [timestep.last() for timestep in episode] == [False, False, True]
    assert episode[-1].discount == 1
    assert env.physics.time() == pytest.approx(0.1)
    begin = env.step([0.0])
    assert begin.first() and begin.reward is None and env.physics.time() == 0


def test_dmc_repeat_sums_rewards_and_multiplies_discounts():
    env = dmc_wrappers.ActionRepeat(Halving(), 2)
    assert env.reset().first()
    first, last, begin = env.step(0), env.step(0), env.step(0)
    assert (first.mid(), first.reward, first.discount) == (True, 2, 0.25)
    assert (last.last(), last.reward, last.discount) == (True, 1, 0.5)
    assert begin.first() and begin.reward is None


def test_dmc_wrappers_hand_on_everything_else():
    env = dmc_wrappers.ActionRepeat(Halving(), 2)
    assert env.task is Halving.task
    assert env.action_spec() == Halving().action_spec()
    assert env.discount_spec() == Halving().discount_spec()
    assert type(env.reward_spec()) is specs.Array  # a sum of two may leave [0, 1]
    assert copy.deepcopy(env).task.name == "halving"
    with pytest.raises(AttributeError, match="nothing"):
        env.nothing


@pytest.mark.parametrize("repeat", [0, -1])
def test_repeat_below_1_is_refused(repeat):
    for module, env in (dmc_wrappers, Halving()), (gym_wrappers, gymnasium.make("Pendulum-v1")):
        with pytest.raises(ValueError, match=f"at least 1, not {repeat}"):
            module.ActionRepeat(env, repeat)


# --- video of dm_control --------------------------------------------------------------------------

RENDER = """
from dm_control import suite
physics = suite.load("cartpole", "swingup").physics
physics.render(48, 64)
physics.free()
"""

FILM = """
import json, sys
from pathlib import Path
from dm_control import suite
from dmc_wrappers import ActionRepeat, RecordVideo

folder = Path(sys.argv[1])

def load(domain, task, **kwargs):
    return suite.load(domain, task, task_kwargs={"random": 0, **kwargs})

def play(env, steps=1000):
    # The numbers of an episode, or of its first steps, and the next one of the random state.
    timestep, numbers = env.reset(), []
    while not timestep.last() and len(numbers) < steps:
        timestep = env.step(env.action_spec().maximum)
        observation = {key: value.tolist() for key, value in timestep.observation.items()}
        numbers.append([timestep.reward, timestep.discount, observation])
    return numbers, env.task.random.rand()

out = {}

(folder / "cartpole").mkdir()
(folder / "cartpole" / "episode-9.mp4").write_text("kept")
plain = load("cartpole", "swingup", time_limit=0.4)
filmed = RecordVideo(load("cartpole", "swingup", time_limit=0.4), folder / "cartpole")
out["plain"] = [play(plain) for _ in range(2)]
out["filmed"] = [play(filmed) for _ in range(2)]
out["written"] = sorted(file.name for file in (folder / "cartpole").iterdir())
filmed.step([0.0])  # begins an episode without a step
filmed.close()

repeated = ActionRepeat(load("quadruped", "walk", time_limit=1), 4)
with RecordVideo(repeated, folder / "quadruped", height=48, width=64) as env:
    play(env)

env = RecordVideo(load("lqr", "lqr_2_1"), folder / "lqr", 48, 64, max_fps=20)
env.reset()
play(env, 10)  # after an episode without a step
play(env, 5)  # ends the one before
env.close()  # ends this one

try:
    RecordVideo(load("lqr", "lqr_2_1"), folder / "large", height=2000)
except ValueError as error:
    out["large"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def gl():
    """The name of a renderer that works here."""
    reasons = []
    for name in "egl", "osmesa":
        child = python(RENDER, gl=name)
        if child.returncode == 0:
            return name
        reasons.append(f"{name}: {child.stderr.strip().splitlines()[-1]}")
    pytest.skip("nothing renders here; " + "; ".join(reasons))


@pytest.fixture(scope="module")
def films(gl, tmp_path_factory):
    """The folder in which FILM put its films, and what it printed."""
    folder = tmp_path_factory.mktemp("films")
    child = python(FILM, folder, gl=gl)
    assert child.returncode == 0 and "Traceback" not in child.stderr, child.stderr
    return folder, json.loads(child.stdout)


def watch(file: Path):
    """The frames [T, height, width, 3] of a film, its frames per second and its seconds."""
    reader = imageio_ffmpeg.read_frames(file)
    meta = next(reader)
    frames = np.stack([np.frombuffer(frame, np.uint8) for frame in reader])
    width, height = meta["size"]
    return frames.reshape(-1, height, width, 3), meta["fps"], meta["duration"]


def test_films_show_the_episode_in_real_time(films):
    frames, fps, seconds = watch(films[0] / "cartpole" / "episode-10.mp4")
    assert frames.shape == (11, 240, 320, 3)  # every 4th of 40 steps, and the reset
    assert fps == 25  # of 100 steps a second
    assert seconds == pytest.approx(0.4 + 1 / 25, abs=0.011)
    assert (frames.std(axis=(1, 2, 3)) > 10).all() and (frames.mean(axis=(1, 2, 3)) > 10).all()
    changes = np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3))
    assert (changes > 50).all()  # the pole swings


def test_films_of_repeated_actions_play_in_real_time(films):
    frames, fps, _ = watch(films[0] / "quadruped" / "episode-0.mp4")
    assert len(frames) == 14  # 12 steps of 4, the rest of 2, and the reset
    assert fps == 12.5  # steps of 4 x 0.02 s


def test_filmed_episodes_are_the_unfilmed_ones(films):
    assert len(films[1]["plain"][0][0]) == 40
    assert films[1]["filmed"] == films[1]["plain"]


def test_films_are_complete_at_the_last_step_and_overwrite_nothing(films):
    names = ["episode-10.mp4", "episode-11.mp4", "episode-9.mp4"]
    assert films[1]["written"] == names
    assert sorted(file.name for file in (films[0] / "cartpole").iterdir()) == names
    assert (films[0] / "cartpole" / "episode-9.mp4").read_text() == "kept"


def test_episodes_cut_short_are_written(films):
    files = sorted((films[0] / "lqr").iterdir())
    assert [file.name for file in files] == ["episode-0.mp4", "episode-1.mp4"]
    counts = [len(watch(file)[0]) for file in files]
    assert counts == [6, 3]  # every 2nd of 10 and of 5 steps, and the reset
    assert watch(files[0])[1] == pytest.approx(1 / 0.06, abs=0.01)


def test_frames_too_large_are_no_rendering_error(films):
    assert "2000" in films[1]["large"]
    assert not (films[0] / "large").exists()


def test_without_a_renderer_the_constructor_says_what_to_install(tmp_path):
    code = """
import sys
from dm_control import suite
from dmc_wrappers import RecordVideo, RenderingError
try:
    RecordVideo(suite.load("cartpole", "swingup"), sys.argv[1] + "/videos")
except RenderingError as error:
    assert isinstance(error, RuntimeError)
    print(error)
"""
    child = python(code, tmp_path, gl="disable")
    assert child.stdout == (
        "Rendering is not possible here (No OpenGL rendering backend is available); install EGL or "
        "OSMesa (Debian: apt-get install libegl1 libopengl0 libosmesa6) and set MUJOCO_GL=egl or "
        "MUJOCO_GL=osmesa.\n"
    ), child.stderr
    assert list(tmp_path.iterdir()) == []


# --- action repeat in Gymnasium -------------------------------------------------------------------


def test_gym_repeat_is_the_steps_of_the_environment():
    plain = gymnasium.make("HalfCheetah-v5")
    env = gym_wrappers.ActionRepeat(gymnasium.make("HalfCheetah-v5"), 4)
    plain.reset(seed=1), env.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = rng.uniform(-1, 1, env.action_space.shape)
        steps = [plain.step(action) for _ in range(4)]
        obs, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(obs, steps[-1][0])
        assert reward == pytest.approx(sum(step[1] for step in steps))
        assert (terminated, truncated) == (False, False)
        assert info["x_position"] == steps[-1][4]["x_position"]
    assert env.metadata["render_fps"] == plain.metadata["render_fps"] / 4


def test_gym_repeat_stops_at_a_time_limit():
    env = gym_wrappers.ActionRepeat(gymnasium.make("Pendulum-v1", max_episode_steps=6), 4)
    env.reset(seed=0)
    first, last = env.step([0.0]), env.step([0.0])
    assert first[2:4] == (False, False) and last[2:4] == (False, True)
    plain = gymnasium.make("Pendulum-v1")
    plain.reset(seed=0)
    rewards = [plain.step([0.0])[1] for _ in range(6)]
    assert (first[1], last[1]) == pytest.approx((sum(rewards[:4]), sum(rewards[4:])))


# --- old Gym --------------------------------------------------------------------------------------


class Box:
    """A box in the way of gym.spaces.Box; gym itself need not be installed."""

    def __init__(self, low, high, dtype=np.float32):
        self.low, self.high = np.array(low, dtype), np.array(high, dtype)
        self.shape, self.dtype = self.low.shape, np.dtype(dtype)


class FourValues:
    """An environment of gym <= 0.21: a random number, that is the reward too, for three steps."""

    observation_space, action_space = Box([0.0], [1.0]), Box([-1.0, -2.0], [1.0, 3.0])
    metadata = {"render.modes": ["rgb_array"], "video.frames_per_second": 20}

    def __init__(self, ending=None):
        self.ending, self.closed = ending or {}, False
        self.rng = np.random.RandomState()

    def seed(self, seed=None):
        self.rng = np.random.RandomState(seed)

    def reset(self):
        self.t = 0
        return self.rng.rand(1).astype(np.float32)

    def step(self, action):
        self.t += 1
        obs = self.rng.rand(1).astype(np.float32)
        return obs, obs, self.t == 3, self.ending if self.t == 3 else {}

    def render(self, mode="human"):
        return np.full((2, 2, 3), 7, np.uint8) if mode == "rgb_array" else None

    def close(self):
        self.closed = True


class FiveValues(FourValues):
    """The same in the way of gym 0.26, which is Gymnasium's but for the spaces."""

    metadata, render_mode = {"render_modes": ["rgb_array"], "render_fps": 20}, "rgb_array"
    seed = None

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            super().seed(seed)
        return super().reset(), {"options": options}

    def step(self, action):
        obs, reward, done, info = super().step(action)
        return obs, reward, np.bool_(False), np.bool_(done), info

    def render(self):
        return super().render(self.render_mode)


def rollout(env, seed):
    """Everything that an episode of three steps returns."""
    return [env.reset(seed=seed), *(env.step(np.zeros(2)) for _ in range(3))]


@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric")
@pytest.mark.parametrize("old", [FourValues, FiveValues])
def test_old_gym_has_the_api_of_gymnasium(old):
    check_env(gym_wrappers.OldGym(old(), "rgb_array"), skip_render_check=True)
    env = gym_wrappers.OldGym(old(), "rgb_array")
    assert env.action_space == spaces.Box(np.float32([-1, -2]), np.float32([1, 3]))
    assert env.metadata == {"render_modes": ["rgb_array"], "render_fps": 20}
    assert env.render_mode == "rgb_array" and (env.render() == 7).all()
    (first, info), *steps = rollout(env, 1)
    assert first == np.random.RandomState(1).rand(1).astype(np.float32) and isinstance(info, dict)
    assert rollout(env, 1)[3][0] == steps[2][0] != rollout(env, 2)[3][0]
    assert all(type(reward) is float and reward == obs[0] for obs, reward, *_ in steps)
    assert all(type(end) is bool for step in steps for end in step[2:4])
    env.close()
    assert env.env.closed


@pytest.mark.parametrize(
    "ending, ends",
    [({}, (True, False)), ({"TimeLimit.truncated": True}, (False, True)),
     ({"TimeLimit.truncated": False}, (True, False))],
)  # fmt: skip
def test_old_gym_tells_a_time_limit_from_a_termination(ending, ends):
    _, *steps = rollout(gym_wrappers.OldGym(FourValues(ending)), 0)
    assert [step[2:4] for step in steps] == [(False, False), (False, False), ends]


def test_old_gym_hands_on_five_values_and_options():
    env = gym_wrappers.OldGym(FiveValues())
    assert env.reset(seed=0, options={"a": 1})[1] == {"options": {"a": 1}}
    assert [env.step(np.zeros(2))[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]


def test_old_spaces_are_converted():
    convert = gym_wrappers.convert_space
    box = Box([[0, -1]], [[5, 1]], np.int8)
    old = type("Dict", (), {"spaces": {
        "z": box,
        "a": type("Tuple", (), {"spaces": (box, type("Discrete", (), {"n": 3, "start": 1})())})(),
    }})()  # fmt: skip
    new_box = spaces.Box(box.low, box.high, dtype=np.int8)
    new = convert(old)
    assert list(new) == ["z", "a"]  # the order in which the entries are flattened
    assert new["z"] == new_box and new["a"] == spaces.Tuple([new_box, spaces.Discrete(3, start=1)])
    assert convert(type("Discrete", (), {"n": 4})()) == spaces.Discrete(4)
    assert convert(new) is new
    with pytest.raises(TypeError, match="Box, Discrete, Dict and Tuple, not"):
        convert(type("Graph", (), {})())


def test_without_gym_make_old_gym_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "gym==0\.26\.2"'):
        gym_wrappers.make_old_gym("Pendulum-v1")


@pytest.mark.parametrize("env_id, steps", [("Pendulum-v1", 200), ("MountainCarContinuous-v0", 999)])
def test_old_gym_plays_as_gymnasium_does(env_id, steps):
    pytest.importorskip("gym")
    env, new = gym_wrappers.make_old_gym(env_id), gymnasium.make(env_id)
    assert (env.observation_space, env.action_space) == (new.observation_space, new.action_space)
    np.testing.assert_array_equal(env.reset(seed=3)[0], new.reset(seed=3)[0])
    new.action_space.seed(0)
    for t in range(1, steps + 1):
        action = new.action_space.sample()
        obs, reward, *ends, info = env.step(action)
        new_obs, new_reward, *new_ends, _ = new.step(action)
        np.testing.assert_allclose(obs, new_obs, rtol=1e-5, atol=1e-6)
        assert reward == pytest.approx(new_reward, rel=1e-5, abs=1e-9) and ends == new_ends
        assert ends == [False, t == steps]


def test_old_gym_terminates_at_the_goal():
    pytest.importorskip("gym")
    env = gym_wrappers.make_old_gym("MountainCarContinuous-v0")
    obs, ends = env.reset(seed=0)[0], [False, False]
    while not any(ends):  # pushed along its velocity, the car gets there
        obs, reward, *ends, _ = env.step(np.float32([1 if obs[1] >= 0 else -1]))
    assert ends == [True, False] and reward > 90


@pytest.mark.filterwarnings("ignore:.*doesn't include `render_modes`")
def test_old_gym_makes_environments_written_for_an_older_gym():
    gym = pytest.importorskip("gym")

    class Old(FourValues, gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (2,))

    if "Old-v0" not in gym.envs.registry:
        gym.register("Old-v0", Old, max_episode_steps=2)
    env = gym_wrappers.make_old_gym("Old-v0", render_mode="rgb_array")
    (first, _), *steps = rollout(env, 1)
    assert first == np.random.RandomState(1).rand(1).astype(np.float32)
    assert [step[2:4] for step in steps[:2]] == [(False, False), (False, True)]
    assert env.render_mode == "rgb_array" and (env.render() == 7).all()


@pytest.mark.parametrize(
    "env_id, message",
    [("Pendulm-v1", "Did you mean: `Pendulum`"), ("Pendulum-v9", "doesn't exist"),
     ("nowhere/Pendulum-v1", "nowhere not found")],
)  # fmt: skip
def test_unknown_old_ids_are_gymnasiums_errors(env_id, message):
    pytest.importorskip("gym")
    with pytest.raises(gymnasium.error.UnregisteredEnv, match=message):
        gym_wrappers.make_old_gym(env_id)


def test_old_gym_is_silent():
    pytest.importorskip("gym")
    code = """
from gym_wrappers import make_old_gym
env = make_old_gym("Pendulum-v1")
env.reset(seed=0)
env.step(env.action_space.sample())
"""
    child = python(code)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_old_gym_renders():
    pytest.importorskip("gym")
    pytest.importorskip("pygame")
    env = gym_wrappers.make_old_gym("MountainCarContinuous-v0", "rgb_array")
    env.reset(seed=0)
    assert env.render_mode == "rgb_array" and env.metadata["render_fps"] == 30
    assert env.render().shape == (400, 600, 3)
