"""What the temperature solvers of agents/mpo_*.py cost: milliseconds of an update with each.

    python benchmark/solvers.py

Times `learn`, a minibatch from the buffer and one update on it, with the default flags and
`--temperature-solver` newton, slsqp or gradient; "none" is the same update with fixed temperatures.
All four take turns in one process. The difference to "none" is what a solver costs; since that is
less than the noise of whole updates, the two solutions of an update are also timed by themselves.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import speed
import tyro

SOLVERS = ("newton", "slsqp", "gradient", "none")


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the temperature solvers of MPO."""

    script: Literal["mpo_dmc", "mpo_gym"] = "mpo_dmc"  # whose default flags
    repeats: int = 10  # rounds, in each of which every solver is measured once
    updates: int = 100  # timed updates of a round
    out: Path = speed.ROOT / "benchmark" / "results" / "mpo-solvers.json"  # file of raw numbers


def learner(args: Args, solver: str):
    """Two functions of a count: they do so many updates, or solve as often as these do."""
    flags = {} if solver == "none" else {"temperature_solver": solver}
    script = speed.ROOT / "agents" / f"{args.script}.py"
    module, flags, state, buffer = speed.ready_to_learn(script, **flags)
    if solver == "none":
        module.solve_temperature = lambda q, epsilon, dual, args: jnp.float32(1)
    key = jax.random.key(1)

    def learn(updates: int):
        nonlocal state
        for _ in range(updates):
            state, _ = module.learn(state, buffer, key, flags)
        jax.block_until_ready(state)

    @jax.jit
    def both(q, cost):
        problems = (q, flags.epsilon), (cost, flags.epsilon_penalty)
        return [module.solve_temperature(*problem, jnp.float32(1), flags) for problem in problems]

    shape = (flags.action_samples, flags.batch_size, 1 + speed.ACTION_DIM)
    noise = jax.random.normal(jax.random.key(0), shape)
    q, cost = noise[..., 0], module.penalty(noise[..., 1:])

    def solve(updates: int):
        for _ in range(updates):
            jax.block_until_ready(both(q, cost))

    return learn, solve


def main(args: Args):
    """Prints the table, and writes every number to a file."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the script does for slsqp
    record = speed.surroundings() | {"args": vars(args) | {"out": str(args.out)}}
    sides = {solver: learner(args, solver) for solver in SOLVERS}
    times = {solver: {"updates": [], "solutions": []} for solver in SOLVERS}
    for functions in sides.values():
        for function in functions:
            function(args.updates // 4)  # compiles, and lets the values differ between samples
    for _ in range(args.repeats):
        for solver, functions in sides.items():
            for function, values in zip(functions, times[solver].values()):
                start = time.perf_counter()
                function(args.updates)
                values.append(1000 * (time.perf_counter() - start) / args.updates)
    print("| temperature solver | ms/update | its two solutions alone | share |")
    print("|---|---|---|---|")
    for solver, values in times.items():
        updates, alone = values["updates"], np.mean(values["solutions"])
        print(f"| {solver} | {np.mean(updates):.2f} ± {np.std(updates):.2f} ", end="")
        print(f"| {alone:.2f} | {alone / np.mean(updates):.1%} |")
    args.out.write_text(json.dumps(record | {"results": times}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
