"""What a checkpoint costs: seconds to write and to resume from, and bytes on the disk.

    python benchmark/checkpoint.py

Default flags on cheetah-run with a full buffer of a million transitions, for each script that runs
there. The first number of a row is a checkpoint at the end of a run of a million steps, when it is
largest; the share of the run is that of all its checkpoints, half as large on average, at
`--speed` environment steps per second.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

AGENTS = Path(__file__).resolve().parents[1] / "agents"


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the cost of checkpoints."""

    agents: tuple[str, ...] = ("sac_dmc", "td3_dmc", "mpo_dmc")  # scripts to measure
    env_id: str = "cheetah-run"  # task of the suite
    transitions: int = 1_000_000  # in the buffer
    repeats: int = 5  # checkpoints to write; the table has the median
    speed: float = 200.0  # environment steps per second of the run


def measure(name: str, args: Args) -> dict:
    """Seconds to save and to load, bytes of the file and of the arrays in it."""
    spec = importlib.util.spec_from_file_location(name, AGENTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with tempfile.TemporaryDirectory() as folder:
        flags = script.Args(env_id=args.env_id, total_timesteps=args.transitions)
        run_dir = Path(folder)
        envs = script.Environments(flags, [0])
        obs = envs.reset_all()
        state = script.init(np.array([0]), envs.obs_dim, envs.action_dim, flags)
        buffer = script.make_buffer(envs.obs_dim, envs.action_dim, flags)
        rows = np.random.default_rng(0).normal(size=buffer.rows.shape).astype(np.float32)
        buffer = script.Buffer(jnp.asarray(rows), jnp.int32(args.transitions))
        log = script.Log(flags, run_dir, 0)
        zeros = np.zeros(1)
        loop = {"obs": obs, "returns": zeros, "lengths": zeros.astype(int)}
        seconds = []
        for step in range(1, args.repeats + 1):
            start = time.perf_counter()
            script.save(log, step, state, buffer, envs, deque(), **loop)
            seconds.append(time.perf_counter() - start)
        log.close()
        path = run_dir / "checkpoint" / f"{args.repeats}.npz"
        with np.load(path) as file:
            held = sum(file[key].nbytes for key in file.files)
        start = time.perf_counter()
        flags = dataclasses.replace(flags, resume=folder)
        jax.block_until_ready(script.resume(flags, state, buffer, envs)[1:3])
        return {
            "save": seconds,
            "load": time.perf_counter() - start,
            "file": path.stat().st_size,
            "held": held,
            "frequency": flags.checkpoint_frequency,
        }


def main(args: Args):
    """Prints the table and a JSON line of every number."""
    print(f"{'':10}{'save, s':>10}{'resume, s':>11}{'MB':>8}{'x held':>8}{'% of run':>10}")
    for name in args.agents:
        with contextlib.redirect_stdout(io.StringIO()):  # what `resume` says
            result = measure(name, args)
        save = statistics.median(result["save"])
        run, checkpoints = args.transitions / args.speed, args.transitions / result["frequency"]
        print(
            f"{name:10}{save:10.2f}{result['load']:11.2f}{result['file'] / 1e6:8.0f}"
            f"{result['file'] / result['held']:8.2f}{100 * checkpoints * save / 2 / run:10.2f}"
        )
        print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
