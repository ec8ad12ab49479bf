"""A script on its own: copied elsewhere, given a user's environment, interrupted, fed with nan."""

import csv
import itertools
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TASKS = {"dmc": "cartpole-swingup", "gym": "Hopper-v5"}
MY_PACKAGE = """
import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    observation_space = gym.spaces.Dict(
        place=gym.spaces.Box(-1, 1, (2, 2)), time=gym.spaces.Box(0, 9, ())
    )
    action_space = gym.spaces.Box(-2, 3, (2, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def observe(self):
        place = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return dict(place=place, time=np.float32(self.time))

    def step(self, action):
        self.time += 1
        return self.observe(), float(action.sum()), False, self.time == 9, {}


gym.register("MyEnv-v0", entry_point=MyEnv)
"""


def clean_environment() -> dict[str, str]:
    """What a new shell has: no way to this repository, and nothing set for JAX but the device."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {"JAX_PLATFORMS": "cpu"}


def start(script, flags: str, folder: Path) -> subprocess.Popen:
    """Copies the script into a folder and runs it there."""
    shutil.copy(script.__file__, folder)
    command = [sys.executable, Path(script.__file__).name, *flags.split()]
    return subprocess.Popen(
        command, cwd=folder, env=clean_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def read_evaluations(run_dir: Path) -> list[dict]:
    """The rows of eval.csv, which ends with a whole line."""
    text = (run_dir / "eval.csv").read_text()
    assert text.startswith("global_step,seed,episode,return,length\n") and text.endswith("\n")
    return list(csv.DictReader(text.splitlines()))


def read_tags(run_dir: Path) -> list[str]:
    return EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]


# --- elsewhere ------------------------------------------------------------------------------------


def test_runs_alone(script, tmp_path):
    """In an empty folder, with default flags but for its length, and silent about all but that."""
    flags = "--learning-starts 200 --total-timesteps 3e2 --eval-frequency 250 --eval-episodes 1"
    process = start(script, flags, tmp_path)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("step 250: return ") and output.count("\n") == 1
    assert {x.name for x in tmp_path.iterdir()} == {"runs", Path(script.__file__).name}
    (run_dir,) = (tmp_path / "runs").iterdir()
    prefix = f"{script.Args().env_id}__{script.Args().exp_name}__0__"
    assert run_dir.name.startswith(prefix) and run_dir.name.removeprefix(prefix).isdigit()
    assert len(read_evaluations(run_dir)) == 1


@pytest.mark.backends("gym")
def test_package_of_the_user(script, tmp_path):
    """An environment that a package beside the script registers when it is imported."""
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    flags = "--env-id my_package:MyEnv-v0 --learning-starts 90 --total-timesteps 100 --run-dir run"
    process = start(script, f"{flags} --eval-frequency 100 --hidden-width 16", tmp_path)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert {row["length"] for row in read_evaluations(tmp_path / "run")} == {"9"}


def run_as_main(script, monkeypatch, flags: str):
    """`python SCRIPT FLAGS`, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    runpy.run_path(script.__file__, run_name="__main__")


@pytest.mark.algorithms("td3")
def test_runs_from_another_directory(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--total-timesteps 12 --learning-starts 1e1 --hidden-width 8 --eval-frequency 0"
    run_as_main(script, monkeypatch, f"{flags} --env-id {TASKS[script.backend]}")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert {"config.json", "eval.csv"} < {x.name for x in run_dir.iterdir()}


@pytest.mark.parametrize("flag", ["layer-norm", "track"])
@pytest.mark.parametrize("value", ["True", "False"])
def test_value_after_a_switch(script, flag, value, tmp_path, monkeypatch, capsys):
    """The habit `--autotune False` of argparse is told what to write instead."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_as_main(script, monkeypatch, f"--{flag} {value}")
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"--no-{flag}" in message and message.count("\n") == 1


# --- the end of a run -----------------------------------------------------------------------------


def spoil(script, outcome, part: str, value: float):
    """What an environment's `step` or `reset` returned, with a part of it replaced by value."""
    if script.backend == "dmc":
        changed = {k: np.full_like(x, value) for k, x in outcome.observation.items()}
        changes = dict(reward=value) if part == "reward" else dict(observation=changed)
        return outcome._replace(**changes)
    obs, *rest = outcome
    if part == "reward":
        return obs, value, *rest[1:]
    return np.full_like(obs, value), *rest


@pytest.fixture
def at_call(script, monkeypatch):
    """`at_call(n, "step", change)` changes what the training environment returns the n-th time."""

    def use(n: int, method: str, change):
        make_env, built = script.make_env, []

        def make_changed(*args):
            env = make_env(*args)
            if not built:  # the first one is for training
                calls, original = itertools.count(1), getattr(env, method)

                def changed(*args, **kwargs):
                    outcome = original(*args, **kwargs)
                    return change(outcome) if next(calls) == n else outcome

                setattr(env, method, changed)
            built.append(env)
            return env

        monkeypatch.setattr(script, "make_env", make_changed)

    return use


def ends(script, tmp_path, capsys, code: int, *words: str, **changes):
    """The run stops with a sentence that has these words; its files are whole."""
    flags = dict(
        env_id=TASKS[script.backend], run_dir=str(tmp_path / "run"), learning_starts=50,
        eval_frequency=20, eval_max_steps=10,
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        script.main(small_args(script, **(flags | changes)))
    message = capsys.readouterr().err
    assert end.value.code == code and message.count("\n") == 1
    for word in (*words, str(tmp_path / "run")):
        assert word in message
    assert len(read_evaluations(tmp_path / "run")) == 2
    assert "eval/episodic_return" in read_tags(tmp_path / "run")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["observation", "reward"])
def test_step_that_is_not_finite(script, part, value, at_call, tmp_path, capsys):
    at_call(30, "step", lambda outcome: spoil(script, outcome, part, value))
    ends(script, tmp_path, capsys, 1, "step 30", TASKS[script.backend])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_reset_that_is_not_finite(script, value, at_call, tmp_path, capsys):
    """The second: the first episode ends by itself, cartpole's after a thousand steps."""
    at_call(2, "reset", lambda outcome: spoil(script, outcome, "observation", value))
    steps = dict(learning_starts=1100, total_timesteps=1101, eval_frequency=1000, eval_max_steps=5)
    if script.backend == "gym":
        steps |= dict(eval_frequency=5)
    flags = dict(env_id=TASKS[script.backend], run_dir=str(tmp_path / "run"), **steps)
    with pytest.raises(SystemExit) as end:
        script.main(small_args(script, **flags))
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.count("\n") == 1
    assert "step " in message and TASKS[script.backend] in message
    read_evaluations(tmp_path / "run")


def interrupt(outcome=None):
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)
    return outcome


def test_interrupt(script, at_call, tmp_path, capsys):
    at_call(30, "step", interrupt)
    ends(script, tmp_path, capsys, 130, "step 30")


def test_interrupt_before_the_first_step(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", interrupt)
    with pytest.raises(SystemExit) as end:
        run_as_main(script, monkeypatch, f"--env-id {TASKS[script.backend]}")
    assert end.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.algorithms("td3")
@pytest.mark.backends("dmc")
def test_interrupt_from_outside(script, tmp_path):
    """A signal from another process, while updates are under way; nothing but the sentence."""
    flags = "--learning-starts 50 --eval-frequency 100 --eval-max-steps 5 --hidden-width 16"
    process = start(script, f"{flags} --run-dir run", tmp_path)
    assert process.stdout.readline().startswith("step 100")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.startswith("Stopped at step ")
    assert errors.count("\n") == 1
    assert read_evaluations(tmp_path / "run")
