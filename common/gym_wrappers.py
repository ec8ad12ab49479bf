"""Environments of the old package gym with Gymnasium's API, without the package.

    env = OldGym(an_env_of_any_old_version)

For ids that gym 0.26 itself has registered the scripts need no wrapper: `--env-id old_gym/Env-v0`.
For video, flattening, time limits and action repeat see gymnasium.wrappers.
"""

import inspect

import gymnasium
from gymnasium import spaces


class OldGym(gymnasium.Env):
    """An environment written for any version of the old package gym, with Gymnasium's API.

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
        return obs, reward, terminated, truncated, dict(info)  # a copy, to which wrappers may add

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
