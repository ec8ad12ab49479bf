"""Runs scripts on tasks and seeds with Ray, one core for each run, and finishes what was begun.

    python benchmark/sweep.py --agents sac_dmc td3_dmc mpo_dmc --env-ids cartpole-swingup \\
        --seeds 0 1 2 3 4 --total-timesteps 250000
    python benchmark/sweep.py ... -- --n-step 3 --batch-size 128   # what follows -- goes to scripts
    python benchmark/sweep.py ... --dry-run                        # only prints the commands
    python benchmark/sweep.py ... --address auto                   # on this machine's Ray cluster

Each run is a script in a process of its own, with RESULTS_DIR/{agent}__{env_id}__{seed} as its run
directory and RESULTS_DIR/logs for what it prints; runs.csv there says what made each run, wall.csv
when it came to each evaluation. The same command again skips what is finished and goes on with what
is not; nothing is ever deleted. The nodes of a cluster need this repository, RESULTS_DIR and the
folder in which the sweep was started in directories that they share. Linux only.
"""

import collections
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from os.path import relpath
from pathlib import Path
from typing import NamedTuple

# Before Ray is imported: no telemetry, time to start on a busy machine (by default 15 seconds), and
# no opinion on tasks that want no GPU.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import tyro
from tqdm import tqdm

try:
    import ray
except ImportError:
    ray = None

ROOT = Path(__file__).resolve().parents[1]
OURS = ("env_id", "seed", "total_timesteps", "run_dir")  # not after --
PASSED_ON = ("JAX_", "XLA_", "MUJOCO_", "PYTHONPATH")  # variables that scripts see on every node
PACKAGES = "jax jaxlib flax optax numpy gymnasium shimmy dm_control mujoco".split()
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
BAD_USAGE = 2  # exit code of a script that refuses its flags


@dataclasses.dataclass(frozen=True)
class Args:
    """Runs every agent on every task with every seed; flags of the scripts follow after --."""

    agents: tuple[str, ...]  # scripts in agents/ by name (sac_dmc), or paths of others
    env_ids: tuple[str, ...]  # tasks
    seeds: tuple[int, ...]  # a run for each
    total_timesteps: int  # environment steps of each run
    results_dir: Path = ROOT / "benchmark" / "results" / "curves"  # run directories go here
    address: str | None = None  # Ray cluster to join, `auto` for the one this machine is part of
    jobs: int | None = None  # runs at a time on this machine; default one for each core
    gpus_per_run: float = 0.0  # share of a GPU for each run, 0 for runs on the CPU
    retries: int = 3  # times that a run is tried again after it failed or lost its node
    dry_run: bool = False  # print the commands and run nothing


class Run(NamedTuple):
    """One script with its flags, and where its results are."""

    script: Path
    directory: Path
    total_timesteps: int
    command: list[str]  # begins the run, and goes on with it
    here: Path  # folder in which the command is given
    log: Path  # what it prints


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    print(message, file=sys.stderr)
    sys.exit(code)


# --- what is there --------------------------------------------------------------------------------


def read_config(directory: Path) -> dict | None:
    """The flags that a run was started with, if they can be read."""
    try:
        return json.loads((directory / "config.json").read_text())["args"]
    except (OSError, ValueError, KeyError):
        return None


def evaluated(run: Run) -> int:
    """The last step at which all episodes were evaluated, 0 before the first."""
    config, path = read_config(run.directory), run.directory / "eval.csv"
    lines = path.read_text().split("\n")[1:-1] if config and path.exists() else []
    counts = collections.Counter(int(line.split(",")[0]) for line in lines)  # whole lines only
    return max((step for step, n in counts.items() if n == config["eval_episodes"]), default=0)


def last_evaluation(total_timesteps: int, config: dict) -> int:
    """The last step at which the script evaluates, 0 if it never does."""
    repeat, period = config["action_repeat"], config["eval_frequency"]
    steps = range(-(-total_timesteps // repeat) * repeat, 0, -repeat)
    return next((step for step in steps if period and step % period < repeat), 0)


def is_finished(run: Run) -> bool:
    """Whether eval.csv reaches the last evaluation of the steps asked for."""
    config = read_config(run.directory)
    return bool(config) and 0 < last_evaluation(run.total_timesteps, config) <= evaluated(run)


def contradiction(config: dict, flags: list[str]) -> str | None:
    """A flag with another value than the run was made with; `--x 3`, `--x=3`, `--x`, `--no-x`."""
    tokens = [part for flag in flags for part in flag.split("=", 1)]
    for token, value in zip(tokens, [*tokens[1:], "--"]):
        name = token.removeprefix("--").replace("-", "_")
        if value.startswith("--"):
            name, value = name.removeprefix("no_"), str(not name.startswith("no_"))
        then = str(config.get(name, value))
        with contextlib.suppress(ValueError):
            value, then = float(value), float(then)
        if token.startswith("--") and value != then:
            return f"{name} {then}, not {value}"


# --- one run, on the node that Ray chose ----------------------------------------------------------


def append(name: str, row: dict, run: Run):
    """Adds a line to a table to which several runs add theirs."""
    with (run.directory.parent / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if os.fstat(file.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerow(row)


def provenance(run: Run, gpus: float) -> dict:
    """A line of runs.csv: the script's text, versions and the machine."""

    def output(command: str) -> str:
        options = {"cwd": run.script.parent, "capture_output": True, "text": True}
        return subprocess.run(command, shell=True, **options).stdout.strip()

    machine = [output("grep -m 1 'model name' /proc/cpuinfo").split(": ")[-1]]
    machine += [f"{os.cpu_count()} cores", *output("nvidia-smi -L").split(" (")[: gpus > 0]]
    versions = {x.name.replace("-", "_"): x.version for x in importlib.metadata.distributions()}
    changed = output(f"git status --porcelain -- {shlex.quote(run.script.name)}")
    return {
        "run": run.directory.name,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "script": run.script.name,
        "sha256": hashlib.sha256(run.script.read_bytes()).hexdigest(),
        "commit": output("git rev-parse HEAD") + ("-dirty" if changed else ""),
        "machine": ", ".join(machine),
        "versions": " ".join(f"{x} {versions[x]}" for x in PACKAGES if x in versions),
    }


def claim_core():
    """A core of this machine that no other run has, if there is one, and its locked file."""
    for core in sorted(os.sched_getaffinity(0)):
        file = Path(tempfile.gettempdir(), f"jax-rl-{os.getuid()}-core-{core}.lock").open("w")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return core, file
    return None, file


def execute(run: Run, env: dict, core: int | None, core_file, log) -> int:
    """Runs a script until it ends; returns its exit code. It keeps the locks of both files."""
    prctl = ctypes.CDLL(None).prctl

    def before_script():
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # without its worker a script is told to end
        if core is not None:
            os.sched_setaffinity(0, {core})

    log.write(f"$ {shlex.join(run.command)}  # on {os.uname().nodename}, core {core}\n".encode())
    log.flush()
    start, noted, code = time.time(), evaluated(run), None
    process = subprocess.Popen(
        run.command, cwd=run.here, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        pass_fds=[core_file.fileno()], preexec_fn=before_script,
        start_new_session=True,  # a terminal's Ctrl-C would be the first of two signals
    )  # fmt: skip
    try:
        while code is None:
            time.sleep(0.2)  # not wait(), which Ray's cancelling could not interrupt
            code = process.poll()
            if (step := evaluated(run)) > noted:
                row = {"run": run.directory.name, "global_step": step}
                append("wall.csv", row | {"seconds": round(time.time() - start)}, run)
                noted = step
    finally:
        process.terminate()  # on Ctrl-C of the sweep: the script writes a checkpoint
        process.wait()
    return code


def run_script(run: Run, variables: dict, gpus: float) -> str | None:
    """Starts a run or goes on with it; returns what its script found wrong with its flags."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels by it; after & it is off
    env = os.environ | ({} if gpus else {"JAX_PLATFORMS": "cpu"})
    if 0 < gpus < 1:  # JAX would take three quarters of the memory for each run
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the script of a lost node may still write its checkpoint
        core, core_file = claim_core()
        with core_file:
            append("runs.csv", provenance(run, gpus), run)
            code = execute(run, env | variables, core, core_file, log)
    message = f"the script ended with exit code {code}"
    if code not in (0, BAD_USAGE):
        raise ChildProcessError(message)  # another attempt goes on with it
    return message if code else None  # no use in trying again


# --- all runs -------------------------------------------------------------------------------------


def make_runs(args: Args, script_flags: list[str]) -> list[Run]:
    """The runs of the sweep, after a look for what cannot work."""
    names = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in script_flags}
    if ours := names & set(OURS):
        fail(f"The sweep itself sets --{min(ours).replace('_', '-')}; leave it out after --.")
    if "exp_name" in names and len(args.agents) > 1:
        fail("Reports could not tell these agents apart if all had the same --exp-name.")
    known = {path.stem: path for path in sorted((ROOT / "agents").glob("*_*.py"))}
    runs = {}
    for agent in args.agents:
        script = known.get(agent, Path(agent).absolute())
        if not script.is_file():
            fail(f"--agents {agent} is neither a file nor one of {', '.join(known)}.")
        for env_id in args.env_ids:
            for seed in args.seeds:
                name = f"{script.stem}__{env_id}__{seed}".replace("/", "_").replace(":", "_")
                directory = args.results_dir.absolute() / name
                command = [sys.executable, relpath(script), "--env-id", env_id, "--seed", str(seed)]
                command += [*script_flags, "--total-timesteps", str(args.total_timesteps)]
                command += ["--run-dir", relpath(directory)]
                if name in runs:
                    fail(f"The sweep has {name} twice; runs need different names.")
                log, steps = directory.parent / f"logs/{name}.log", args.total_timesteps
                runs[name] = Run(script, directory, steps, command, Path.cwd(), log)
                if other := contradiction(read_config(directory) or {}, command[2:-4]):
                    fail(f"{relpath(directory)} was made with {other}; give another --results-dir.")
    return list(runs.values())


def connect(args: Args):
    """Joins the cluster at the address, or starts Ray on this machine."""
    if not ray:
        fail("The sweep needs Ray: pip install -r benchmark/requirements.txt")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if args.address:
            host, _, port = args.address.rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(args.address, **quiet)
        else:
            # Results are files, so the object store is as small as Ray allows.
            quiet |= {"num_cpus": args.jobs or len(os.sched_getaffinity(0))}
            quiet |= {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
            ray.init("local", **quiet)
    except OSError as error:
        fail(f"--address {args.address}: {str(error).splitlines()[0]}")
    except Exception as error:  # Ray raises plain ones, as when a busy machine takes too long
        fail(f"Ray did not start: {str(error).splitlines()[0]}", code=1)
    most = max(node["Resources"].get("GPU", 0) for node in ray.nodes())
    if args.gpus_per_run > most:
        fail(f"--gpus-per-run {args.gpus_per_run} is more than Ray finds: {most:g} on a node.")


def follow(pending: dict, runs: list[Run], total_timesteps: int) -> list[str]:
    """Shows progress until all tasks are done; returns what is to be said about failures."""

    def steps() -> int:
        return sum(min(evaluated(run), total_timesteps) for run in runs)

    failures, total = [], len(runs) * total_timesteps
    with tqdm(total=total, initial=steps(), unit=" steps", disable=None) as bar:
        while pending:
            for ref in ray.wait(list(pending), timeout=2)[0]:
                run = pending.pop(ref)
                try:
                    problem = ray.get(ref)
                except ray.exceptions.RayError as error:
                    problem = str(getattr(error, "cause", None) or error)
                if problem:
                    log = run.log.read_text(errors="replace") if run.log.exists() else ""
                    lines = [f"{relpath(run.log)} ends with", *log.splitlines()[-20:]]
                    failures.append(f"{run.directory.name}: {problem}. " + "\n    ".join(lines))
                tqdm.write(f"{run.directory.name} {'failed' if problem else 'is finished'}")
            bar.update(steps() - bar.n)
    return failures


def main(args: Args, script_flags: list[str]):
    """Runs what is not finished; the exit code is 1 if something failed for good."""
    runs = make_runs(args, script_flags)
    todo = [run for run in runs if not is_finished(run)]
    if args.dry_run:
        for run in runs:
            print(shlex.join(["python", *run.command[1:]]), "" if run in todo else " # finished")
        return
    print(f"{len(runs)} runs in {relpath(args.results_dir)}, {len(todo)} to do")
    if not todo:
        return
    connect(args)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, after Ray has set its own handlers
        signal.signal(number, signal.default_int_handler)
    task = ray.remote(run_script).options(
        num_cpus=1, num_gpus=args.gpus_per_run,
        max_retries=args.retries, retry_exceptions=[ChildProcessError],
    )  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    pending = {task.remote(run, variables, args.gpus_per_run): run for run in todo}
    try:
        failures = follow(pending, runs, args.total_timesteps)
    except KeyboardInterrupt:
        print("\nThe scripts write their checkpoints and end.", file=sys.stderr, flush=True)
        for ref in pending:
            ray.cancel(ref)
        ray.wait(list(pending), num_returns=len(pending), timeout=300)
        fail("Stopped; the same command goes on from the checkpoints.", code=130)
    ray.shutdown()  # before the last words, which Ray's own notices on retries would follow
    if failures:
        fail("\n".join([*failures, f"{len(failures)} of {len(runs)} runs failed."]), code=1)
    print(f"All runs are finished: python benchmark/report.py {relpath(args.results_dir)}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:split]), sys.argv[split + 1 :])
