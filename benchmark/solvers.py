"""What the temperature solvers of agents/mpo_*.py cost: seconds per 1000 updates with each.

    python benchmark/solvers.py

Times `learn`, a minibatch from the buffer and one update on it, with the default flags and
`--temperature-solver` newton, slsqp or gradient; "none" is the same update with fixed temperatures.
All four take turns in one process. The difference to "none" is what a solver costs; since that is
less than the noise of whole updates, the two solutions of an update are also timed by themselves.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
SOLVERS = ("newton", "slsqp", "gradient", "none")
FILLED = 50_000  # random transitions in the buffer


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the temperature solvers of MPO."""

    script: Literal["mpo_dmc", "mpo_gym"] = "mpo_dmc"  # whose default flags
    obs_dim: int = 17  # as HalfCheetah-v5
    action_dim: int = 6  # as HalfCheetah-v5
    repeats: int = 10  # rounds, in each of which every solver is measured once
    updates: int = 100  # timed updates of a round
    out: Path = ROOT / "benchmark" / "results" / "mpo-solvers.json"  # file of raw numbers


def learner(args: Args, solver: str):
    """Two functions of a count: they do so many updates, or solve as often as these do."""
    spec = importlib.util.spec_from_file_location(solver, ROOT / "agents" / f"{args.script}.py")
    module = sys.modules[solver] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if solver == "none":
        module.solve_temperature = lambda q, epsilon, dual, args: jnp.float32(1)
    flags = module.Args() if solver == "none" else module.Args(temperature_solver=solver)
    state = module.init(np.array([0]), args.obs_dim, args.action_dim, flags)
    buffer = module.make_buffer(args.obs_dim, args.action_dim, flags)
    rows = np.random.default_rng(0).uniform(-1, 1, (FILLED, buffer.rows.shape[-1]))
    buffer = buffer._replace(rows=buffer.rows.at[0, :FILLED].set(rows), count=buffer.count + FILLED)

    def learn(updates: int):
        nonlocal state
        for _ in range(updates):
            state, _ = module.learn(state, buffer, flags)
        jax.block_until_ready(state)

    @jax.jit
    def both(q, cost):
        problems = (q, flags.epsilon), (cost, flags.epsilon_penalty)
        return [module.solve_temperature(*problem, jnp.float32(1), flags) for problem in problems]

    shape = (flags.action_samples, flags.batch_size, 1 + args.action_dim)
    noise = jax.random.normal(jax.random.key(0), shape)
    q, cost = noise[..., 0], module.penalty(noise[..., 1:])

    def solve(updates: int):
        for _ in range(updates):
            jax.block_until_ready(both(q, cost))

    return learn, solve


def main(args: Args):
    """Prints the table, and writes every number to a file."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the script does for slsqp
    sides = {solver: learner(args, solver) for solver in SOLVERS}
    seconds = {solver: ([], []) for solver in SOLVERS}  # of updates, of their solutions alone
    for functions in sides.values():
        for function in functions:
            function(args.updates // 4)  # compiles, and lets the values differ between samples
    for _ in range(args.repeats):
        for solver, functions in sides.items():
            for function, values in zip(functions, seconds[solver]):
                start = time.perf_counter()
                function(args.updates)
                values.append(1000 * (time.perf_counter() - start) / args.updates)

    print(f"{args.script}, {args.obs_dim} observations, {args.action_dim} actions, ", end="")
    print(f"{args.repeats} rounds of {args.updates} updates\n")
    print("| temperature solver | seconds per 1000 updates | solutions alone | share |")
    print("|---|---|---|---|")
    for solver, (updates, alone) in seconds.items():
        print(f"| {solver} | {np.mean(updates):.2f} ± {np.std(updates):.2f} ", end="")
        print(f"| {np.mean(alone):.2f} | {np.mean(alone) / np.mean(updates):.1%} |")
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    record = {
        "unit": "seconds per 1000 updates",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "args": {name: value for name, value in vars(args).items() if name != "out"},
        "cpu": names[0].split(": ")[1] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": str(jax.devices()[0]),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "versions": {module.__name__: module.__version__ for module in (jax, np)},
        "load_average": os.getloadavg(),
        "results": {x: dict(zip(("updates", "solutions"), y)) for x, y in seconds.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
