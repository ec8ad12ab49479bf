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
from running import assert_same_run, points, run

TASKS = {"sac_dmc": "quadruped-walk", "td3_gym": "Hopper-v5", "mpo_gym": "Humanoid-v5"}
FLAGS = dict(
    run_dir="run", total_timesteps=500, learning_starts=100, checkpoint_frequency=50, n_step=3,
    eval_frequency=220, eval_episodes=1, log_frequency=30,
)  # fmt: skip


def start(script, folder: Path) -> subprocess.Popen:
    """Runs a copy of the script in this folder as a new shell would, without this repository.

    Only compilations are shared with this process, and so is what conftest.py says to XLA.
    """
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "XLA_FLAGS")}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": COMPILED.name}
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    shutil.copy(script.__file__, folder)
    command = [sys.executable, Path(script.__file__).name, "--run-dir", "run"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=pipe, stderr=pipe)


def test_runs_alone_and_survives_a_kill(script, tmp_path, monkeypatch):
    """Killed at a random moment, and continued to the end of the run that nothing stops."""
    if (name := script.__name__.split("__")[0]) not in TASKS:
        pytest.skip("the other backend stands for it")
    args = small_args(script, **FLAGS, env_id=TASKS[name])
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    monkeypatch.chdir(whole)
    run(script, args)

    run_dir = folder / "run"  # of which --run-dir takes the flags
    run_dir.mkdir(parents=True)
    shutil.copy(whole / "run/config.json", run_dir)
    process = start(script, folder)
    step = np.random.default_rng().integers(2, 9) * 50
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if list(run_dir.glob(f"checkpoint/*{step}.npz")):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    found = {int(path.stem) for path in run_dir.glob("checkpoint/*.npz")}
    assert step in found and 500 not in found

    process = start(script, folder)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, ""), errors
    assert all("it/s" in line or "s/it" in line for line in errors.splitlines() if line.strip())
    assert_same_run(whole / "run", run_dir)
    # TensorBoard's writer may have kept points of the very step at which a checkpoint was written.
    ours, theirs = points(whole / "run"), points(run_dir)
    assert theirs <= ours and {step % 50 for _, step, _ in ours - theirs} <= {0}
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"run", Path(script.__file__).name}
