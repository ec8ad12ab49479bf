"""What a checkpoint costs: seconds to write and to read, and bytes on the disk.

    python benchmark/checkpoint.py

Default flags on cheetah-run with a full buffer of a million transitions: a checkpoint at the end of
a run of a million steps, when it is largest. The share of the run is that of all its checkpoints,
half as large on average, at `--speed` environment steps per second.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import speed
import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the cost of checkpoints."""

    agents: tuple[str, ...] = ("sac_dmc", "td3_dmc", "mpo_dmc")  # scripts to measure
    transitions: int = 1_000_000  # in the buffer
    repeats: int = 5  # checkpoints to write; the table has the median
    speed: float = 200.0  # environment steps per second of the run


def measure(name: str, args: Args) -> tuple[float, float, int, float]:
    """Seconds to save and to load, bytes of a checkpoint, and how many there are in a run."""
    script = speed.ROOT / "agents" / f"{name}.py"
    module, flags = speed.load(script, env_id="cheetah-run", buffer_size=args.transitions)
    env, rng = module.Interface(flags), np.random.default_rng(0)
    sizes = env.obs_dim, env.low.size, flags
    state, buffer = module.init(jax.random.key(0), *sizes), module.make_buffer(*sizes)
    data = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), buffer.data)
    buffer = buffer._replace(data=data, count=buffer.count + args.transitions)
    results, seconds = np.zeros((0, 5)), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoint").mkdir()
        for _ in range(args.repeats):
            start = time.perf_counter()
            module.save(Path(folder), env, flags, buffer, state, results)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(module.load(Path(folder), buffer, state, results)[:2])
        load = time.perf_counter() - start
        (path,) = (Path(folder) / "checkpoint").iterdir()
        number = args.transitions / flags.checkpoint_frequency
        return statistics.median(seconds), load, path.stat().st_size, number


def main(args: Args):
    """Prints the table."""
    print(f"{'':10}{'save, s':>10}{'load, s':>10}{'MB':>8}{'% of run':>10}")
    for name in args.agents:
        save, load, size, number = measure(name, args)
        share = number * save / 2 / (args.transitions / args.speed)
        print(f"{name:10}{save:10.2f}{load:10.2f}{size / 1e6:8.0f}{100 * share:10.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
