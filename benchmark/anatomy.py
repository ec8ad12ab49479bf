"""What a script spends its time on, how near that is to the limit, and how it grows.

The measurements of `speed.py --measure breakdown`, `limit`, `scaling` and `seeds`, generators of
numbers or of {line of the table: number}, and the figures.
"""

import math
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import speed

# Each axis alone, the other sizes at their defaults. Observation sizes are those of the suite.
AXES = {
    "batch_size": (64, 256, 1024, 4096),
    "hidden_width": (64, 256, 512, 1024, 2048),
    "num_seeds": (1, 2, 4, 8, 16),
    "updates_per_step": (1, 2, 5, 10, 20),
    "obs_dim": (5, 17, 24, 67),  # cartpole, cheetah, walker, humanoid
    "buffer_size": (10_000, 100_000, 1_000_000),
}
SEEDS = ("one seed", "--num-seeds 2", "two seeds, a device each", "two seeds, a process each")


def breakdown(script: str, steps: int):
    """Milliseconds of the host for each part of an environment step in the script's `main`.

    `learn` only dispatches: what is left of the update when the environment has been stepped shows
    up where the host waits, in the next action or in `insert`. There is one evaluation in `steps`.
    """
    module, args = speed.load(
        script, **speed.SIZES, **speed.NETS, learning_starts=speed.LEARNING_STARTS,
        eval_frequency=steps, run_dir="timed_run",
    )  # fmt: skip
    spent = {}

    def timed(part: str, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[part] = spent.get(part, 0) + time.perf_counter() - start

        return call

    import jax

    explore, step = module.explore, module.Environments.step

    def act(*arguments):
        return jax.block_until_ready(explore(*arguments))

    def environment(*arguments):
        if len(arguments) > 2:  # with the environments that are active: an evaluation
            return step(*arguments)
        spent["calls"] = calls = spent.get("calls", 0) + 1
        if calls == speed.FIRST:  # run_main has just started its clock
            spent.clear()
            spent["calls"] = calls
        return timed("environment", step)(*arguments)

    # The device works in order: waiting for the action here is waiting for the update before it.
    module.explore = timed("act, and waiting for the last update", act)
    module.learn = timed("dispatching the update", module.learn)
    module.insert = timed("insert", module.insert)
    module.evaluate = timed("evaluation", module.evaluate)
    for name in ("losses", "episode"):
        setattr(module.Log, name, timed("logging", getattr(module.Log, name)))
    module.Environments.step = environment
    while True:
        spent.clear()
        start, end = speed.run_main(module, args, (speed.FIRST, speed.FIRST + steps))
        spent.pop("calls")
        parts = {part: 1000 * seconds / steps for part, seconds in spent.items()}
        total = 1000 * (end - start) / steps
        yield parts | {"the rest of the loop": total - sum(parts.values()), "whole step": total}


def product_flops(jaxpr, period: int) -> float:
    """FLOPs of the matrix products in a jaxpr; a scan repeats them, a cond runs every period-th.

    XLA's own analysis counts the body of a loop once and a branch always.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":
            branches = [product_flops(x.jaxpr, period) for x in equation.params["branches"]]
            total += min(branches) + (max(branches) - min(branches)) / period
        else:
            for value in equation.params.values():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    total += equation.params.get("length", 1) * product_flops(inner, period)
    return total


def limit(script: str, updates: int):
    """Products of an update, their rate, and the rate of a bare product of the same sizes."""
    import jax
    import jax.numpy as jnp

    module, args = speed.load(script, **speed.SIZES, **speed.NETS)
    measurements = speed.our_updates(script, updates)
    arguments = jax.eval_shape(
        lambda: (
            module.init(np.array([0]), speed.OBS_DIM, speed.ACTION_DIM, args),
            module.make_buffer(speed.OBS_DIM, speed.ACTION_DIM, args),
        )
    )
    jaxpr = jax.make_jaxpr(partial(module.learn.__wrapped__, args=args))(*arguments)
    flops = product_flops(jaxpr.jaxpr, getattr(args, "policy_frequency", 1))
    repeats, width = 200, args.hidden_width
    matrices = jnp.full((2, width, width), 1 / width)

    @jax.jit
    def products(x, w):  # both critics' hidden layer on a minibatch, forward
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=repeats)[0]

    x = jnp.ones((2, args.batch_size, width))
    bare = speed.milliseconds(
        lambda: products(x, matrices).block_until_ready(), lambda: None, max(updates // 100, 1)
    )
    for milliseconds in measurements:
        rate = flops / milliseconds / 1e6
        bare_rate = repeats * 2 * x.size * width / next(bare) / 1e6
        yield {
            "MFLOP in the products of an update": flops / 1e6,
            "ms/update": milliseconds,
            "GFLOP/s in an update": rate,
            "GFLOP/s in a bare product": bare_rate,
            "% of the bare product's rate": 100 * rate / bare_rate,
        }


def scaling(script: str, axis: str, value: int, updates: int):
    """Milliseconds and peak memory of one call of `learn`, with one size changed."""
    obs_dim = value if axis == "obs_dim" else speed.OBS_DIM
    changes = {} if axis == "obs_dim" else {axis: value}
    calls = speed.our_updates(script, updates, obs_dim, **changes)
    for milliseconds in calls:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        yield {f"{axis} {value}, ms": milliseconds, f"{axis} {value}, GB": peak}


def seeds(script: str, updates: int, form: str):
    """Milliseconds of an update of one seed or of two side by side, in one of the forms SEEDS.

    With a device each, the seeds' axis is sharded over two devices of the CPU; with a process each,
    these are pinned to a core, and the time is that of the slower.
    """
    if form == "one seed":
        return speed.our_updates(script, updates)
    if form == "--num-seeds 2":
        return speed.our_updates(script, updates, num_seeds=2)
    return (
        on_two_devices(script, updates) if "device" in form else in_two_processes(script, updates)
    )


def on_two_devices(script: str, updates: int):
    """`learn` under `shard_map`, with a seed on each of two devices."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 2)
    module, args, state, buffer = speed.ready_to_learn(script, num_seeds=2)
    mesh = jax.sharding.Mesh(jax.devices("cpu"), "seed")
    split, copy = PartitionSpec("seed"), PartitionSpec()
    specs = (split, module.Buffer(rows=split, count=copy))
    learn = partial(module.learn.__wrapped__, args=args)
    learn = jax.shard_map(learn, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    state = jax.device_put(state, NamedSharding(mesh, split))
    rows = jax.device_put(buffer.rows, NamedSharding(mesh, split))
    buffer = module.Buffer(rows, jax.device_put(buffer.count, NamedSharding(mesh, copy)))
    return speed.learning_time(jax.jit(learn, donate_argnums=0), state, buffer, updates)


def in_two_processes(script: str, updates: int):
    """Two processes that learn at the same time, each with one seed on a core of its own."""
    code = f"import speed, sys; times = speed.our_updates({script!r}, {updates})\n"
    code += "for line in sys.stdin: print(next(times), flush=True)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    python = [sys.executable, "-c", code]
    cores = sorted(os.sched_getaffinity(0))[:2]
    pair = [subprocess.Popen(["taskset", "-c", str(x), *python], env=env, **pipes) for x in cores]
    while True:
        for process in pair:
            process.stdin.write("measure\n")
        yield max(float(process.stdout.readline()) for process in pair)


def sentence(measure: str, agent: str, values: dict[str, list]) -> str:
    """What a reader wants to know of these numbers."""
    x = {line: np.median(numbers) for line, numbers in values.items()}
    name = agent.upper()
    if measure == "limit":
        share = x["% of the bare product's rate"]
        return f"{name}: an update reaches {share:.0f} % of the rate of a bare product"
    if measure == "breakdown":
        total = x.pop("whole step")
        most = max(x, key=x.get)
        return (
            f"{name}: a step takes {total:.2f} ms, {100 * x[most] / total:.0f} % of it for {most}"
        )
    if measure == "seeds":
        times = {form: x[form] / x[SEEDS[0]] for form in SEEDS[1:]}
        return f"{name}: of one seed's time, " + ", ".join(f"{t:.2f} {f}" for f, t in times.items())
    times = []
    for axis, sizes in measured(values).items():
        gain = x[f"{axis} {sizes[-1]}, ms"] / x[f"{axis} {sizes[0]}, ms"]
        times.append(f"{axis} from {sizes[0]} to {sizes[-1]} {gain:.1f}x")
    return f"{name}: time grows with {', '.join(times)}"


def measured(values: dict[str, list]) -> dict:
    """The axes that were measured, with their sizes."""
    axes = {line.split()[0] for line in values}
    return {axis: sizes for axis, sizes in AXES.items() if axis in axes}


def figure(record: dict, path: Path):
    """Draws what was measured: bars, but for the growth with every size."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 7), layout="constrained")
    if record["measure"] == "scaling":
        growth(drawing, record["results"])
    elif record["measure"] != "limit":  # of many units
        drawing.set_figheight(0.8 + 0.45 * max(len(x) for x in record["results"].values()))
        bars(drawing, record)
    else:
        return
    drawing.savefig(path)


def bars(drawing, record: dict):
    """The median of each side, with a whisker from its best round to its worst."""
    results = record["results"]
    panels = drawing.subplots(1, len(results), squeeze=False)[0]
    for panel, (agent, values) in zip(panels, results.items()):
        medians = np.array([np.median(numbers) for numbers in values.values()])
        ends = np.array([(min(numbers), max(numbers)) for numbers in values.values()]).T
        colors = ["C0" if side.startswith("ours") else "0.7" for side in values]
        panel.barh(list(values), medians, color=colors)
        panel.errorbar(medians, list(values), xerr=abs(ends - medians), fmt="none", ecolor="0.3")
        panel.bar_label(panel.containers[0], fmt="%.3g", label_type="center")
        panel.invert_yaxis()
        panel.set(title=agent.upper(), xlabel=record["unit"])
        panel.spines[["top", "right"]].set_visible(False)


def growth(drawing, results: dict):
    """Time (solid) and peak memory (dotted) over each axis, with a line for each script."""
    axes = measured(next(iter(results.values())))
    panels = drawing.subplots(-(-len(axes) // 3), 3, squeeze=False, sharey=True).flat
    for spare in panels[len(axes) :]:
        spare.remove()
    for panel, (axis, sizes) in zip(panels, axes.items()):
        memory = panel.twinx()
        for agent, values in results.items():
            for where, unit, style in ((panel, "ms", "o-"), (memory, "GB", ":")):
                y = [np.median(values[f"{axis} {size}, {unit}"]) for size in sizes]
                where.plot(sizes, y, style, label=agent.upper())
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per call")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        memory.set(ylim=(0, None), ylabel="GB at peak (dotted)")
    handles, labels = panel.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=len(labels))
