"""Tests of common/: environments of the old package gym, which need not be installed."""

import sys

import gymnasium
import numpy as np
import pytest
from conftest import REPOSITORY, small_args
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from running import evaluations, run

sys.path.append(str(REPOSITORY / "common"))
from gym_wrappers import OldGym, convert_space  # noqa: E402


class Box:  # as gym.spaces.Box
    def __init__(self, low, high, dtype=np.float32):
        self.low, self.high = np.array(low, dtype), np.array(high, dtype)
        self.shape, self.dtype = self.low.shape, np.dtype(dtype)


class OldEnv:
    """An environment of gym 0.21: a random number, that is the reward too, for three steps."""

    observation_space, action_space = Box([0.0], [1.0]), Box([-1.0, -2.0], [1.0, 3.0])
    metadata = {"render.modes": ["rgb_array"], "video.frames_per_second": 20}

    def __init__(self, ending=None):
        self.ending, self.closed = ending or {}, False
        self.seed()

    def seed(self, seed=None):
        self.rng = np.random.RandomState(seed)

    def reset(self):
        self.t = -1
        return self.step(None)[0]

    def step(self, action):
        self.t += 1
        obs = self.rng.rand(1).astype(np.float32)
        return obs, float(obs[0]), self.t == 3, self.ending if self.t == 3 else {}

    def render(self, mode="human"):
        return np.full((2, 2, 3), 7, np.uint8) if mode == "rgb_array" else None

    def close(self):
        self.closed = True


def rollout(env, seed) -> list[tuple]:
    return [env.reset(seed=seed), *(env.step(np.zeros(2)) for _ in range(3))]


@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric")
def test_old_gym_has_the_api_of_gymnasium():
    env = OldGym(OldEnv(), "rgb_array")
    check_env(env, skip_render_check=True)
    assert env.action_space == spaces.Box(np.float32([-1, -2]), np.float32([1, 3]))
    assert env.metadata == {"render_modes": ["rgb_array"], "render_fps": 20}
    assert env.render_mode == "rgb_array" and (env.render() == 7).all()
    (first, info), *steps = rollout(env, 1)
    assert first == np.random.RandomState(1).rand(1).astype(np.float32) and info == {}
    assert rollout(env, 1)[3][0] == steps[2][0] != rollout(env, 2)[3][0]
    assert [step[2:4] for step in steps] == [(False, False)] * 2 + [(True, False)]
    for limit in (True, False):  # is told from a termination
        *_, last = rollout(OldGym(OldEnv({"TimeLimit.truncated": limit})), 0)
        assert last[2:4] == (not limit, limit)
    env.close()
    assert env.env.closed


def test_old_spaces_are_converted():
    box, discrete = Box([[0, -1]], [[5, 1]], np.int8), type("Discrete", (), {"n": 3})()
    inner = type("Tuple", (), {"spaces": (box, discrete)})()
    new = convert_space(type("Dict", (), {"spaces": {"z": box, "a": inner}})())
    new_box = spaces.Box(box.low, box.high, dtype=np.int8)
    assert list(new) == ["z", "a"]  # the order in which the entries are flattened
    assert new["z"] == new_box and new["a"] == spaces.Tuple((new_box, spaces.Discrete(3)))
    with pytest.raises(TypeError, match="Box, Discrete, Dict and Tuple, not"):
        convert_space(type("Graph", (), {})())


@pytest.mark.algorithms("sac")
@pytest.mark.backends("gym")
def test_a_script_trains_on_an_old_environment(script, tmp_path, monkeypatch):
    """As the README says: through a module in the current directory."""
    readme = (REPOSITORY / "common/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_envs.py").write_text(code.replace("from old_project", f"from {__name__}"))
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x])
    monkeypatch.delitem(gymnasium.registry, "OldEnv-v0", raising=False)
    monkeypatch.chdir(tmp_path)
    flags = dict(learning_starts=1000, total_timesteps=10, eval_frequency=10, run_dir="run")
    run(script, small_args(script, env_id="my_envs:OldEnv-v0", **flags))
    assert {row["length"] for row in evaluations(tmp_path / "run")} == {"3"}
