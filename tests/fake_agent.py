"""A script as far as sweep.py can see, without learning: same flags, files, signals, exit codes.

The returns of its evaluations follow from the seed and from every step before, so a run that was
resumed wrongly differs. `--env-id` says how it behaves: breaks-once, breaks, refuses, or well.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for name, default in {
    "seed": 0, "num-seeds": 1, "total-timesteps": 100, "action-repeat": 1,
    "eval-frequency": 10, "eval-episodes": 2,
}.items():  # fmt: skip
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--env-id")
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--resume", type=Path)
parser.add_argument("--step-seconds", type=float, default=0.0)
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

if args.resume:
    run_dir = args.resume
    config = json.loads((run_dir / "config.json").read_text())["args"]
    config["total_timesteps"] = max(args.total_timesteps, config["total_timesteps"])
    try:
        state = json.loads((run_dir / "checkpoint" / "state.json").read_text())
    except ValueError:
        sys.exit(2)
else:
    run_dir = args.run_dir
    config = {k: v for k, v in vars(args).items() if k not in ("run_dir", "resume")}
    config["cores"] = sorted(os.sched_getaffinity(0))
    state = {"step": 0, "number": args.seed, "csv": "global_step,seed,episode,return,length\n"}
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoint").mkdir()
(run_dir / "config.json").write_text(json.dumps({"args": config}))
(run_dir / "eval.csv").write_text(state["csv"])  # not what was written after the checkpoint


def save():
    """Puts a checkpoint in the place of the last one."""
    (run_dir / "checkpoint" / "new.json").write_text(json.dumps(state))
    (run_dir / "checkpoint" / "new.json").rename(run_dir / "checkpoint" / "state.json")


if config["env_id"] == "refuses":
    print("--env-id refuses is not a task.", file=sys.stderr)
    sys.exit(2)
try:
    while state["step"] < config["total_timesteps"]:
        time.sleep(config["step_seconds"])
        state["step"] += 1
        state["number"] = (1103515245 * state["number"] + 12345) % 2**31
        broken = (
            config["env_id"] == "breaks" or config["env_id"] == "breaks-once" and not args.resume
        )
        if state["step"] > 50 and broken:
            sys.exit("something broke")
        if state["step"] % config["eval_frequency"] == 0:
            for episode in range(config["eval_episodes"]):
                state["csv"] += f"{state['step']},{config['seed']},{episode},"
                state["csv"] += f"{state['number'] % (1000 + episode)},1000\n"
            (run_dir / "eval.csv").write_text(state["csv"])
        if state["step"] % 25 == 0:
            save()
finally:
    save()
