"""Wrappers that Gymnasium lacks: action repeat at real-time rendering, and old OpenAI Gym.

They are a `gymnasium.Env`. For video, flattening, time limits and the rest see gymnasium.wrappers.

    env = ActionRepeat(gymnasium.make("HalfCheetah-v5"), 4)
    env = make_old_gym("Pendulum-v1")  # from the package gym
    env = OldGym(an_env_of_any_old_version)
"""

import contextlib
import inspect
import io

import gymnasium
import numpy as np
from gymnasium import spaces


class ActionRepeat(gymnasium.Wrapper):
    """Holds every action for `repeat` >= 1 steps of `env`, or until the episode ends.

    A step returns the sum of the rewards and the rest of the last step. ValueError if repeat < 1.
    gymnasium.wrappers.RepeatAction, new in Gymnasium 1.3, does the same except that a film of it
    plays too fast: here `metadata["render_fps"]` is divided by `repeat`.
    """

    def __init__(self, env: gymnasium.Env, repeat: int):
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, not {repeat}")
        super().__init__(env)
        self.repeat = repeat
        if "render_fps" in env.metadata:
            self.metadata = env.metadata | {"render_fps": env.metadata["render_fps"] / repeat}

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class OldGym(gymnasium.Env):
    """An environment of the old package gym, of any version, with Gymnasium's API.

    Steps of four (gym <= 0.25) and of five values are understood; a `done` among four truncates
    where `info["TimeLimit.truncated"]` says so, and else terminates. Seeds go to `reset`, or to
    `env.seed` where `reset` takes none. `render_mode` is only for environments that expect it as an
    argument of `render` (gym <= 0.25); newer ones have it from when they were made.

    TypeError for a space other than Box, Discrete, Dict and Tuple.
    """

    def __init__(self, env, render_mode: str | None = None):
        self.env = env
        self.observation_space = convert_space(env.observation_space)
        self.action_space = convert_space(env.action_space)
        self.render_mode = render_mode or getattr(env, "render_mode", None)
        old = getattr(env, "metadata", None) or {}
        names = {"render.modes": "render_modes", "video.frames_per_second": "render_fps"}
        self.metadata = {"render_modes": []} | {names.get(key, key): old[key] for key in old}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        kwargs = {"options": options} if options else {}  # gym <= 0.25 knows of no options
        if seed is not None and takes(self.env, "reset", "seed"):
            kwargs["seed"] = seed
        elif seed is not None:
            self.env.seed(seed)
        result = self.env.reset(**kwargs)
        with_info = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        return result if with_info else (result, {})

    def step(self, action):
        obs, reward, *ends, info = self.env.step(action)
        terminated, truncated = map(bool, (*ends, False)[:2])
        if len(ends) == 1 and info.get("TimeLimit.truncated", False):
            terminated, truncated = False, terminated
        # Old environments return arrays [1] too, which float() refuses.
        return obs, float(np.asarray(reward).item()), terminated, truncated, info

    def render(self):
        if takes(self.env, "render", "mode"):
            return self.env.render(mode=self.render_mode)
        return self.env.render()

    def close(self):
        self.env.close()


def takes(env, method: str, argument: str) -> bool:
    """Whether a method of the innermost environment has the argument; wrappers take any."""
    parameters = inspect.signature(getattr(getattr(env, "unwrapped", env), method)).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def convert_space(space) -> gymnasium.Space:
    """An old space, known by the name of its class since gym may be absent, as Gymnasium's."""
    if isinstance(space, gymnasium.Space):
        return space
    kinds = [kind.__name__ for kind in type(space).__mro__]
    if "Box" in kinds:
        return spaces.Box(space.low, space.high, space.shape, space.dtype)
    if "Discrete" in kinds:
        return spaces.Discrete(space.n, start=getattr(space, "start", 0))
    if "Dict" in kinds:
        # A list of pairs keeps its order; a dict would be sorted.
        return spaces.Dict([(key, convert_space(x)) for key, x in space.spaces.items()])
    if "Tuple" in kinds:
        return spaces.Tuple([convert_space(x) for x in space.spaces])
    raise TypeError(f"OldGym knows the spaces Box, Discrete, Dict and Tuple, not {space}")


def make_old_gym(env_id: str, render_mode: str | None = None) -> OldGym:
    """Makes an environment registered with gym 0.26; ids like `package:Env-v0` import the package.

    ModuleNotFoundError if gym is missing. What gym raises is raised as Gymnasium's error of the
    same name: an unknown id is a gymnasium.error.UnregisteredEnv with the nearest name.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a notice that gym is unmaintained
            import gym
    except ModuleNotFoundError as error:
        if error.name != "gym":
            raise
        raise ModuleNotFoundError(
            'Old Gym environments need gym; install it with: pip install "gym==0.26.2"', name="gym"
        ) from None
    kwargs = {"disable_env_checker": True}  # the checker fails on NumPy 2
    try:
        env = gym.make(env_id, **kwargs)
        # gym 0.26 steps environments written for an older gym only if told so when it makes them.
        if not takes(env, "reset", "seed"):
            kwargs["apply_api_compatibility"] = True
        if render_mode:  # not passed as None either: an older environment has no such argument
            kwargs["render_mode"] = render_mode
        if len(kwargs) > 1:
            env.close()
            env = gym.make(env_id, **kwargs)
    except gym.error.Error as error:
        kind = getattr(gymnasium.error, type(error).__name__, gymnasium.error.Error)
        raise kind(str(error)) from error
    return OldGym(env)
