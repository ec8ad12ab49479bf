"""Wrappers that dm_env and dm_control lack: action repeat, and video of every episode.

They take and are a `dm_env.Environment`; put RecordVideo outside ActionRepeat:

    env = suite.load("cartpole", "swingup")
    env = RecordVideo(ActionRepeat(env, 4), "videos")
"""

import math
import re
from pathlib import Path

import dm_env
from dm_env import specs


class Wrapper(dm_env.Environment):
    """An environment that hands everything on to `env`, also what dm_env does not know of.

    dm_env.Environment has the methods below itself, so `__getattr__` never sees them.
    """

    def __init__(self, env: dm_env.Environment):
        self._env = env

    def __getattr__(self, name: str):
        if name.startswith("_"):  # a copy or an unpickled object asks before it has _env
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(self._env, name)

    def reset(self) -> dm_env.TimeStep:
        return self._env.reset()

    def step(self, action) -> dm_env.TimeStep:
        return self._env.step(action)

    def action_spec(self):
        return self._env.action_spec()

    def observation_spec(self):
        return self._env.observation_spec()

    def reward_spec(self):
        return self._env.reward_spec()

    def discount_spec(self):
        return self._env.discount_spec()

    def close(self):
        self._env.close()


class ActionRepeat(Wrapper):
    """Holds every action for `repeat` >= 1 steps of `env`, or until the episode ends.

    A step returns the last of these observations, the sum of their rewards and the product of their
    discounts. ValueError if repeat < 1.
    """

    def __init__(self, env: dm_env.Environment, repeat: int):
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, not {repeat}")
        super().__init__(env)
        self._repeat = repeat

    def step(self, action) -> dm_env.TimeStep:
        reward, discount = 0.0, 1.0
        for _ in range(self._repeat):
            timestep = self._env.step(action)
            if timestep.first():  # the step after a last step begins an episode, without reward
                return timestep
            reward, discount = reward + timestep.reward, discount * timestep.discount
            if timestep.last():
                break
        return timestep._replace(reward=reward, discount=discount)

    def reward_spec(self):
        """Without the bounds of a single reward, which a sum may leave."""
        spec = self._env.reward_spec()
        return specs.Array(spec.shape, spec.dtype, spec.name)

    def control_timestep(self) -> float:
        """Seconds of simulation between two actions."""
        return self._repeat * self._env.control_timestep()


class RenderingError(RuntimeError):
    """Nothing can be rendered on this machine; the message is a sentence on what to install."""

    def __init__(self, reason):
        reason = " ".join(str(reason).split()).rstrip(".")
        super().__init__(
            f"Rendering is not possible here ({reason}); install EGL or OSMesa (Debian: apt-get "
            "install libegl1 libopengl0 libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa."
        )


class RecordVideo(Wrapper):
    """Films every episode of a dm_control environment as `folder`/episode-{k}.mp4.

    A film plays in real time, at the highest rate up to `max_fps` that shows every n-th step, and
    is complete on disk when `step` returns the episode's last step. What there is of an episode cut
    short is written by the next `reset` or by `close`; one without a step leaves no film. k counts
    on from the films already in the folder. Episodes are the same as unfilmed ones.

    Rendering sets the speed (about 0.1 s a frame on a CPU), and the frames of an episode wait in
    memory, 0.2 MB each at the default size. `height` and `width` are in pixels, best both even.
    `close` also frees the physics, because OSMesa complains at exit where nobody does.

    Raises RenderingError if nothing can be rendered here, and ValueError if the frame is larger
    than the model's offscreen buffer (640 x 480 in most tasks).
    """

    def __init__(
        self,
        env: dm_env.Environment,
        folder: str | Path,
        height: int = 240,
        width: int = 320,
        max_fps: float = 30,
    ):
        from moviepy import ImageSequenceClip  # not above: ActionRepeat works without moviepy

        super().__init__(env)
        self._clip, self._folder = ImageSequenceClip, Path(folder)
        self._height, self._width = height, width
        interval = env.control_timestep()
        self._stride = max(1, math.ceil(1 / (max_fps * interval) - 1e-6))  # steps between frames
        self._fps = 1 / (self._stride * interval)
        self._frames, self._steps = [], 0  # of the episode under way
        try:
            self._render()
        except ValueError:
            raise
        except Exception as error:  # each backend has classes of its own
            raise RenderingError(error) from error
        self._folder.mkdir(parents=True, exist_ok=True)

    def reset(self) -> dm_env.TimeStep:
        self._write()
        timestep = self._env.reset()
        self._frames.append(self._render())
        return timestep

    def step(self, action) -> dm_env.TimeStep:
        if not self._frames:  # after a last step, or before any reset, dm_env begins an episode
            return self.reset()
        timestep = self._env.step(action)
        self._steps += 1
        if self._steps % self._stride == 0:
            self._frames.append(self._render())
        if timestep.last():
            self._write()
        return timestep

    def close(self):
        self._write()
        self._env.physics.free()
        self._env.close()

    def _render(self):
        """The view [height, width, 3] uint8 of the first camera, or of the free one if none."""
        physics = self._env.physics  # some environments make a new one for every episode
        return physics.render(self._height, self._width, min(0, physics.model.ncam - 1))

    def _write(self):
        """Writes the film of the episode under way, if it has a step, and forgets the episode."""
        frames, steps, self._frames, self._steps = self._frames, self._steps, [], 0
        if not steps:
            return
        films = [re.fullmatch(r"episode-(\d+)\.mp4", file.name) for file in self._folder.iterdir()]
        number = 1 + max((int(film[1]) for film in films if film), default=-1)
        clip = self._clip(frames, fps=self._fps)
        # moviepy rounds duration * fps down to the number of frames: half a frame more is safe.
        clip = clip.with_duration((len(frames) + 0.5) / self._fps)
        clip.write_videofile(self._folder / f"episode-{number}.mp4", audio=False, logger=None)
