"""Every mistake in the flags is told at once: what is wrong, with which flag, and exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from running import parse

POSITIVE = """
    total_timesteps action_repeat eval_episodes log_frequency buffer_size learning_starts
    updates_per_step batch_size gamma n_step tau hidden_width policy_lr q_lr learning_rate alpha
    dual_lr temperature alpha_mean alpha_stddev epsilon epsilon_penalty epsilon_mean epsilon_stddev
    initial_stddev action_samples policy_frequency target_network_frequency
""".split()
NOT_NEGATIVE = """
    seed eval_frequency checkpoint_frequency target_entropy_scale exploration_noise policy_noise
    noise_clip
""".split()
BAD_VALUES = [(name, value) for name in POSITIVE for value in ("0", "-1")]
BAD_VALUES += [(name, value) for name in NOT_NEGATIVE for value in ("-1", "nan", "word")]
BAD_VALUES += [(name, value) for name in ("gamma", "tau") for value in ("1.1", "nan", "inf")]
BAD_VALUES += [("total_timesteps", value) for value in ("1.5", "inf", "many")]
BAD_VALUES += [("seed", "2147483648"), ("temperature_solver", "bisection")]


def refused(script, capsys, *words: str) -> str:
    """What a command line that is not understood is answered with, on one line without frames."""
    with pytest.raises(SystemExit) as end:
        parse(script, *words)
    output, message = capsys.readouterr()
    assert end.value.code == 2 and output == ""
    assert "Traceback" not in message and "http" not in message
    return " ".join(re.sub("[│╭╮╰╯─]", " ", message).split())


@pytest.mark.backends("dmc")
def test_values_out_of_range(script, capsys):
    fields = script.Args.model_fields
    numbers = {name for name, field in fields.items() if type(field.default) in (int, float)}
    assert numbers - {*POSITIVE, *NOT_NEGATIVE} <= {"log_std_min", "log_std_max"}, "not tried"
    known = [(name, value) for name, value in BAD_VALUES if name in fields]
    for name, value in known:
        message = refused(script, capsys, f"--{name.replace('_', '-')}", value)
        assert name.replace("_", "-") in message.replace("_", "-"), (name, value)


@pytest.mark.backends("dmc")
def test_every_number_arrives_as_a_number(script):
    numbers = {k: v for k, v in parse(script).model_dump().items() if type(v) in (int, float)}
    given = {k: "0.25" if isinstance(v, float) else "1000" for k, v in numbers.items()}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    parsed = parse(script, *words).model_dump()
    assert {k: parsed[k] for k in given} == {k: float(v) for k, v in given.items()}
    assert {k: type(parsed[k]) for k in given} == {k: type(numbers[k]) for k in given}


@pytest.mark.backends("gym")
@pytest.mark.parametrize("words", ["--no-such-flag 3", "--layer-norm False", "--num-seeds 5"])
def test_flags_that_do_not_exist(script, words, capsys):
    message = refused(script, capsys, *words.split())
    assert words.split()[0] in message or words.split()[1] in message


@pytest.mark.algorithms("sac")
@pytest.mark.backends("gym")
def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.count("default:") >= len(script.Args.model_fields) - 5
    for name in script.Args.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def python(script, folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of `python SCRIPT WORDS` in a folder, and what it writes on stderr."""
    environ = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, script.__file__, *words]
    child = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert child.stdout == "" and "Traceback" not in child.stderr
    return child.returncode, child.stderr


@pytest.mark.algorithms("td3")
@pytest.mark.backends("gym")
def test_commands(script, tmp_path):
    """An environment that does not exist, and a directory that cannot be made."""
    code, message = python(script, tmp_path, "--env-id", "Hoper-v5")
    assert code == 2 and message.count("\n") == 1 and "Did you mean: `Hopper`" in message
    (tmp_path / "file").write_text("in the way")
    code, message = python(script, tmp_path, "--env-id", "Hopper-v5", "--run-dir", "file/run")
    assert code == 2 and message.count("\n") == 1 and "file/run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
