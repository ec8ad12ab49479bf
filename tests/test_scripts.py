"""A script on its own: copied into an empty directory, killed there, and started again.

Algorithms take turns with backends and with tasks whose physics are hard to repeat: contacts, early
terminations, and quantities that lag behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import COMPILED, small_args
from running import assert_same_run, evaluations, run

TASKS = {"sac_dmc": "quadruped-walk", "td3_gym": "Hopper-v5", "mpo_gym": "Humanoid-v5"}
FLAGS = dict(
    run_dir="run", total_timesteps=500, learning_starts=100, checkpoint_frequency=50, n_step=3,
    eval_frequency=250, eval_episodes=1,
)  # fmt: skip


def words(args) -> list[str]:
    """The command line that makes these flags."""
    found = []
    for name, value in args.model_dump().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found.append(f"--{flag}={value}")
    return found


def start(script, folder: Path, *more: str) -> subprocess.Popen:
    """Runs a copy of the script in this folder, as a new shell would: no way to this repository.

    Only compilations are shared with other processes, and so is what conftest.py says to XLA.
    """
    names = ("PATH", "HOME", "XLA_FLAGS")
    environ = {name: os.environ[name] for name in names if name in os.environ}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": COMPILED.name}
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    shutil.copy(script.__file__, folder)
    command = [sys.executable, Path(script.__file__).name, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen):
    """Waits for a process that succeeds, silently but for its progress bar."""
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, ""), errors
    assert all("it/s" in line or "s/it" in line for line in errors.split("\r") if line.strip())


def test_runs_alone_and_survives_a_kill(script, tmp_path, monkeypatch):
    """Killed at a random moment, and continued to the end of the run that nothing stops."""
    if (name := script.__name__.split("__")[0]) not in TASKS:
        pytest.skip("the other backend stands for it")
    args = small_args(script, **FLAGS, env_id=TASKS[name])
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    run(script, args)

    run_dir = tmp_path / "killed/run"
    process = start(script, tmp_path / "killed", *words(args))
    step = np.random.default_rng().integers(2, 8) * 50
    while process.poll() is None and not list(run_dir.glob(f"checkpoint/*{step}.npz")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert not (run_dir / "checkpoint/000000000500.npz").exists()
    finish(start(script, tmp_path / "killed", "--run-dir", "run"))
    assert_same_run(tmp_path / "whole/run", run_dir)
    assert len(evaluations(run_dir)) == 2
    names = {path.name for path in (tmp_path / "killed").iterdir()} - {"__pycache__"}
    assert names == {"run", Path(script.__file__).name}
