"""Environments of the old package gym (up to 0.25) with Gymnasium's API, without the package.

env = OldGym(an_old_environment)
"""

import gymnasium
from gymnasium import spaces


class OldGym(gymnasium.Env):
    """An environment whose `step` returns four values, whose `reset` returns an observation alone.

    `done` truncates where `info["TimeLimit.truncated"]` says so, and else terminates; seeds go to
    `env.seed`. TypeError for a space other than Box, Discrete, Dict and Tuple.
    """

    def __init__(self, env, render_mode: str | None = None):
        self.env, self.render_mode = env, render_mode
        self.observation_space = convert_space(env.observation_space)
        self.action_space = convert_space(env.action_space)
        old = getattr(env, "metadata", None) or {}
        names = {"render.modes": "render_modes", "video.frames_per_second": "render_fps"}
        self.metadata = {"render_modes": []} | {names.get(key, key): old[key] for key in old}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.seed(seed)
        return self.env.reset(), {}

    def step(self, action):
        obs, reward, done, info = self.env.step(action)
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        return obs, reward, bool(done and not truncated), truncated, dict(info)

    def render(self):
        return self.env.render(mode=self.render_mode)

    def close(self):
        self.env.close()


def convert_space(space) -> gymnasium.Space:
    """An old space, known by the name of its class since gym may be absent, as Gymnasium's."""
    kinds = [kind.__name__ for kind in type(space).__mro__]
    if "Box" in kinds:
        return spaces.Box(space.low, space.high, space.shape, space.dtype)
    if "Discrete" in kinds:
        return spaces.Discrete(space.n)
    if "Dict" in kinds:
        # A list of pairs keeps its order; a dict would be sorted.
        return spaces.Dict([(key, convert_space(x)) for key, x in space.spaces.items()])
    if "Tuple" in kinds:
        return spaces.Tuple([convert_space(x) for x in space.spaces])
    raise TypeError(f"OldGym knows the spaces Box, Discrete, Dict and Tuple, not {space}")
