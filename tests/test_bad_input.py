"""Every mistake in the flags is one clear sentence on stderr, before anything compiles."""

import re
import shutil
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import pytest
import tyro
from conftest import load, small_args

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)

POSITIVE = """
    num_seeds total_timesteps action_repeat eval_episodes eval_max_steps log_frequency buffer_size
    updates_per_step batch_size gamma tau target_network_frequency policy_frequency hidden_width
    hidden_layers policy_lr q_lr alpha_lr learning_rate alpha
""".split()
NOT_NEGATIVE = """
    seed eval_frequency learning_starts target_entropy_scale exploration_noise policy_noise
    noise_clip
""".split()
BAD_VALUES = [(name, value) for name in POSITIVE for value in (0, -1)]
BAD_VALUES += [(name, -1) for name in NOT_NEGATIVE]
BAD_VALUES += [("gamma", 1.1), ("tau", 1.1), ("gamma", float("nan")), ("tau", float("nan"))]


@pytest.fixture
def refuses(tmp_path, monkeypatch, capsys):
    """`refuses(script, words, **flags)`: the run ends with a sentence that has all these words."""
    monkeypatch.chdir(tmp_path)

    def check(script, *words: str, **changes):
        args, before = small_args(script, **changes), len(COMPILED)
        files = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            script.main(args)
        output, message = capsys.readouterr()
        assert end.value.code == 2
        assert len(COMPILED) == before, "something was compiled"
        assert sorted(tmp_path.rglob("*")) == files, "something was written"
        assert output == "" and message.count("\n") == 1, "one sentence on stderr"
        for word in words:
            assert word in message

    return check


def test_compilation_is_noticed():
    """The check that nothing compiles can fail."""
    before = len(COMPILED)
    jax.jit(lambda x: x * 3.25 + before)(jnp.ones(3)).block_until_ready()
    assert len(COMPILED) > before


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_value_out_of_range(script, name, value, refuses):
    if name not in script.Args.__dataclass_fields__:
        pytest.skip("no such flag here")
    refuses(script, f"--{name.replace('_', '-')} {value}", **{name: value})


def test_batch_larger_than_buffer(script, refuses):
    refuses(script, "--batch-size 50", "--buffer-size 40", batch_size=50, buffer_size=40)


@pytest.mark.parametrize(
    "flags",
    [
        dict(learning_starts=100, total_timesteps=100),
        dict(learning_starts=200, total_timesteps=100),
        # The last step that is a multiple of 60 is 60, still a random one.
        dict(learning_starts=80, total_timesteps=100, action_repeat=60),
        # Nothing is in the buffer at the first update.
        dict(learning_starts=0),
        dict(learning_starts=3, action_repeat=4),
    ],
    ids=["at the end", "after the end", "after the last repeat", "at once", "before a repeat"],
)
def test_learning_never_starts(script, flags, refuses):
    refuses(script, "--learning-starts", **flags)


@pytest.mark.algorithms("sac")
def test_log_std_bounds(script, refuses):
    refuses(script, "--log-std-min 3", "--log-std-max 2", log_std_min=3.0)


def test_track_without_wandb(script, refuses, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    refuses(script, "--track", "pip install wandb", track=True)


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.backends("dmc")
@pytest.mark.parametrize("task", ["cartpole-swing", "cartpole_swingup", "dm_control/cartpole-v0"])
def test_unknown_task(script, task, refuses):
    refuses(script, task, "cartpole-swingup", env_id=task)


@pytest.mark.backends("gym")
@pytest.mark.parametrize(
    "env_id", ["HalfCheeta-v5", "HalfCheetah-v55", "no_package:HalfCheetah-v5"]
)
def test_unknown_id(script, env_id, refuses):
    refuses(script, env_id, "HalfCheetah-v5", env_id=env_id)


@pytest.mark.backends("gym")
def test_discrete_actions(script, refuses):
    assert "CartPole-v1" in gym.registry
    refuses(script, "CartPole-v1", "Discrete(2)", env_id="CartPole-v1")


def test_wrapper_that_was_not_copied(script, tmp_path, refuses):
    """A copied script names the file to bring along."""
    copy = tmp_path / f"{Path(script.__file__).stem}__copied.py"
    shutil.copy(script.__file__, copy)
    flags = dict(dmc=dict(action_repeat=2), gym=dict(env_id="old_gym/Pendulum-v1"))
    file = f"common/{script.backend}_wrappers.py"
    refuses(load(copy), "copy it too", file, **flags[script.backend])


# --- the run directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("run_dir", ["here", "here/file/run"], ids=["exists", "cannot be made"])
def test_run_directory(script, run_dir, tmp_path, refuses):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("in the way")
    refuses(script, f"--run-dir {run_dir}", run_dir=run_dir)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--no-such-flag 3", "--no-such-flag"),
        ("--total-timesteps 1.5", "--total-timesteps.*1.5 is not a whole number"),
        ("--total-timesteps inf", "--total-timesteps.*inf is not a whole number"),
        ("--total-timesteps nan", "--total-timesteps.*nan"),
        ("--total-timesteps many", "--total-timesteps.*many"),
        ("--gamma high", "--gamma.*high"),
    ],
)
def test_command_line(script, flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=flags.split())
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert end.value.code == 2 and re.search(words, message)


@pytest.mark.parametrize("number", ["1e6", "1_000_000", "1000000"])
def test_integers(script, number):
    """Whole numbers in all their spellings are ints."""
    steps = tyro.cli(script.Args, args=["--total-timesteps", number]).total_timesteps
    assert steps == 1_000_000 and type(steps) is int
