"""The policies of the learning curves: the best of each algorithm and task, and an animation.

    python benchmark/policies.py collect     # results/curves -> results/policies
    python benchmark/policies.py animate     # -> results/figures/policies.webp

Anyone can play what the first one keeps with agents/play.py. The second one needs a renderer, on
Debian `apt-get install libegl1 libopengl0`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import tyro
from PIL import Image

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.append(str(RESULTS.parents[1] / "agents"))
import play  # noqa: E402


def collect(curves: Path = RESULTS / "curves", policies: Path = RESULTS / "policies"):
    """Keeps policy.npz of the seed with the best last evaluation, for each algorithm and task.

    A run of other seeds must be further ahead in steps, or have a higher return, to take its place.
    """
    best = {}
    for path in sorted(curves.glob("*/policy.npz")):
        rows = pd.read_csv(path.with_name("eval.csv"))
        last = rows[rows["global_step"] == rows["global_step"].max()]
        score = int(last["global_step"].iloc[0]), last["return"].mean()
        name = path.parent.name.rpartition("__")[0]
        best[name] = max(best.get(name, ((0, 0.0), path)), (score, path))
    policies.mkdir(parents=True, exist_ok=True)
    for name, ((step, score), path) in best.items():
        for old in policies.glob(f"{name}__*.npz"):
            old.unlink()
        shutil.copyfile(path, policies / f"{path.parent.name}.npz")
        print(
            f"{path.parent.name}: {score:.1f} at {step} steps, {path.stat().st_size / 1e3:.0f} kB"
        )


def animate(
    policies: Path = RESULTS / "policies",
    out: Path = RESULTS / "figures" / "policies.webp",
    seconds: float = 8.0,
    fps: int = 15,
    columns: int = 4,
    width: int = 200,
    quality: int = 50,
):
    """An endless film of the best policy of each task, side by side, from its first episode."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    tasks = {}
    for path in sorted(policies.glob("*.npz")):
        tasks.setdefault(path.stem.split("__")[1], path)
    films = [film(path, seconds, fps, width) for path in tasks.values()]
    rows = -(-len(films) // columns)
    sheets = []
    for frames in zip(*films):
        sheet = Image.new("RGB", (columns * width, rows * width), "white")
        for i, frame in enumerate(frames):
            sheet.paste(frame, (i % columns * width, i // columns * width))
        sheets.append(sheet)
    options = dict(duration=round(1000 / fps), loop=0, quality=quality, method=6)
    sheets[0].save(out, save_all=True, append_images=sheets[1:], **options)
    print(f"{out}: {', '.join(tasks)}; {out.stat().st_size / 1e6:.2f} MB")


def film(path: Path, seconds: float, fps: int, width: int) -> list[Image.Image]:
    """Square frames of the policy in a file called {script}__{env_id}__{seed}.npz."""
    policy, script, args = play.prepare(play.Flags(path))
    kwargs = json.loads(args.env_kwargs) | {"render_mode": "rgb_array"}
    env = script.Interface(args.model_copy(update={"env_kwargs": json.dumps(kwargs)}))
    obs, step, episode, frames = env.reset(args.seed, 1, 0), 0, 0, []
    for frame in range(round(seconds * fps)):
        while step * fps < frame * env.metadata["render_fps"]:
            obs, _, terminated, truncated, _ = env.step(script.greedy_action(policy, obs))
            step += args.action_repeat
            if terminated or truncated:
                episode += 1
                obs = env.reset(args.seed, 1, episode)
        image = Image.fromarray(env.render())
        left = (image.width - image.height) // 2
        square = image.crop((left, 0, left + image.height, image.height))
        frames.append(square.resize((width, width)))
    env.close()
    return frames


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"collect": collect, "animate": animate})
