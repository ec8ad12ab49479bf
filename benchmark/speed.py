"""How fast the scripts in agents/ are, beside Stable-Baselines3 (PyTorch), SBX (JAX) and PyTorch.

    python benchmark/speed.py --measure updates    # milliseconds per gradient update
    python benchmark/speed.py --measure updates --against ../before/agents   # two states of ours
    python benchmark/speed.py --measure steps      # environment steps per second of whole runs
    python benchmark/speed.py --measure breakdown  # where the time of an environment step goes
    python benchmark/speed.py --measure parts      # where the time of an update goes

Every side is a process of its own, so that PyTorch's threads and JAX's do not meet. The processes
stay alive and measure one after the other, round by round, so that what disturbs the machine
disturbs all sides. The tables show medians over the rounds; every number goes to a JSON file, and
--show makes the tables of that file again. Linux only.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
RIVALS = {  # --rivals -> the module that it needs, and its name in the tables
    "stable_baselines3": ("stable_baselines3", "Stable-Baselines3"),
    "sbx": ("sbx", "SBX"),
    "eager": ("torch", "PyTorch"),  # torch_updates.py
    "compile": ("torch", "PyTorch, torch.compile"),
}
UNITS = {"updates": "ms/update", "steps": "environment steps/s", "breakdown": "ms of a step"}
UNITS["parts"] = "ms of an update"
BARE, PRODUCTS = "bare product, GFLOP/s", "MFLOP in the products of an update"
# Every side gets these sizes, on HalfCheetah-v5.
SIZES = {"buffer_size": 1_000_000, "batch_size": 256}
WIDTH, OBS_DIM, ACTION_DIM = 256, 17, 6
FILLED, WARM_UPDATES = 50_000, 20  # random transitions in the buffer, then untimed updates
LEARNING_STARTS, FIRST = 1_000, 1_500  # random steps; the step at which the clock starts
REST = 0.5  # seconds after each measurement, in which its threads go to sleep


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the scripts in agents/ beside other implementations."""

    measure: Literal[tuple(UNITS)]  # what to measure
    agents: tuple[str, ...] = ("sac", "td3", "mpo")  # algorithms
    rivals: tuple[Literal[tuple(RIVALS)], ...] = tuple(RIVALS)  # whom to measure beside us
    against: Path | None = None  # another folder of scripts, to measure beside agents/
    repeats: int = 7  # rounds, in each of which every side measures once
    updates: int = 500  # timed updates of a round, for --measure updates and parts
    steps: int = 5_000  # timed environment steps of a round, for --measure steps and breakdown
    out: Path | None = None  # file of raw numbers; default benchmark/results/speed-{measure}.json
    show: bool = False  # measure nothing; tables and sentence from the file of raw numbers


def milliseconds(call, wait, count: int):
    """Time per call, again and again, each time after a few calls that are not timed."""
    while True:
        for n in (min(WARM_UPDATES, count), count):
            wait()
            start = time.perf_counter()
            for _ in range(n):
                call()
            wait()
        yield 1000 * (time.perf_counter() - start) / count


# --- our side -------------------------------------------------------------------------------------


def load(script: Path, **changes):
    """The module of a script and its default flags, but for the changes."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.Args(**changes)


def ready_to_learn(script: Path, **changes):
    """The script's module, its flags, a state, and a buffer of random transitions."""
    import jax

    module, args = load(script, **SIZES | changes)
    state = module.init(jax.random.key(0), OBS_DIM, ACTION_DIM, args)
    buffer, rng = module.make_buffer(OBS_DIM, ACTION_DIM, args), np.random.default_rng(0)
    filled = min(FILLED, args.buffer_size)
    rows = [rng.uniform(-1, 1, (filled, *x.shape[1:])) for x in buffer.data]
    data = module.Batch(*(x.at[:filled].set(y) for x, y in zip(buffer.data, rows)))
    return module, args, state, buffer._replace(data=data, count=buffer.count + filled)


def our_updates(script: Path, updates: int, **changes):
    """Times the script's `learn`: a minibatch drawn from the buffer and one update on it."""
    import jax

    module, args, state, buffer = ready_to_learn(script, **changes)
    key = jax.random.key(1)

    def call():
        nonlocal state
        state, _ = module.learn(state, buffer, key, args)

    return milliseconds(call, lambda: jax.block_until_ready(state), updates)


def product_flops(jaxpr, period: int) -> float:
    """FLOPs of the matrix products in a jaxpr; a scan repeats them, a cond runs every period-th.

    XLA's own analysis counts the body of a loop once and a branch always.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":
            branches = [product_flops(x.jaxpr, period) for x in equation.params["branches"]]
            total += min(branches) + (max(branches) - min(branches)) / period
        else:
            for value in equation.params.values():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    total += equation.params.get("length", 1) * product_flops(inner, period)
    return total


def bare_product(script: Path, updates: int):
    """The rate of a product of an update's sizes with nothing around it, and an update's FLOPs."""
    import jax
    import jax.numpy as jnp

    module, args = load(script, **SIZES)
    shapes = jax.eval_shape(
        lambda key: (
            module.init(key, OBS_DIM, ACTION_DIM, args),
            module.make_buffer(OBS_DIM, ACTION_DIM, args),
            key,
        ),
        jax.random.key(0),
    )
    jaxpr = jax.make_jaxpr(partial(module.learn.__wrapped__, args=args))(*shapes)
    flops = product_flops(jaxpr.jaxpr, getattr(args, "policy_frequency", 1))
    x, w = jnp.ones((2, args.batch_size, WIDTH)), jnp.full((2, WIDTH, WIDTH), 1 / WIDTH)

    @jax.jit
    def products(x):  # both critics' hidden layer on a minibatch, forward, 200 times
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=200)[0]

    once = products(x).block_until_ready
    times = milliseconds(lambda: products(x).block_until_ready(), once, max(updates // 100, 1))
    for time_of_200 in times:
        yield {BARE: 200 * 2 * x.size * WIDTH / time_of_200 / 1e6, PRODUCTS: flops / 1e6}


def run_main(module, args, marks: tuple, begins=lambda: None) -> list[float]:
    """Runs the script's `main` up to the last mark; returns when the steps at the marks began.

    A step begins when its action has arrived on the host, so the updates of all earlier steps are
    done and its own has just been dispatched: the same at every mark.
    """
    original, training, times = module.Interface.step, [], []

    class Stop(Exception):
        pass

    def step(self, action):
        if not training or self is training[0]:  # environments of evaluations step later than this
            training.append(self)
            if len(training) in marks:
                times.append(time.time())
            if len(training) == marks[0]:
                begins()
            if len(training) == marks[-1]:
                raise Stop
        return original(self, action)

    module.Interface.step = step
    shutil.rmtree(args.run_dir, ignore_errors=True)
    try:
        module.main(args)
    except Stop:
        return times
    finally:
        module.Interface.step = original


def run_args(script: Path, **changes):
    """The module and the flags of a timed run."""
    run = {"env_id": "HalfCheetah-v5", "learning_starts": LEARNING_STARTS, "run_dir": "timed_run"}
    return load(script, **SIZES | run | changes)


def our_steps(script: Path, steps: int):
    """Steps per second of the script's `main`: act, step, insert, learn and log."""
    module, args = run_args(script, eval_frequency=0)
    while True:
        start, end = run_main(module, args, (FIRST, FIRST + steps))
        yield steps / (end - start)


def parts(script: Path, updates: int):
    """Milliseconds for each part of an update compiled alone, and for the whole, which fuses them.

    The script's `update` runs step by step; what it hands to `gradient_step` is then compiled, the
    gradient and the optimiser's step, and so is `sample`. The rest is targets, slow networks, and
    for MPO the E-step.
    """
    import jax

    module, args, state, buffer = ready_to_learn(script)
    sample = jax.jit(module.sample, static_argnames="args")
    key, period = jax.random.key(1), getattr(args, "policy_frequency", 1)
    calls = {"handing the state to a function and back": partial(jax.jit(lambda x: x), state)}
    calls["minibatch"] = partial(sample, buffer, key, args)
    original, batch = module.gradient_step, calls["minibatch"]()

    def recorded(train_state, loss, *inputs):
        arrays, rest = [x for x in inputs if x is not args], [args] if args in inputs else []
        grads = jax.jit(lambda p, x: jax.grad(loss, has_aux=True)(p, *x, *rest)[0])
        step = jax.jit(lambda x, grads: x.apply_gradients(grads=grads))
        calls[f"gradient of {loss.__name__}"] = partial(grads, train_state.params, arrays)
        calls[f"step on {loss.__name__}"] = partial(step, train_state, train_state.params)
        return original(train_state, loss, *inputs)

    module.gradient_step = recorded
    with jax.disable_jit():
        for _ in range(period):
            state, _ = module.update(state, batch, key, args)
    wait = partial(jax.block_until_ready, None)
    timers = {
        part: milliseconds(lambda call=call: jax.block_until_ready(call()), wait, updates)
        for part, call in calls.items()
    }
    whole = our_updates(script, updates)
    while True:
        times = {part: next(x) / (period if "actor" in part else 1) for part, x in timers.items()}
        total = next(whole)
        yield times | {"the rest": total - sum(times.values()), "whole update": total}


def breakdown(script: Path, steps: int):
    """Milliseconds of the host for each part of an environment step in the script's `main`.

    `learn` only dispatches: what is left of the update when the environment has been stepped shows
    up where the host waits, in the next action or in `insert`. There is one evaluation in `steps`.
    """
    import jax

    module, args = run_args(script, eval_frequency=steps)
    spent, nested = {}, []

    def timed(part: str, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            nested.append(part)
            try:
                return function(*arguments, **keywords)
            finally:
                nested.pop()
                if not nested:  # an evaluation's steps are the evaluation's
                    spent[part] = spent.get(part, 0) + time.perf_counter() - start

        return call

    # The device works in order: waiting for the action here is waiting for the update before it.
    explore, writer = module.explore, module.SummaryWriter
    waiting = timed("acting, and waiting for the last update", jax.block_until_ready)
    module.explore = lambda *arguments: waiting(explore(*arguments))
    module.learn = timed("dispatching the update", module.learn)
    module.insert = timed("insert", module.insert)
    module.evaluate = timed("evaluation", module.evaluate)
    module.Interface.step = timed("environment", module.Interface.step)
    writer.add_scalar = timed("logging", writer.add_scalar)
    while True:
        start, end = run_main(module, args, (FIRST, FIRST + steps), spent.clear)
        parts = {part: 1000 * seconds / steps for part, seconds in spent.items()}
        total = 1000 * (end - start) / steps
        yield parts | {"the rest of the loop": total - sum(parts.values()), "whole step": total}


# --- the other side -------------------------------------------------------------------------------


def rival(library: str, agent: str):
    """A model of Stable-Baselines3 or SBX on HalfCheetah-v5."""
    import jax
    import torch
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.noise import NormalActionNoise

    package = importlib.import_module(library)
    noise = NormalActionNoise(np.zeros(ACTION_DIM), np.full(ACTION_DIM, 0.1))
    model = getattr(package, agent.upper())(
        "MlpPolicy", "HalfCheetah-v5", learning_rate=3e-4, train_freq=1, gradient_steps=1,
        learning_starts=LEARNING_STARTS, policy_kwargs={"net_arch": [WIDTH, WIDTH]}, seed=0,
        action_noise=noise if agent == "td3" else None, **SIZES,
    )  # fmt: skip
    model.set_logger(configure("rival_run", ["csv"]))  # a file, as we have one

    def wait():  # until all that the model has dispatched is done
        if library == "sbx":
            jax.block_until_ready((model.policy.actor_state, model.policy.qf_state))
        elif torch.cuda.is_available():
            torch.cuda.synchronize()

    return model, wait


def rival_updates(library: str, agent: str, updates: int):
    """Times the library's `train` with one gradient step, which fetches the losses of each."""
    model, wait = rival(library, agent)
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    for x in (buffer.observations, buffer.actions, buffer.rewards, buffer.next_observations):
        x[:FILLED] = rng.uniform(-1, 1, x[:FILLED].shape)
    buffer.pos = FILLED
    train = partial(model.train, gradient_steps=1, batch_size=SIZES["batch_size"])
    return milliseconds(train, wait, updates)


def rival_steps(library: str, agent: str, steps: int):
    """Steps per second of the library's `learn`, clocked by its callback after each step."""
    marks = (FIRST, FIRST + steps)

    def clock(*_) -> bool:
        if model.num_timesteps in marks:
            wait()
            times.append(time.time())
        return model.num_timesteps < marks[1]

    while True:
        times = []
        model, wait = rival(library, agent)
        model.learn(1_000_000, callback=clock)
        yield steps / (times[1] - times[0])
        del model, wait  # the buffer goes before the next one comes


def torch_updates(mode: str, agent: str, updates: int):
    """Times our update in plain PyTorch, and its compiled form, as `our_updates` times ours."""
    import torch

    learners = importlib.import_module("torch_updates")
    _, args = load(ROOT / "agents" / f"{agent}_gym.py", **SIZES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner = getattr(learners, agent.upper())(OBS_DIM, ACTION_DIM, args, device)
    buffer = learners.Buffer(OBS_DIM, ACTION_DIM, args, device)
    for x in buffer.data:
        x[:FILLED].uniform_(-1, 1)
    update = torch.compile(learner.update) if mode == "compile" else learner.update
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return milliseconds(lambda: update(buffer.sample(FILLED)), wait, updates)


# --- rounds ---------------------------------------------------------------------------------------


def worker(connection, folder: str, name: str, arguments: list):
    """Runs the generator `name` in this process, one measurement for each message."""
    os.chdir(folder)  # for run directories
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        measurements = None
        while connection.recv():
            measurements = measurements or globals()[name](*arguments)  # when it is our turn
            connection.send(next(measurements))
    except BaseException:
        connection.send(Path("log.txt").read_text()[-4000:] + traceback.format_exc())


def spent(before=0.0) -> np.ndarray:
    """Time of all cores: user, nice, system, idle, waiting for disks, two of interrupts, stolen."""
    return np.array(Path("/proc/stat").read_text().split("\n")[0].split()[1:], float) - before


def busy_cores(seconds: float) -> float:
    """How many cores of this machine are at work in so many seconds, on average."""
    before = spent()
    time.sleep(seconds)
    times = spent(before)
    return os.cpu_count() * (1 - times[3:5].sum() / max(times.sum(), 1))


def alternate(sides: dict[str, tuple], repeats: int) -> tuple[dict, float]:
    """The numbers of each side, measured in turn, and the cores that others kept busy.

    These are the median between the measurements, or if it is more what the host of a virtual
    machine took away meanwhile.
    """
    context = multiprocessing.get_context("spawn")
    values, busy, workers, before = {}, [], {}, spent()
    with tempfile.TemporaryDirectory() as folder:
        for side, (name, *arguments) in sides.items():
            here, there = context.Pipe()
            options = (there, tempfile.mkdtemp(dir=folder), name, arguments)
            process = context.Process(target=worker, args=options, daemon=True)
            process.start()
            there.close()
            workers[side] = process, here
        for i, (side, (_, connection)) in itertools.product(range(repeats), workers.items()):
            connection.send(True)
            if isinstance(answer := connection.recv(), str):
                sys.exit(f"{side} failed:\n{answer}")
            for line, number in (answer if isinstance(answer, dict) else {side: answer}).items():
                values.setdefault(line, []).append(number)
                print(f"round {i + 1}, {line}: {number:.4g}", file=sys.stderr, flush=True)
            time.sleep(REST / 2)
            busy.append(busy_cores(REST / 2))
        for process, connection in workers.values():
            connection.send(False)
            process.join()
    times = spent(before)
    return values, max(statistics.median(busy), os.cpu_count() * times[7] / times.sum())


def sides_of(args: Args, agent: str) -> dict[str, tuple]:
    """Whom to measure: the name in the table -> a generator function and its arguments."""
    script = ROOT / "agents" / f"{agent}_gym.py"
    if args.measure in ("breakdown", "parts"):
        count = args.steps if args.measure == "breakdown" else args.updates
        return {args.measure: (args.measure, script, count)}
    ours, count = f"our_{args.measure}", getattr(args, args.measure)
    sides = {"ours": (ours, script, count)}
    if args.against:
        sides[str(args.against)] = (ours, args.against.resolve() / script.name, count)
    if args.measure == "updates":
        if agent != "mpo":  # its defaults are the same
            dmc = script.with_name(f"{agent}_dmc.py")
            sides["ours, dmc defaults"] = (ours, dmc, count)
        sides[BARE] = ("bare_product", script, count)
    for name in args.rivals:
        module, side = RIVALS[name]
        if module == "torch" and args.measure == "steps" or module != "torch" and agent == "mpo":
            continue  # torch_updates.py has no whole runs, and they have no MPO
        if not importlib.util.find_spec(module):
            print(f"{side} is left out: {module} is not installed.", file=sys.stderr)
        elif module == "torch":
            sides[side] = ("torch_updates", name, agent, count)
        else:
            sides[side] = (f"rival_{args.measure}", name, agent, count)
    return sides


def summarize(measure: str, agent: str, values: dict[str, list]) -> str:
    """Prints a table with a line for each side; returns a clause of the closing sentence."""
    values = dict(values)
    bare = statistics.median(values.pop(BARE, [math.nan]))
    flops = values.pop(PRODUCTS, [math.nan])[0]
    header = f"{f'{agent.upper()}, {UNITS[measure]}':42}  median    mean ± std"
    if measure in ("updates", "steps"):
        header += "      ours is x times as fast (all rounds)"
    print(header + ("   GFLOP/s, % of bare" if measure == "updates" else ""))
    clause = []
    for side, numbers in values.items():
        median, std = statistics.median(numbers), np.std(numbers, ddof=len(numbers) > 1)
        line = f"{side:42}{median:8.2f}{np.mean(numbers):8.2f} ± {std:<8.2f}"
        if measure in ("updates", "steps"):
            sign = -1 if measure == "updates" else 1  # milliseconds, or steps per second
            gains = (np.array(values["ours"]) / numbers) ** sign
            gain = (statistics.median(values["ours"]) / median) ** sign
            line += f"{gain:8.2f} ({min(gains):.2f} to {max(gains):.2f})        "
            clause.append(
                f"{gain:.1f}x {side}" if side != "ours" else f"{median:.2f} {UNITS[measure]}"
            )
        if measure == "updates":
            line += f"{flops / median:8.0f} {100 * flops / median / bare:6.0f} %"
        print(line)
    if measure == "updates":
        print(f"{flops:.0f} MFLOP in the products of an update; bare product {bare:.0f} GFLOP/s")
    print(flush=True)
    return f"{agent.upper()}: " + ", ".join(clause)


def surroundings() -> dict:
    """Date, commit, versions and machine, for the files of raw numbers."""
    packages = "jax jaxlib flax optax numpy gymnasium mujoco torch stable_baselines3 sbx_rl".split()
    installed = {x.name.replace("-", "_"): x.version for x in importlib.metadata.distributions()}
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    describe = f"git -C {ROOT} describe --always --dirty --abbrev=40".split()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "cpu": names[0].split(": ")[1] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": shutil.which("nvidia-smi") and subprocess.getoutput("nvidia-smi -L"),
        "environment": {x: os.environ.get(x) for x in ("OMP_NUM_THREADS", "XLA_FLAGS")},
        "load_average_at_start": os.getloadavg(),
        "busy_cores_at_start": busy_cores(2),
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in packages},
    }


def run(args: Args, out: Path) -> dict:
    """Measures; returns and after each algorithm writes the raw numbers, and how they were made."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share one GPU
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "show")}
    flags["against"] = args.against and args.against.name
    record = {"measure": args.measure, "args": flags, **surroundings()}
    record |= {"busy_cores_meanwhile": {}, "results": {}}
    for agent in args.agents:
        values, busy = alternate(sides_of(args, agent), args.repeats)
        record["results"][agent], record["busy_cores_meanwhile"][agent] = values, busy
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
    return record


def main(args: Args):
    """Measures and writes the raw numbers; prints a table for each algorithm and a sentence."""
    out = args.out or ROOT / "benchmark" / "results" / f"speed-{args.measure}.json"
    if args.show and not out.exists():
        print(f"--out {out} is not there; without --show it is measured.", file=sys.stderr)
        sys.exit(2)
    record = json.loads(out.read_text()) if args.show else run(args, out)
    results = record["results"]
    clauses = [summarize(record["measure"], agent, values) for agent, values in results.items()]
    busy = max(record["busy_cores_at_start"], *record["busy_cores_meanwhile"].values())
    if busy > 0.2:
        sys.exit(f"Not a result: others kept {busy:.1f} cores busy. Measure on an idle machine.")
    if record["measure"] in ("updates", "steps"):
        print("; ".join(clauses))


if __name__ == "__main__":
    main(tyro.cli(Args))
