"""What sweep.py sees of a script. --env-id says how: breaks-once, breaks, refuses, or well."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--env-id")
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--step-seconds", type=float, default=0.0)
for name in ("seed", "total-timesteps"):
    parser.add_argument(f"--{name}", type=int)
args = parser.parse_args()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # taken between steps, never inside one
if args.env_id == "refuses":
    sys.exit(print("--env-id refuses is not a task.", file=sys.stderr) or 2)

run_dir, checkpoint = args.run_dir, args.run_dir / "checkpoint" / "state.json"
goes_on = checkpoint.exists()
state = {"step": 0, "number": args.seed, "csv": "global_step,seed,episode,return,length\n"}
state = json.loads(checkpoint.read_text()) if goes_on else state
checkpoint.parent.mkdir(parents=True, exist_ok=True)
config = vars(args) | {"run_dir": str(run_dir), "cores": sorted(os.sched_getaffinity(0))}
config |= {"action_repeat": 1, "eval_frequency": 10, "eval_episodes": 2}
config["pythonpath"] = os.environ.get("PYTHONPATH")
(run_dir / "config.json").write_text(json.dumps({"args": config, "history": {}}))
try:
    while state["step"] < args.total_timesteps:
        if signal.sigtimedwait({signal.SIGTERM}, args.step_seconds):
            sys.exit(143)
        state["step"] += 1
        state["number"] = (1103515245 * state["number"] + 12345) % 2**31
        if state["step"] > 50 and args.env_id == "breaks":
            sys.exit("something broke")
        if state["step"] > 50 and args.env_id == "breaks-once" and not goes_on:
            os.kill(os.getpid(), signal.SIGKILL)  # what came after step 50 is lost
        if state["step"] % 10 == 0:
            for k in (0, 1):
                state["csv"] += f"{state['step']},{args.seed},{k},{state['number'] % 1000 + k},9\n"
            (run_dir / "eval.csv").write_text(state["csv"])
        if state["step"] % 25 == 0:
            checkpoint.write_text(json.dumps(state))
finally:
    checkpoint.write_text(json.dumps(state))
