"""Runs scripts on tasks and seeds with Ray, one core for each run, and finishes what was begun.

    python benchmark/sweep.py --agents sac_dmc td3_dmc mpo_dmc --env-ids cartpole-swingup \\
        --seeds 0 1 2 3 4 --total-timesteps 250000
    python benchmark/sweep.py ... -- --n-step 3 --batch-size 128   # what follows -- goes to scripts
    python benchmark/sweep.py ... --dry-run                        # only prints the commands
    python benchmark/sweep.py ... --address auto                   # on this machine's Ray cluster

Without an address Ray starts on this machine and ends with the sweep. Each run is a script in a
process of its own, with RESULTS_DIR/{agent}__{env_id}__{seed} as its run directory and
RESULTS_DIR/logs for what it prints. The same command again skips what is finished and resumes what
is not; nothing is ever deleted: what cannot be resumed moves to RESULTS_DIR/set_aside. The nodes of
a cluster need this repository and RESULTS_DIR in a directory that they share. Linux only.
"""

import csv
import ctypes
import dataclasses
import difflib
import fcntl
import gzip
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

# Before Ray is imported: no telemetry, time to start on a machine whose cores are busy (by default
# 15 seconds), and no opinion on tasks that want no GPU.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
OURS = ("env_id", "seed", "total_timesteps", "run_dir", "resume", "evaluate")  # not after --
PASSED_ON = ("JAX_", "XLA_", "MUJOCO_")  # variables that the scripts see on every node
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
BAD_USAGE = 2  # exit code of a script that refuses its flags


def whole_number(strings: list[str]) -> int:
    """`["1e6"]` -> 1000000, as the scripts read it."""
    if not float(strings[0]).is_integer():
        raise ValueError(f"{strings[0]} is not a whole number")
    return int(float(strings[0]))


Int = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        1, "INT", whole_number, lambda value: isinstance(value, int), lambda value: [str(value)]
    ),
]


@dataclasses.dataclass(frozen=True)
class Args:
    """Runs every agent on every task with every seed; flags of the scripts follow after --."""

    agents: tuple[str, ...]  # scripts in agents/ by name (sac_dmc), or paths of others
    env_ids: tuple[str, ...]  # tasks
    seeds: tuple[int, ...]  # a run for each; with -- --num-seeds N a group of N begins at each
    total_timesteps: Int  # environment steps of each run
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
    flags: list[str]
    total_timesteps: int

    @property
    def log(self) -> Path:
        return self.directory.parent / "logs" / f"{self.directory.name}.log"


class ScriptFailed(Exception):
    """A script ended without its last evaluation; another attempt resumes it."""


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


def evaluated(directory: Path, config: dict) -> int:
    """The last step at which all episodes of all seeds were evaluated, 0 before the first."""
    path, open_ = directory / "eval.csv", open
    if not path.exists():
        path, open_ = directory / "eval.csv.gz", gzip.open
    if not path.exists():
        return 0
    episodes = {}
    with open_(path, "rt") as file:
        for row in csv.reader(line for line in file if line.endswith("\n")):  # the rest was cut off
            if row[0].isdigit():
                episodes.setdefault(int(row[0]), set()).add((row[1], row[2]))
    complete = config["num_seeds"] * config["eval_episodes"]
    return max((step for step, seen in episodes.items() if len(seen) == complete), default=0)


def last_evaluation(total_timesteps: int, config: dict) -> int:
    """The last step of so many at which the script evaluates: the end of an action, once a period.

    With action repeat r and period p these are the multiples of r with step % p < r.
    """
    repeat, period = config["action_repeat"], config["eval_frequency"]
    periods = total_timesteps // period
    steps = (-(-n * period // repeat) * repeat for n in (periods, periods - 1))
    return next(step for step in steps if step <= total_timesteps)


def is_finished(run: Run) -> bool:
    """Whether eval.csv reaches the last evaluation of the steps asked for."""
    if not (config := read_config(run.directory)):
        return False
    return evaluated(run.directory, config) >= last_evaluation(run.total_timesteps, config)


def plan(run: Run) -> tuple[str, list[str]]:
    """What is to be done about a run, "skip", "resume" or "start", and the command from ROOT."""
    python, directory = [sys.executable, shown(run.script)], shown(run.directory)
    if is_finished(run):
        return "skip", []
    config, checkpoint = read_config(run.directory), run.directory / "checkpoint"
    if config and checkpoint.is_dir() and any(checkpoint.iterdir()):
        more = ["--total-timesteps", str(run.total_timesteps)]
        longer = run.total_timesteps > config["total_timesteps"]
        return "resume", [*python, "--resume", directory, *(more if longer else [])]
    return "start", [*python, *run.flags, "--run-dir", directory]


def shown(path: Path) -> str:
    """A path from ROOT, where scripts are run: no machine's directories end up in config.json."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def contradiction(config: dict, flags: list[str]) -> str | None:
    """A flag with another value than the run was made with; `--x 3`, `--x=3`, `--x`, `--no-x`."""
    tokens = [part for flag in flags for part in flag.split("=", 1)]
    for token, value in zip(tokens, [*tokens[1:], "--"]):
        if not token.startswith("--"):
            continue
        name = token.removeprefix("--").replace("-", "_")
        if value.startswith("--"):
            name, value = name.removeprefix("no_"), str(not name.startswith("no_"))
        then = config.get(name, value)
        try:
            same = float(value) == float(then)
        except (TypeError, ValueError):
            same = value == str(then)
        if not same:
            return f"{name} {then}, not {value}"


# --- one run, on the node that Ray chose ----------------------------------------------------------


def locked(file) -> bool:
    """Takes the lock of an open file unless somebody has it.

    A process started with the file open shares the lock, which ends with the last of both.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim_core():
    """A core of this machine that no other run has, if there is one, and its locked file."""
    for core in sorted(os.sched_getaffinity(0)):
        file = Path(tempfile.gettempdir(), f"jax-rl-{os.getuid()}-core-{core}.lock").open("w")
        if locked(file):
            return core, file
    return None, file


def execute(command: list[str], env: dict, core: int | None, core_file, log) -> int:
    """Runs a script on a core until it ends; returns its exit code."""
    prctl = ctypes.CDLL(None).prctl

    def before_script():
        # If Ray's worker goes, with its node for example, the script is told to end as well.
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if core is not None:
            os.sched_setaffinity(0, {core})

    log.write(f"$ {shlex.join(command)}  # on {os.uname().nodename}, core {core}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        pass_fds=[core_file.fileno()], preexec_fn=before_script,
        start_new_session=True,  # a terminal's Ctrl-C would be the first of two signals
    )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(0.2)  # not wait(), which Ray's cancelling could not interrupt
    finally:
        process.terminate()  # on Ctrl-C of the sweep: the script writes a checkpoint
        process.wait()
    return process.returncode


def set_aside(directory: Path):
    """Moves a run directory away from the results."""
    if directory.exists():
        target = directory.parent / "set_aside" / f"{directory.name}__{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)


def run_script(run: Run, variables: dict, gpus: float) -> str | None:
    """Starts a run or goes on with it; returns what its script found wrong with its flags."""
    env = os.environ | ({} if gpus else {"JAX_PLATFORMS": "cpu"})
    if 0 < gpus < 1:  # JAX would take three quarters of the memory for each run
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        # Who writes the log has the run. The script of a lost node may still write its checkpoint.
        while not locked(log):
            time.sleep(0.2)
        core, core_file = claim_core()
        with core_file:
            what, command = plan(run)
            code = 0
            if what == "resume":
                code = execute(command, env | variables, core, core_file, log)
            if what == "start" or what == "resume" and code == BAD_USAGE:  # no usable checkpoint
                set_aside(run.directory)
                command = plan(run)[1]
                code = execute(command, env | variables, core, core_file, log)
    if is_finished(run):
        return None
    message = f"the script ended with exit code {code}"
    if code == BAD_USAGE:
        return message  # no use in trying again
    raise ScriptFailed(message)


# --- all runs -------------------------------------------------------------------------------------


def make_runs(args: Args, script_flags: list[str]) -> list[Run]:
    """The runs of the sweep, after a look for what cannot work."""
    names = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in script_flags}
    if ours := names & set(OURS):
        fail(f"The sweep itself sets --{min(ours).replace('_', '-')}; leave it out after --.")
    known = {path.stem: path for path in sorted((ROOT / "agents").glob("*.py"))}
    runs = {}
    for agent in args.agents:
        script = known.get(agent, Path(agent).absolute())
        if not script.is_file():
            near = ", ".join(difflib.get_close_matches(agent, known, n=3, cutoff=0.0))
            fail(f"--agents {agent} is neither a script in agents/ nor a file; near are {near}.")
        for env_id in args.env_ids:
            for seed in args.seeds:
                name = f"{script.stem}__{env_id}__{seed}".replace("/", "_").replace(":", "_")
                flags = ["--env-id", env_id, "--seed", str(seed), *script_flags]
                flags += ["--total-timesteps", str(args.total_timesteps)]
                directory = args.results_dir.absolute() / name
                if name in runs:
                    fail(f"The sweep has {name} twice; runs need different names.")
                runs[name] = Run(script, directory, flags, args.total_timesteps)
                config = read_config(directory) or {}
                if config.get("eval_frequency") == 0:
                    fail(f"{shown(directory)} was made without evaluations; move it away.")
                if other := contradiction(config, ["--env-id", env_id, *script_flags]):
                    fail(f"{shown(directory)} was made with {other}; give another --results-dir.")
    return list(runs.values())


def connect(args: Args):
    """Joins the cluster at the address, or starts Ray on this machine."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if args.address:
            host, _, port = args.address.rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(args.address, **quiet)
        else:
            # Results are files, so the object store is as small as Ray allows.
            cores = args.jobs or len(os.sched_getaffinity(0))
            store = 80 * 1024**2
            ray.init(
                "local", num_cpus=cores, object_store_memory=store, include_dashboard=False, **quiet
            )
    except OSError as error:
        fail(f"--address {args.address}: {str(error).splitlines()[0]}")
    except Exception as error:  # Ray raises plain ones, as when a busy machine takes too long
        fail(f"Ray did not start: {str(error).splitlines()[0]}", code=1)
    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes()), default=0)
    if args.gpus_per_run > most:
        fail(f"--gpus-per-run {args.gpus_per_run} is more than Ray finds: {most:g} on a node.")


def follow(pending: dict, runs: list[Run], total_timesteps: int) -> list[str]:
    """Shows progress until all tasks are done; returns what is to be said about failures."""

    def steps() -> int:
        configs = ((run, read_config(run.directory)) for run in runs)
        return sum(min(evaluated(r.directory, c), total_timesteps) for r, c in configs if c)

    failures = []
    total = len(runs) * total_timesteps
    with tqdm(total=total, initial=steps(), unit=" steps", dynamic_ncols=True, disable=None) as bar:
        while pending:
            for ref in ray.wait(list(pending), timeout=2)[0]:
                run = pending[ref]
                try:
                    problem = ray.get(ref)
                except ray.exceptions.RayError as error:
                    problem = str(getattr(error, "cause", None) or error)
                del pending[ref]
                if problem:
                    log = run.log.read_text(errors="replace") if run.log.exists() else ""
                    lines = [f"{shown(run.log)} ends with", *log.splitlines()[-20:]]
                    problem = f"{run.directory.name}: {problem}. " + "\n    ".join(lines)
                    failures.append(problem)
                tqdm.write(f"{run.directory.name} {'failed' if problem else 'is finished'}")
            bar.set_postfix_str(f"{len(runs) - len(pending)} of {len(runs)} runs done")
            bar.update(steps() - bar.n)
    return failures


def main(args: Args, script_flags: list[str]):
    """Runs what is not finished; the exit code is 1 if something failed for good."""
    runs = make_runs(args, script_flags)
    if args.dry_run:
        for run in runs:
            what, command = plan(run)
            print(f"# {what} {run.directory.name}")
            print(*([shlex.join(["python", *command[1:]])] if command else []), sep="\n")
        return
    todo = [run for run in runs if plan(run)[0] != "skip"]
    print(f"{len(runs)} runs in {shown(args.results_dir.absolute())}, {len(todo)} to do")
    if not todo:
        return
    connect(args)

    received = [signal.SIGINT]

    def interrupt(number, _):
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):  # after Ray has set its own handlers
        signal.signal(number, interrupt)
    task = ray.remote(run_script).options(
        num_cpus=1, num_gpus=args.gpus_per_run,
        max_retries=args.retries, retry_exceptions=[ScriptFailed],
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
        fail("Stopped; the same command goes on from the checkpoints.", 128 + received[-1])
    ray.shutdown()  # before the last words, which Ray's own notices on retries would follow
    if failures:
        fail("\n".join([*failures, f"{len(failures)} of {len(runs)} runs failed."]), code=1)
    print(f"All runs are finished: python benchmark/report.py {shown(args.results_dir.absolute())}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:split]), sys.argv[split + 1 :])
