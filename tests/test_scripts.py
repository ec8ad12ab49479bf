"""A script on its own: copied into an empty directory, killed there, and started again."""

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
from oracles import step_sizes
from running import assert_same_run, evaluations, points, run

# Physics that are hard to repeat: contacts, terminations, quantities that lag behind.
TASKS = {"sac_dmc": "quadruped-walk", "td3_gym": "Hopper-v5", "mpo_gym": "Humanoid-v5"}
FLAGS = dict(
    run_dir="run", total_timesteps=500, learning_starts=100, checkpoint_frequency=50, n_step=3,
    eval_frequency=220, eval_episodes=1, log_frequency=30,
)  # fmt: skip


def start(script, folder: Path) -> subprocess.Popen:
    """A copy of the script in this folder, as a new shell runs it; compilations are shared."""
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
    step = np.random.default_rng().integers(3, 9) * 50  # past the random steps
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
    words = "it/s", "s/it", "Compiling"
    assert all(any(x in line for x in words) for line in errors.splitlines() if line.strip())
    assert_same_run(whole / "run", run_dir)
    # TensorBoard's writer may have kept points of the very step at which a checkpoint was written.
    ours, theirs = points(whole / "run"), points(run_dir)
    assert theirs <= ours and {step % 50 for _, step, _ in ours - theirs} <= {0}
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"run", Path(script.__file__).name}


@pytest.mark.slow
@pytest.mark.backends("gym")  # which share their learning with the others
def test_solves_the_pendulum(script, tmp_path):
    """It costs about -1200 under a random policy, and -150 at best."""
    flags = "--env-id Pendulum-v1 --total-timesteps 12500 --learning-starts 1000 --hidden-width 64"
    flags += " --batch-size 64 --eval-frequency 2500"
    for name, value in step_sizes(script, actor=1e-3, critic=1e-3).items():
        flags += f" --{name.replace('_', '-')} {value}"
    # A process of its own: the checks that conftest.py turns on would slow every step down.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, script.__file__, *flags.split(), "--run-dir", tmp_path / "run"]
    subprocess.run(command, env=plain, check=True)
    returns = [float(row["return"]) for row in evaluations(tmp_path / "run")]
    assert np.mean(returns[-20:]) > -400  # of the last two evaluations
