"""Plays the greedy policy of a run and prints the return of every episode.

    python agents/play.py RUN_DIR                                # ten episodes, those of eval.csv
    python agents/play.py RUN_DIR --episodes 1 --render human    # in a window, or --render film.mp4
    python agents/play.py policy.npz --agent sac_dmc --env-id cartpole-swingup
    python agents/play.py benchmark/results/policies/sac_dmc__cartpole-swingup__0.npz

The policy needs NumPy alone; the environment is the one that the script of the run makes.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    """Plays the greedy policy of a run and prints the return of every episode."""

    policy: Annotated[Path, tyro.conf.Positional]  # run directory, or a policy.npz
    agent: str | None = None  # script of the run, by name or path; default its experiment's name
    env_id: str | None = None  # environment; default that of the run
    episodes: int = 10  # how many to play
    seed: int | None = None  # of the episodes; default that of the run, as in its evaluations
    render: str | None = None  # `human` for a window, or an .mp4 for a film of the first episode


def fail(message: str):
    """Ends the program with a sentence on stderr."""
    print(message, file=sys.stderr)
    sys.exit(2)


def named(path: Path) -> dict:
    """Flags of the run that a file called {script}__{env_id}__{seed}.npz is from."""
    match = re.fullmatch(r"(\w+?)__(.+)__(\d+)", path.stem)
    return dict(zip(("exp_name", "env_id", "seed"), match.groups())) if match else {}


def camera(module, env_id: str) -> dict:
    """Options of make_env for a camera that follows what moves."""
    if module.__name__.endswith("_dmc"):
        return {"render_kwargs": {"camera_id": 0}}
    entry_point = str(gym.registry[env_id].entry_point) if env_id in gym.registry else ""
    return {"camera_name": "track"} if entry_point.startswith("gymnasium.envs.mujoco") else {}


def prepare(flags: Flags):
    """The policy, the module of its script, and the flags of its run."""
    path = flags.policy / "policy.npz" if flags.policy.is_dir() else flags.policy
    try:
        policy, config = dict(np.load(path)), path.with_name("config.json")
        args = json.loads(config.read_text())["args"] if config.exists() else named(path)
        args |= {"env_id": flags.env_id} if flags.env_id else {}
        script = Path(flags.agent or args["exp_name"]).with_suffix(".py")
        script = script if script.exists() else Path(__file__).with_name(script.name)
        sys.path.insert(0, str(script.parent))
        module = importlib.import_module(script.stem)
        return policy, module, module.Args(**args)
    except KeyError:
        fail(f"No config.json lies beside {path}; say what it is of with --agent and --env-id.")
    except (OSError, ValueError, TypeError, ImportError) as error:
        fail(f"{path} cannot be played: {error}. Its script may be named with --agent.")


def main(flags: Flags) -> list[float]:
    """Returns the return of every episode."""
    film = flags.render if flags.render and flags.render.endswith(".mp4") else None
    if flags.episodes < 1 or flags.render not in (None, "human", film):
        fail("--episodes is at least 1, and --render is human or the name of an .mp4 file.")
    if flags.render == "human" and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        fail("--render human needs a display; --render film.mp4 does not.")
    policy, module, args = prepare(flags)
    if flags.render:
        os.environ.setdefault("MUJOCO_GL", "egl" if film else "glfw")
        make_env, mode = module.make_env, "rgb_array" if film else "human"
        options = {"render_mode": mode} | camera(module, args.env_id)
        module.make_env = lambda args: make_env(args, **options)
    env, returns, frames = module.Interface(args), [], []
    if [*policy["obs_mean"].shape, policy["low"].size] != [env.obs_dim, env.low.size]:
        fail(f"{flags.policy} is not for {args.env_id}: observations or actions have other sizes.")
    for k in range(flags.episodes):
        obs, info = env.reset(args.seed if flags.seed is None else flags.seed, 1, k), {}
        while "episode" not in info:
            obs, *_, info = env.step(module.greedy_action(policy, obs))
            if film and k == 0:
                frames.append(env.render())
        returns.append(float(info["episode"]["r"]))
        print(f"episode {k}: return {returns[-1]:.9g} in {info['episode']['l']} steps", flush=True)
        if film and k == 0:
            moviepy, fps = importlib.import_module("moviepy"), env.metadata["render_fps"]
            clip = moviepy.ImageSequenceClip(frames, fps=fps / args.action_repeat)
            clip.write_videofile(film, logger=None)
    env.close()
    print(f"mean {np.mean(returns):.1f} ± {np.std(returns):.1f} of {len(returns)} episodes")
    return returns


if __name__ == "__main__":
    try:
        main(tyro.cli(Flags))
    except gym.error.Error as error:
        fail(str(error))
