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
    """Keeps policy.npz of the best seed of each algorithm and task, and its last evaluation.

    The best is the one of most steps, and among equals that of the highest mean return. What is
    there of tasks that are not in CURVES stays. The evaluations are in POLICIES/eval.csv.
    """
    best, kept = {}, policies / "eval.csv"
    table = pd.read_csv(kept) if kept.exists() else pd.DataFrame({"policy": []})
    for path in sorted(curves.glob("*/policy.npz")):
        run = path.parent.name
        rows = pd.read_csv(path.with_name("eval.csv"))
        rows = rows[rows["global_step"] == rows["global_step"].max()].assign(policy=run)
        score = rows["global_step"].iloc[0], rows["return"].mean()
        name = run.rpartition("__")[0]
        if name not in best or score > best[name][0]:
            best[name] = score, path, rows
    policies.mkdir(parents=True, exist_ok=True)
    for name, ((step, score), path, rows) in best.items():
        for old in policies.glob(f"{name}__*.npz"):
            old.unlink()
        others = table["policy"].map(lambda run: run.rpartition("__")[0] != name).astype(bool)
        table = pd.concat([table[others], rows]).sort_values(["policy", "episode"])
        shutil.copyfile(path, policies / f"{path.parent.name}.npz")
        print(f"{path.parent.name}: {score:.1f} at {step} steps")
    table.convert_dtypes().to_csv(kept, index=False)


def animate(
    policies: Path = RESULTS / "policies",
    out: Path = RESULTS / "figures" / "policies.webp",
    seconds: float = 8.0,
    fps: int = 15,
    columns: int = 4,
    width: int = 180,
    quality: int = 50,
):
    """An endless film of the best policy of each task, side by side, from its first episode."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    returns = pd.read_csv(policies / "eval.csv").groupby("policy")["return"].mean()
    best = {run.split("__")[1]: policies / f"{run}.npz" for run in returns.sort_values().index}
    best = dict(sorted(best.items(), key=lambda item: item[0].lower()))
    films = [film(path, seconds, fps, width) for path in best.values()]
    columns = min(columns, len(films))
    rows = -(-len(films) // columns)
    sheets = []
    for frames in zip(*films):
        sheet = Image.new("RGB", (columns * width, rows * width), "white")
        for i, frame in enumerate(frames):
            sheet.paste(frame, (i % columns * width, i // columns * width))
        sheets.append(sheet)
    options = dict(duration=round(1000 / fps), loop=0, quality=quality, method=6)
    sheets[0].save(out, save_all=True, append_images=sheets[1:], **options)
    print(f"{out}: {', '.join(best)}; {out.stat().st_size / 1e6:.2f} MB")


def film(path: Path, seconds: float, fps: int, width: int) -> list[Image.Image]:
    """Square frames of the policy in a file called {script}__{env_id}__{seed}.npz."""
    policy, script, args = play.prepare(play.Flags(path))
    kwargs = {"render_mode": "rgb_array"} | play.camera(script, args.env_id)
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
