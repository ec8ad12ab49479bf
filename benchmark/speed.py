"""How fast the scripts in agents/ are, beside Stable-Baselines3 (PyTorch) and SBX (JAX).

    python benchmark/speed.py --measure updates   # milliseconds per gradient update
    python benchmark/speed.py --measure steps     # environment steps per second of whole runs
    python benchmark/speed.py --measure memory    # peak memory with a buffer of 1M transitions
    python benchmark/speed.py --measure startup   # seconds from the command to the first step
    python benchmark/speed.py --measure breakdown # where the time of an environment step goes
    python benchmark/speed.py --measure limit     # how near an update is to the matrix rate
    python benchmark/speed.py --measure scaling   # how time and memory grow with every size
    python benchmark/speed.py --measure seeds     # what two seeds take, in one process and in two

Every side is a process of its own, so that PyTorch's threads and JAX's do not meet. The processes
stay alive and measure one after the other, round by round, so that what disturbs the machine
disturbs all sides. The tables and figures show medians over the rounds; every number goes to a JSON
file, and --show makes table and figure of that file again.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import resource
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
import psutil
import tyro

ROOT = Path(__file__).resolve().parents[1]
RIVALS = {"stable_baselines3": "Stable-Baselines3", "sbx": "SBX"}  # modules
TORCH = {"eager": "PyTorch", "compile": "PyTorch, torch.compile"}  # torch_updates.py
UNITS = {
    "updates": "ms/update = s per 1000 updates",
    "steps": "environment steps/s",
    "memory": "GB at peak",
    "startup": "s to the first step",
    "breakdown": "ms per environment step",
    "limit": "products of an update",
    "scaling": "one call of learn",
    "seeds": "ms/update",
}
# Every side gets these sizes, the defaults of sac_gym.py and td3_gym.py, on HalfCheetah-v5.
SIZES = {"buffer_size": 1_000_000, "batch_size": 256}
NETS = {"hidden_width": 256, "hidden_layers": 2}
OBS_DIM, ACTION_DIM = 17, 6
FILLED, WARM_UPDATES = 50_000, 20  # random transitions in the buffer, then untimed updates
LEARNING_STARTS, FIRST = 1_000, 1_500  # random steps; the step at which the clock starts
GROWING = ("batch_size", "hidden_width", "num_seeds", "updates_per_step")
Axis = Literal[(*GROWING, "obs_dim", "buffer_size")]
REST = 0.5  # seconds after each measurement, in which its threads go to sleep


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures the scripts in agents/ beside Stable-Baselines3 and SBX."""

    measure: Literal[tuple(UNITS)]  # what to measure
    agents: tuple[str, ...] = ("sac", "td3", "mpo")  # algorithms
    rivals: tuple[str, ...] = (*RIVALS, *TORCH)  # whom to measure beside us, where they can
    repeats: int = 7  # rounds, in each of which every side measures once
    updates: int = 500  # timed updates of a round, for --measure updates, limit, scaling, seeds
    steps: int = 5_000  # timed environment steps of a round, for --measure steps and breakdown
    axes: tuple[Axis, ...] = ()  # sizes to change one by one, for --measure scaling; default all
    out: Path | None = None  # file of raw numbers; default benchmark/results/speed-{measure}.json
    show: bool = False  # measure nothing; table, sentence and figure from the file of raw numbers


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


def load(script: str, **changes):
    """The module agents/{script}.py and its default flags, but for the changes."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "agents" / f"{script}.py")
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, dataclasses.replace(module.Args(), **changes)


def ready_to_learn(script: str, obs_dim: int = OBS_DIM, **changes):
    """The script's module, its flags, a state, and a buffer of random transitions."""
    module, args = load(script, **SIZES | NETS | changes)
    state = module.init(np.arange(args.num_seeds), obs_dim, ACTION_DIM, args)
    buffer = module.make_buffer(obs_dim, ACTION_DIM, args)
    filled = args.buffer_size if "buffer_size" in changes else FILLED  # then every row is drawn
    rows = np.random.default_rng(0).uniform(-1, 1, (filled, buffer.rows.shape[-1]))
    buffer = buffer._replace(rows=buffer.rows.at[:, :filled].set(rows), count=buffer.count + filled)
    return module, args, state, buffer


def our_updates(script: str, updates: int, obs_dim: int = OBS_DIM, **changes):
    """Times the script's `learn`: a minibatch drawn from the buffer and one update on it."""
    module, args, state, buffer = ready_to_learn(script, obs_dim, **changes)
    return learning_time(
        lambda state, buffer: module.learn(state, buffer, args), state, buffer, updates
    )


def learning_time(learn, state, buffer, updates: int):
    """Milliseconds of `learn(state, buffer) -> (state, metrics)`."""
    import jax

    def call():
        nonlocal state
        state, _ = learn(state, buffer)

    return milliseconds(call, lambda: jax.block_until_ready((state, buffer)), updates)


def bfloat16_updates(script: str, updates: int):
    """The same with --bfloat16."""
    return our_updates(script, updates, bfloat16=True)


def run_main(module, args, marks: tuple) -> list[float]:
    """Runs the script's `main` up to the last mark; returns when the steps at the marks began.

    A step begins when its action has arrived on the host, so the updates of all earlier steps are
    done and its own has just been dispatched: the same at every mark.
    """
    original, training, times = module.Environments.step, [], []

    class Stop(Exception):
        pass

    def step(self, *arguments):
        if not training or self is training[0]:  # environments of evaluations step later than these
            training.append(self)
            if len(training) in marks:
                times.append(time.time())
            if len(training) == marks[-1]:
                raise Stop
        return original(self, *arguments)

    module.Environments.step = step
    shutil.rmtree(args.run_dir, ignore_errors=True)
    try:
        module.main(args)
    except Stop:
        return times
    finally:
        module.Environments.step = original


def our_steps(script: str, steps: int):
    """Steps per second of the script's `main`: act, step, insert, learn and log."""
    run = {"learning_starts": LEARNING_STARTS, "eval_frequency": 0, "run_dir": "timed_run"}
    module, args = load(script, **SIZES, **NETS, **run)
    marks = (FIRST, FIRST + steps)
    while True:
        start, end = run_main(module, args, marks)
        yield steps / (end - start)


def peak_memory(script: str, start: float):
    """Prints the peak of this process, in which a run with default flags learns for 300 steps."""
    module, args = load(script, env_id="cheetah-run", run_dir="memory_run")
    assert args.total_timesteps >= args.buffer_size == SIZES["buffer_size"]  # its full size
    run_main(module, args, (args.learning_starts + 300,))
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9)


def first_step(script: str, start: float):
    """Prints the seconds from start to the first environment step of a run with default flags."""
    module, _ = load(script)
    args = tyro.cli(module.Args, args=["--run-dir", "startup_run"])
    print(run_main(module, args, (1,))[0] - start)


def in_new_python(function: str, script: str):
    """What one of the two functions above prints, each time in a new process."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    while True:
        code = f"import speed; speed.{function}({script!r}, {time.time()})"
        output = subprocess.check_output([sys.executable, "-c", code], env=env)
        yield float(output.split()[-1])


# --- the other side -------------------------------------------------------------------------------


def rival(library: str, agent: str):
    """A model of Stable-Baselines3 or SBX on HalfCheetah-v5."""
    import jax
    import torch
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.noise import NormalActionNoise

    package = importlib.import_module(library)
    noise = NormalActionNoise(np.zeros(ACTION_DIM), np.full(ACTION_DIM, 0.1))
    nets = {"net_arch": [NETS["hidden_width"]] * NETS["hidden_layers"]}
    model = getattr(package, agent.upper())(
        "MlpPolicy", "HalfCheetah-v5", learning_rate=3e-4, train_freq=1, gradient_steps=1,
        learning_starts=LEARNING_STARTS, policy_kwargs=nets, seed=0,
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
    _, args = load(f"{agent}_gym", **SIZES, **NETS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner = getattr(learners, agent.upper())(OBS_DIM, ACTION_DIM, args, device)
    rows = torch.zeros(SIZES["buffer_size"], 2 * OBS_DIM + ACTION_DIM + 3, device=device)
    rows[:FILLED].uniform_(-1, 1)
    buffer = learners.Buffer(rows, OBS_DIM, args)
    update = torch.compile(learner.update) if mode == "compile" else learner.update
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return milliseconds(lambda: update(buffer.sample(FILLED)), wait, updates)


def find(name: str):
    """A function of this module, or of another one in this folder if its name has a dot."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function) if module else globals()[name]


def worker(connection, folder: str, name: str, arguments: list):
    """Runs the generator `name` in this process, one measurement for each message."""
    os.chdir(folder)  # for run directories
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        measurements = None
        while connection.recv():
            measurements = measurements or find(name)(*arguments)  # set up when it is our turn
            connection.send(next(measurements))
    except BaseException:
        connection.send(Path("log.txt").read_text()[-4000:] + traceback.format_exc())


def alternate(sides: dict[str, tuple], repeats: int) -> tuple[dict, float]:
    """The numbers of each side, measured in turn, and the cores that others kept busy (median)."""
    context = multiprocessing.get_context("spawn")
    values, busy, workers = {}, [], {}
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
            busy.append(psutil.cpu_percent(interval=REST / 2) / 100 * psutil.cpu_count())
        for process, connection in workers.values():
            connection.send(False)
            process.join()
    return values, statistics.median(busy)


def sides_of(args: Args, agent: str) -> dict[str, tuple]:
    """Whom to measure: the name in the table -> a generator function and its arguments."""
    if args.measure == "memory":
        return {f"{agent}_dmc": ("in_new_python", "peak_memory", f"{agent}_dmc")}
    if args.measure == "startup":
        return {x: ("in_new_python", "first_step", x) for x in (f"{agent}_dmc", f"{agent}_gym")}
    if args.measure == "breakdown":
        return {"breakdown": ("anatomy.breakdown", f"{agent}_gym", args.steps)}
    if args.measure == "limit":
        return {"limit": ("anatomy.limit", f"{agent}_gym", args.updates)}
    if args.measure == "seeds":
        forms = importlib.import_module("anatomy").SEEDS
        return {x: ("anatomy.seeds", f"{agent}_gym", args.updates, x) for x in forms}
    if args.measure == "scaling":
        sizes = importlib.import_module("anatomy").AXES
        # Where a call grows with the size, as many fewer of them.
        counts = {
            (axis, size): args.updates * (sizes[axis][0] if axis in GROWING else size) // size
            for axis in args.axes or sizes
            for size in sizes[axis]
        }
        measure = ("anatomy.scaling", f"{agent}_gym")
        return {f"{x} {n}": (*measure, x, n, max(count, 3)) for (x, n), count in counts.items()}
    count = getattr(args, args.measure)
    sides = {"ours": (f"our_{args.measure}", f"{agent}_gym", count)}
    if args.measure == "updates" and agent != "mpo":  # its defaults are the same
        sides["ours, dmc defaults"] = ("our_updates", f"{agent}_dmc", count)
    if args.measure == "updates":
        sides["ours, --bfloat16"] = ("bfloat16_updates", f"{agent}_gym", count)
    for rival in args.rivals:
        if rival in RIVALS and agent in ("sac", "td3"):
            sides[RIVALS[rival]] = (f"rival_{args.measure}", rival, agent, count)
        if rival in TORCH and args.measure == "updates":
            sides[TORCH[rival]] = ("torch_updates", rival, agent, count)
    return sides


def summarize(measure: str, agent: str, values: dict[str, list]) -> str:
    """Prints a table with a line for each side; returns a clause of the closing sentence."""
    print(f"{f'{agent.upper()}, {UNITS[measure]}':40}  median    mean ± std", end="")
    print("    ours is x times as fast (all rounds)" if "ours" in values else "")
    clause = []
    for side, numbers in values.items():
        median, std = statistics.median(numbers), np.std(numbers, ddof=len(numbers) > 1)
        print(f"{side:40}{median:8.2f}{np.mean(numbers):8.2f} ± {std:<7.2f}", end="")
        if not set(values) & {*RIVALS.values(), *TORCH.values()}:  # nobody to compare with
            clause.append(f"{side} {median:.2f} {UNITS[measure]}")
        if side in (*RIVALS.values(), *TORCH.values()):
            sign = -1 if measure == "updates" else 1  # milliseconds, or steps per second
            gains = (np.array(values["ours"]) / numbers) ** sign
            gain = (statistics.median(values["ours"]) / median) ** sign
            print(f"{gain:7.2f} ({min(gains):.2f} to {max(gains):.2f})", end="")
            clause.append(f"{gain:.1f}x {side}")
        print()
    print(flush=True)
    if measure in ("breakdown", "limit", "scaling", "seeds"):
        return importlib.import_module("anatomy").sentence(measure, agent, values)
    return (f"{agent.upper()}: " if "ours" in values else "") + ", ".join(clause)


def run(args: Args, out: Path) -> dict:
    """Measures; returns and after each algorithm writes the raw numbers, and how they were made."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share one GPU
    packages = "jax jaxlib flax optax numpy gymnasium mujoco torch stable_baselines3 sbx_rl".split()
    installed = {x.name.replace("-", "_"): x.version for x in importlib.metadata.distributions()}
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    describe = f"git -C {ROOT} describe --always --dirty --abbrev=40".split()
    record = {
        "measure": args.measure,
        "unit": UNITS[args.measure],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "args": {k: v for k, v in vars(args).items() if k not in ("out", "show")},
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "cpu": names[0].split(": ")[1] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": shutil.which("nvidia-smi") and subprocess.getoutput("nvidia-smi -L"),
        "platform": platform.platform(),
        "environment": {x: os.environ.get(x) for x in ("OMP_NUM_THREADS", "XLA_FLAGS")},
        "load_average_at_start": os.getloadavg(),
        "busy_cores_at_start": psutil.cpu_percent(interval=2) / 100 * psutil.cpu_count(),
        "busy_cores_meanwhile": {},
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in (*packages, "dm_control")},
        "results": {},
    }
    for agent in args.agents:
        sides = sides_of(args, agent)
        groups = {}  # sizes of one axis in turn; all at once would not fit into memory
        for side, what in sides.items():
            groups.setdefault(side.split()[0] if args.measure == "scaling" else "", {})[side] = what
        values, busy = {}, 0
        for group in groups.values():
            more_values, busy_now = alternate(group, args.repeats)
            values, busy = values | more_values, max(busy, busy_now)
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
    measure, results = record["measure"], record["results"]
    clauses = [summarize(measure, agent, values) for agent, values in results.items()]
    record["sentence"] = f"{'; '.join(clauses)} ({measure})."
    print(record["sentence"])
    busy = max(record["busy_cores_at_start"], *record["busy_cores_meanwhile"].values())
    if busy > 0.2:
        print(f"Warning: others kept {busy:.1f} cores busy; do not quote these.", file=sys.stderr)
    if not args.show:
        out.write_text(json.dumps(record, indent=2) + "\n")
    importlib.import_module("anatomy").figure(record, out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args))
