"""Every mistake in the flags is told at once: what is wrong, with which flag, and exit code 2."""

import subprocess
import sys

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
BAD_VALUES += [("total_timesteps", "1.5"), ("seed", "2147483648"), ("temperature_solver", "exact")]

on_dmc = pytest.mark.backends("dmc")


def refused(script, capsys, *words: str) -> str:
    """What a command line that is not understood is answered with."""
    with pytest.raises(SystemExit) as end:
        parse(script, *words)
    output, message = capsys.readouterr()
    assert end.value.code == 2 and output == ""
    assert "Traceback" not in message and "http" not in message
    return message.replace("_", "-")


@on_dmc
def test_values_out_of_range(script, capsys):
    fields = script.Args.model_fields
    numbers = {name for name, field in fields.items() if type(field.default) in (int, float)}
    assert numbers - {*POSITIVE, *NOT_NEGATIVE} <= {"log_std_min", "log_std_max"}, "not tried"
    for name, value in BAD_VALUES:
        if name in fields:
            flag = name.replace("_", "-")
            assert flag in refused(script, capsys, f"--{flag}", value), value


@on_dmc
def test_every_number_arrives_as_a_number(script):
    numbers = {k: v for k, v in parse(script).model_dump().items() if type(v) in (int, float)}
    given = {k: "0.25" if isinstance(v, float) else "1000" for k, v in numbers.items()}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    parsed = parse(script, *words).model_dump()
    assert {k: parsed[k] for k in given} == {k: float(v) for k, v in given.items()}
    assert {k: type(parsed[k]) for k in given} == {k: type(numbers[k]) for k in given}


@on_dmc
@pytest.mark.algorithms("sac")
@pytest.mark.parametrize("words", ["--no-such-flag 3", "--layer-norm False", "--num-seeds 5"])
def test_flags_that_do_not_exist(script, words, capsys):
    message = refused(script, capsys, *words.split())
    assert words.split()[0] in message or words.split()[1] in message


@on_dmc
@pytest.mark.algorithms("sac")
def test_help_names_every_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in text for name in script.Args.model_fields)


@on_dmc
@pytest.mark.algorithms("td3")
def test_a_command(script, tmp_path):
    """A directory that cannot be made; nothing else is on stderr."""
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, script.__file__, "--run-dir", "file/run"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 2 and child.stdout == ""
    assert child.stderr.count("\n") == 1 and "file/run" in child.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
