"""A run that is stopped in any way goes on as if nothing had happened, to the last bit.

The scripts share the text of all this; test_scripts.py kills real processes of each algorithm.
"""

import json
import os
import pickle
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import running
from conftest import Toy, small_args
from running import Killed, assert_same_run, newest, parse, saved, scalars

pytestmark = [pytest.mark.algorithms("td3"), pytest.mark.backends("gym")]

RUN = Path("a run's directory")  # printed commands have to quote it
# Checkpoints at 80, 160, 240 and 300, none of them at the end of an episode.
FLAGS = dict(
    env_id="Toy-v0", run_dir=str(RUN), total_timesteps=300, learning_starts=60, n_step=3,
    layer_norm=False, eval_frequency=100, checkpoint_frequency=80, log_frequency=20,
)  # fmt: skip
IDLE = FLAGS | dict(learning_starts=1000)  # without learning, where that does not matter


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has an empty directory and Python's own handling of signals."""
    monkeypatch.chdir(tmp_path)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def toy(toys) -> list[Toy]:
    return toys(length=37)


WHOLE: dict[str, Path] = {}


@pytest.fixture
def whole(script, toy, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    if script.__name__ not in WHOLE:
        WHOLE[script.__name__] = tmp_path_factory.mktemp("whole") / RUN
        begin(script)
        shutil.move(RUN, WHOLE[script.__name__])
    toy.clear()
    return WHOLE[script.__name__]


@pytest.fixture
def copy(whole) -> Path:
    """A copy of it, here."""
    return Path(shutil.copytree(whole, RUN))


def begin(script, killed_at: int | None = None, **flags):
    running.run(script, small_args(script, **FLAGS | flags), killed_at)


def go_on(script, *words: str, killed_at: int | None = None):
    """`python SCRIPT --run-dir RUN WORDS`, in this process."""
    running.run(script, parse(script, "--run-dir", str(RUN), *words), killed_at)


def ends(script, capsys, *words: str) -> tuple[int, str]:
    """The exit code of such a command that does not succeed, and what it says."""
    with pytest.raises(SystemExit) as end:
        go_on(script, *words)
    return end.value.code, capsys.readouterr().err


def checkpoints(run_dir: Path = RUN) -> list[int]:
    return sorted(int(path.stem) for path in (run_dir / "checkpoint").glob("*.npz"))


def history(run_dir: Path = RUN) -> dict[str, dict]:
    return json.loads((run_dir / "config.json").read_text())["history"]


# --- to the last bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [81, 190, 239])
def test_killed_run_goes_on_exactly(script, whole, step):
    """Killed twice, the second time before a new checkpoint; logs have what was logged once."""
    begin(script, killed_at=step)
    go_on(script, killed_at=70)
    assert max(checkpoints()) == step // 80 * 80 + (70 > 80)
    go_on(script)
    assert_same_run(whole, RUN)
    assert checkpoints() == checkpoints(whole) == [240, 300], "the two newest"


def test_killed_before_its_first_checkpoint(script, whole):
    begin(script, killed_at=50)
    go_on(script)
    assert_same_run(whole, RUN)


def test_going_further(script, whole):
    begin(script, total_timesteps=150)
    go_on(script, "--total-timesteps", "300")
    assert_same_run(whole, RUN)
    assert [x["total_timesteps"] for x in history().values()] == [150, 300]
    go_on(script, "--total-timesteps", "300")  # which is nothing to do
    assert_same_run(whole, RUN)


def test_fine_tuning(script, copy, whole):
    """Other step sizes hold from there on, and config.json remembers from which step."""
    go_on(script, "--total-timesteps", "340", "--learning-rate", "1e-30")
    args = small_args(script, **FLAGS)
    before, after = saved(script, args, whole), saved(script, args, RUN)
    assert int(after.state.critic.step) == int(before.state.critic.step) + 40
    a, b = (x.state.critic.params["params"]["Dense_0"]["kernel"] for x in (before, after))
    np.testing.assert_array_equal(a, b)
    rates = {step: x["learning_rate"] for step, x in history().items()}
    assert rates == {"0": args.learning_rate, "300": 1e-30}
    assert parse(script, "--run-dir", str(RUN)).learning_rate == 1e-30


@pytest.mark.parametrize(
    "words",
    ["--env-id Hopper-v5", "--seed 3", "--action-repeat 2", "--buffer-size 3000",
     "--hidden-width 16", "--layer-norm"],
)  # fmt: skip
def test_what_must_stay(script, words, copy, whole, capsys):
    """One sentence, and the run is as it was."""
    code, message = ends(script, capsys, *words.split())
    assert code == 2 and message.count("\n") == 1 and str(RUN) in message
    assert words.split()[0] in message or "sizes" in message
    assert_same_run(whole, RUN)
    assert not list(RUN.rglob("*.damaged"))


def test_the_run_of_another_script(script, capsys):
    RUN.mkdir()
    (RUN / "config.json").write_text('{"args": {"no_such_flag": 1}, "history": {}}')
    code, message = ends(script, capsys)
    assert code == 2 and str(RUN) in message and message.count("\n") == 1


# --- environments ---------------------------------------------------------------------------------


def assert_new_episode(script, flags: dict, before: int):
    """Sums of rewards of 1 with gamma 1/2 do not join the episodes before and after a row."""
    rows = saved(script, small_args(script, **flags), RUN).rows()
    near = slice(before - 3, before + 3)
    np.testing.assert_array_equal(rows.reward[near], [1.75, 1.5, 1, 1.75, 1.75, 1.75])
    np.testing.assert_array_equal(rows.discount[near], [0.25, 0.5, 1, 0.25, 0.25, 0.25])
    assert not np.array_equal(rows.next_obs[before - 1], rows.obs[before])


def forget(toy, outcome):
    """Observations that no seed determines, and rewards of 1."""
    obs = np.random.default_rng().uniform(-1, 1, 5).astype(np.float32)
    return (obs, *outcome[1:]) if len(outcome) == 2 else (obs, 1.0, *outcome[2:])


def test_an_environment_that_does_not_repeat_itself(script, toys, capsys):
    """Goes on with a new episode, and says so."""
    toys(answer=forget, length=37)
    flags = IDLE | dict(gamma=0.5)
    begin(script, **flags | dict(total_timesteps=50))
    go_on(script, "--total-timesteps", "60")
    assert "Toy-v0 does not repeat its episode" in capsys.readouterr().err
    assert_new_episode(script, flags, 50)


def test_an_episode_longer_than_the_buffer(script, toys, capsys):
    """Its first actions are lost, so it cannot be repeated."""
    toys(answer=lambda toy, x: x if len(x) == 2 else (x[0], 1.0, *x[2:]), length=37)
    flags = IDLE | dict(gamma=0.5, buffer_size=20)
    begin(script, **flags | dict(total_timesteps=72))
    go_on(script, "--total-timesteps", "80")
    assert "a new one begins" in capsys.readouterr().err
    assert_new_episode(script, flags, 12)  # the last 20 of 80 rows are there


@pytest.mark.parametrize("where", ["step", "reset", "evaluation"])
def test_an_environment_that_breaks(script, where, toys, capsys):
    """The last whole step is saved; what fails each time it is repeated is not repeated."""
    seeds = []

    def answer(toy, outcome):
        toy_is_for_training = toy is made[0] or toy is made[-1] and len(history()) > 1
        if toy.seeds[-1] not in seeds:
            seeds.append(toy.seeds[-1])
        third = seeds[2:3] == [toy.seeds[-1]]
        broken = {
            "step": toy.time == 15 and third,
            "reset": toy.time == 0 and third,
            "evaluation": toy.time == 5 and not toy_is_for_training,
        }
        if broken[where]:
            raise RuntimeError("The robot fell off the table.")
        return outcome

    made = toys(answer=answer, length=37)
    steps = {"step": 2 * 37 + 14, "reset": 2 * 37, "evaluation": 100}[where]
    with pytest.raises(SystemExit) as end:
        begin(script, **IDLE | dict(total_timesteps=120, eval_frequency=100))
    message = capsys.readouterr().err
    assert end.value.code == 1 and "The robot fell off the table." in message
    assert f"--run-dir {shlex.quote(str(RUN))}" in message and "Traceback" not in message
    assert max(checkpoints()) == steps
    if where == "evaluation":
        return go_on(script)
    go_on(script, "--eval-frequency", "0")
    args = small_args(script, **IDLE)
    assert int(saved(script, args, RUN).buffer.count) == 120


# --- signals --------------------------------------------------------------------------------------


def send(number: signal.Signals, step: int):
    """An answer that sends a signal to this process in a step of training."""

    def answer(toy, outcome):
        if toy.steps == step and not toy.sent:
            toy.sent.append(number)
            signal.raise_signal(number)
            toy.sent.append(signal.getsignal(number))
        return outcome

    return answer


class Signalling(Toy):
    """A Toy that notes which signal it sent, and its handler afterwards."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sent = []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_the_run(script, number, code, whole, toys, capsys):
    """And prints the command that goes on with it; a second one ends it at once."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        made = toys(Signalling, answer=send(number, 110), length=37)
        patch.setattr("sys.argv", ["my agents/td3.py"])
        begin(script)
    message = capsys.readouterr().err
    assert end.value.code == code and "Stopped at step 110." in message
    assert made[0].sent == [number, signal.SIG_DFL] and max(checkpoints()) == 110
    words = shlex.split(message[message.index("python ") :])
    assert words == ["python", "my agents/td3.py", "--run-dir", str(RUN)]
    toys(length=37)
    go_on(script)
    assert_same_run(whole, RUN)


def test_nohup(script, whole, toys):
    """SIGHUP stays ignored where it was."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    made = toys(Signalling, answer=send(signal.SIGHUP, 110), length=37)
    begin(script)
    assert made[0].sent == [signal.SIGHUP, signal.SIG_IGN]
    assert_same_run(whole, RUN)


# --- damaged files --------------------------------------------------------------------------------


def flip_bit(path: Path, place: float):
    """Turns a bit over, at this part of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious-code-was-run",)


def with_objects(path: Path):
    """Replaces an array by one that only pickle can read."""
    found = running.arrays(path)
    name = sorted(found)[-1]
    np.savez(path, **found | {name: np.array([Malicious()], object)})


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "bit 10 %": lambda path: flip_bit(path, 0.1),
    "bit 50 %": lambda path: flip_bit(path, 0.5),
    "bit 90 %": lambda path: flip_bit(path, 0.9),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "objects": with_objects,
    "other": lambda path: path.write_text("something else"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(script, damage, copy, whole, capsys):
    """A sentence about it, and the one before leads to the same end; nothing in it is executed."""
    (newest_one,) = (copy / "checkpoint").glob("*300.npz")
    DAMAGES[damage](newest_one)
    go_on(script)
    assert "300.npz is damaged and passed over" in capsys.readouterr().err
    assert not Path("malicious-code-was-run").exists()
    assert newest_one.with_suffix(".damaged").exists(), "it would count as one of the two"
    assert_same_run(whole, RUN)


def test_nothing_but_damaged_checkpoints(script, copy, whole, capsys):
    for path in (copy / "checkpoint").iterdir():
        DAMAGES["cut"](path)
    go_on(script)
    assert capsys.readouterr().err.count("is damaged and passed over") == 2
    assert_same_run(whole, RUN)


def test_killed_while_writing(script, whole, monkeypatch):
    """Half a file never takes the place of a checkpoint."""
    savez, calls = np.savez, []

    def half(file, *args, **kwargs):
        savez(file, *args, **kwargs)
        calls.append(file)
        if len(calls) == 5:  # a checkpoint and a policy each time
            os.truncate(file, Path(file).stat().st_size // 2)
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "savez", half)
        begin(script)
    assert checkpoints() == [80, 160]
    go_on(script)
    assert_same_run(whole, RUN)
    assert checkpoints() == [240, 300]


def test_a_full_disk(script, whole, monkeypatch, capsys):
    """Checkpoints stop with a sentence, training goes on, and what was saved before is kept."""
    savez = np.savez

    def full(file, *args, **kwargs):
        if checkpoints() == [80, 160]:
            raise OSError(28, "No space left on device")
        savez(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        begin(script)
    message = capsys.readouterr().err
    assert "Step 240 is not saved" in message and "No space left on device" in message
    assert checkpoints() == [80, 160] and scalars(RUN) == scalars(whole)
    go_on(script)
    assert_same_run(whole, RUN)


def test_what_a_checkpoint_holds(script, whole):
    """Every array is finite, and the buffer takes no more room than the rows it has."""
    found = newest(whole)
    assert all(np.isfinite(x).all() for x in found.values())
    assert max(len(x) for x in found.values() if x.ndim) == 300 < small_args(script).buffer_size
