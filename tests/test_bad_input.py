"""Every mistake in the flags is told at once: what is wrong, with which flag, and exit code 2."""

import subprocess
import sys

import pytest
from running import exits, parse

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
UNKNOWN = [("no_such_flag", "3"), ("layer_norm", "False"), ("num_seeds", "5")]

pytestmark = pytest.mark.backends("dmc")


def refused(script, capsys, *words: str) -> str:
    code, message = exits(capsys, parse, script, *words)
    assert code == 2 and "Traceback" not in message and "http" not in message
    return message.replace("_", "-")


def test_values_and_flags_that_do_not_exist(script, capsys):
    fields = script.Args.model_fields
    numbers = {name for name, field in fields.items() if type(field.default) in (int, float)}
    assert numbers - {*POSITIVE, *NOT_NEGATIVE} <= {"log_std_min", "log_std_max"}, "not tried"
    for name, value in BAD_VALUES + UNKNOWN:
        if name in fields or (name, value) in UNKNOWN:
            flag = name.replace("_", "-")
            message = refused(script, capsys, f"--{flag}", value)
            assert flag in message or (value in message and name not in numbers), value


def test_every_number_arrives_as_a_number(script):
    numbers = {k: v for k, v in parse(script).model_dump().items() if type(v) in (int, float)}
    given = {k: 0.25 if isinstance(v, float) else 1000 for k, v in numbers.items()}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    parsed = parse(script, *words).model_dump()
    assert {k: repr(parsed[k]) for k in given} == {k: repr(v) for k, v in given.items()}


@pytest.mark.algorithms("td3")
def test_a_command(script, tmp_path):
    """A directory that cannot be made; nothing else is on stderr."""
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, script.__file__, "--run-dir", "file/run"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 2 and child.stdout == ""
    assert child.stderr.count("\n") == 1 and "file/run" in child.stderr
