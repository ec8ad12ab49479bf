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
from conftest import COMPILED, SMALL
from running import assert_same_arrays, assert_same_run, evaluations, newest, scalars

TASKS = {
    "sac_dmc": "quadruped-walk",
    "td3_gym": "Hopper-v5",
    "mpo_gym": "Humanoid-v5",
}
FLAGS = dict(
    total_timesteps=500, learning_starts=100, eval_frequency=250, eval_episodes=1, batch_size=8,
    hidden_width=16, buffer_size=2000, checkpoint_frequency=50, n_step=3,
)  # fmt: skip


def words(script, **flags) -> list[str]:
    flags = {"env_id": TASKS[script.__name__.split("__")[0]]} | FLAGS | flags
    flags |= {k: SMALL[k] for k in ("action_samples",) if k in script.Args.model_fields}
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def start(script, folder: Path, *more: str) -> subprocess.Popen:
    """Runs a copy of the script in this folder, as a new shell would: no way to this repository.

    Only compilations are shared with other processes, and so is what conftest.py says to XLA.
    """
    names = ("PATH", "HOME", "XLA_FLAGS")
    environ = {name: os.environ[name] for name in names if name in os.environ}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": COMPILED.name}
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    folder.mkdir(exist_ok=True)
    shutil.copy(script.__file__, folder)
    command = [sys.executable, Path(script.__file__).name, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen) -> str:
    """What a process that succeeds wrote on stderr: a progress bar."""
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, ""), errors
    lines = errors.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "it/s" not in line and "s/it" not in line).strip()


def selected(script) -> bool:
    return script.__name__.split("__")[0] in TASKS


@pytest.fixture
def script(script):
    if not selected(script):
        pytest.skip("the other backend stands for it")
    return script


def test_runs_alone_and_survives_a_kill(script, tmp_path):
    """Silent but for its progress bar; killed at a random moment, and continued to the same end."""
    process = start(script, tmp_path / "whole", *words(script))
    assert finish(process) == ""
    names = {path.name for path in (tmp_path / "whole").iterdir()} - {"__pycache__"}
    assert names == {"runs", Path(script.__file__).name}
    (whole,) = (tmp_path / "whole" / "runs").iterdir()
    prefix = f"{TASKS[script.__name__]}__{script.__name__}__0__"
    assert whole.name.startswith(prefix) and whole.name.removeprefix(prefix).isdigit()
    assert len(evaluations(whole)) == 2 and (whole / "policy.npz").exists()

    killed = tmp_path / "killed" / "run"
    process = start(script, tmp_path / "killed", *words(script, run_dir="run"))
    step = np.random.default_rng().integers(100, 350)
    while process.poll() is None and not list(killed.glob(f"checkpoint/*{step // 50 * 50}.npz")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert not (killed / "checkpoint/000000000500.npz").exists()
    assert finish(start(script, tmp_path / "killed", "--run-dir", "run")) == ""
    assert_same_arrays(newest(whole), newest(killed))
    assert_same_run(whole, killed)
    assert {step for step, _ in scalars(killed)["eval/episodic_return"]} == {250, 500}
