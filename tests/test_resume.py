"""A run that is stopped in any way goes on as if nothing had happened, to the last bit."""

import contextlib
import functools
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
from conftest import small_args, toys
from running import Killed, exits, parse, points, saved

pytestmark = [pytest.mark.algorithms("td3"), pytest.mark.backends("gym")]

RUN = Path("a run's directory")  # printed commands have to quote it
# Checkpoints at 80, 160, 240 and 300, none of them at the end of an episode.
FLAGS = dict(
    env_id="Toy-v0", run_dir=str(RUN), total_timesteps=300, learning_starts=60, n_step=3,
    layer_norm=False, eval_frequency=100, checkpoint_frequency=80, log_frequency=20,
)  # fmt: skip
IDLE = FLAGS | dict(learning_starts=1000, gamma=0.5)  # without learning


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has an empty directory, episodes of 37 steps and its own handling of signals."""
    monkeypatch.chdir(tmp_path)
    toys(length=37)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    toys(length=37)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        begin(script)
        return RUN.absolute()


@pytest.fixture
def copy(whole) -> Path:
    """A copy of it, here."""
    return Path(shutil.copytree(whole, RUN))


def begin(script, killed_at: int | None = None, **flags):
    running.run(script, small_args(script, **FLAGS | flags), killed_at)


def go_on(script, *words: str, killed_at: int | None = None):
    """`python SCRIPT --run-dir RUN WORDS`, in this process."""
    running.run(script, parse(script, "--run-dir", str(RUN), *words), killed_at)


def assert_same_run(whole: Path):
    running.assert_same_run(whole, RUN)
    assert points(whole) == points(RUN) != set()


def checkpoints() -> list[int]:
    return sorted(int(path.stem) for path in (RUN / "checkpoint").glob("*.npz"))


@pytest.mark.parametrize("step", [50, 81, 190, 239])
def test_a_killed_run_goes_on_exactly(script, whole, step):
    """Also where nothing was saved yet, and when killed again before it is saved once more."""
    begin(script, killed_at=step)
    go_on(script, killed_at=70)
    assert max([0, *checkpoints()]) == step // 80 * 80
    go_on(script)
    assert_same_run(whole)
    assert checkpoints() == [240, 300], "the two newest"


def test_fine_tuning(script, copy, whole):
    """Other step sizes hold from there on, and config.json remembers from which step."""
    go_on(script, "--total-timesteps", "340", "--learning-rate", "1e-30")
    args = small_args(script, **FLAGS)
    before, after = (saved(script, args, x).state.critic for x in (whole, RUN))
    assert int(after.step) == int(before.step) + 40
    a, b = (x.params["params"]["Dense_0"]["kernel"] for x in (before, after))
    np.testing.assert_array_equal(a, b)
    history = json.loads((RUN / "config.json").read_text())["history"]
    rates = {step: x["learning_rate"] for step, x in history.items()}
    assert rates == {"0": args.learning_rate, "300": 1e-30}
    assert parse(script, "--run-dir", str(RUN)).learning_rate == 1e-30


CHANGES = ["--env-id Hopper-v5", "--seed 3", "--action-repeat 2", "--buffer-size 3000"]


@pytest.mark.parametrize("words", [*CHANGES, "--hidden-width 16", "--layer-norm", "another script"])
def test_what_must_stay(script, words, copy, whole, capsys):
    """One sentence, and the run is as it was."""
    if words == "another script":
        text = (RUN / "config.json").read_text()
        (RUN / "config.json").write_text(text.replace('"gamma"', '"no_such_flag"'))
    code, message = exits(capsys, go_on, script, *words.split() if "--" in words else ())
    assert code == 2 and message.count("\n") == 1 and str(RUN) in message
    assert words.split()[0] in message or "sizes" in message or words in message
    assert_same_run(whole)
    assert not list(RUN.rglob("*.damaged"))


@pytest.mark.parametrize("forgetful", [True, False])
def test_an_episode_that_cannot_be_repeated(script, forgetful, capsys):
    """As no seed determines it, or its first actions are lost: a new one, and sums do not join."""

    def answer(toy, outcome):
        obs = np.random.default_rng().uniform(-1, 1, 5) if forgetful else outcome[0]
        return (np.float32(obs), 1.0, *outcome[2:]) if len(outcome) > 2 else (obs, {})

    toys(answer=answer, length=37)
    buffer_size, row = (2000, 50) if forgetful else (20, 10)  # the last 20 of 60 rows
    flags = IDLE | dict(buffer_size=buffer_size)
    begin(script, **flags | dict(total_timesteps=50 if forgetful else 72))
    go_on(script, "--total-timesteps", "60" if forgetful else "82")
    assert "a new one begins" in capsys.readouterr().err
    rows = saved(script, small_args(script, **flags), RUN).rows()
    near = slice(row - 3, row + 3)
    np.testing.assert_array_equal(rows.reward[near], [1.75, 1.5, 1, 1.75, 1.75, 1.75])
    np.testing.assert_array_equal(rows.discount[near], [0.25, 0.5, 1, 0.25, 0.25, 0.25])
    assert not np.array_equal(rows.next_obs[row - 1], rows.obs[row])


@pytest.mark.parametrize(
    "where, length, time, step",
    [("step", 37, 15, 2 * 37 + 14), ("reset", 37, 0, 2 * 37), ("evaluation", 60, 5, 100)],
)
def test_an_environment_that_breaks(script, where, length, time, step, capsys):
    """The last whole step is saved; what fails each time it is repeated is not repeated."""
    seeds = []

    def answer(toy, outcome):
        seeds.extend({toy.seeds[-1]} - {*seeds})
        third = seeds.index(toy.seeds[-1]) == 2  # of training, or an evaluation's first
        if toy.time == time and third:
            raise RuntimeError("The robot fell off the table.")
        return outcome

    toys(answer=answer, length=length)
    code, message = exits(capsys, begin, script, **IDLE | dict(total_timesteps=120))
    assert code == 1 and "The robot fell off the table." in message
    assert f"--run-dir {shlex.quote(str(RUN))}" in message and "Traceback" not in message
    assert max(checkpoints()) == step
    go_on(script, "--eval-frequency", "0")
    buffer = saved(script, small_args(script, **IDLE), RUN).buffer
    assert int(buffer.count) == 120 and int(buffer.began) >= step


def signalling(number: int) -> list:
    """Lets step 110 of training send a signal to this process; returns its handler afterwards."""
    handlers = []

    def answer(toy, outcome):
        if toy.steps == 110 and not handlers:
            signal.raise_signal(number)
            handlers.append(signal.getsignal(number))
        return outcome

    toys(answer=answer, length=37)
    return handlers


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_the_run(script, name, code, whole, monkeypatch, capsys):
    """And the command is printed that goes on with it; a second one ends it at once."""
    handlers = signalling(getattr(signal, name))
    monkeypatch.setattr("sys.argv", ["my agents/td3.py"])
    ended, message = exits(capsys, begin, script)
    assert ended == code and "Stopped at step 110." in message and max(checkpoints()) == 110
    assert handlers == [signal.SIG_DFL]
    words = shlex.split(message[message.index("python ") :])
    assert words == ["python", "my agents/td3.py", "--run-dir", str(RUN)]
    toys(length=37)
    go_on(script)
    assert_same_run(whole)


def test_nohup(script, whole):
    """SIGHUP stays ignored where it was."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalling(signal.SIGHUP)
    begin(script)
    assert_same_run(whole)


def flip_bit(path: Path, place: float):
    """Turns a bit over, at this part of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious-code-was-run",)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
} | {f"bit {place}": functools.partial(flip_bit, place=place) for place in (0.1, 0.5, 0.9)}


@pytest.mark.parametrize("damage", [*DAMAGES, "both"])
def test_a_damaged_checkpoint(script, damage, copy, whole, capsys):
    """A sentence about it, and the one before leads to the same end; nothing in it is executed."""
    paths = sorted((copy / "checkpoint").iterdir())[-1 if damage != "both" else 0 :]
    for path in paths:
        DAMAGES.get(damage, DAMAGES["cut"])(path)
    go_on(script)
    assert capsys.readouterr().err.count("is damaged and passed over") == len(paths)
    assert not Path("malicious-code-was-run").exists()
    assert all(path.with_suffix(".damaged").exists() for path in paths), "they would count as two"
    assert_same_run(whole)


@pytest.mark.parametrize("full", [False, True])
def test_a_checkpoint_that_is_not_written(script, full, whole, monkeypatch, capsys):
    """Killed meanwhile, or no disk left: half a file never takes its place, and older ones stay."""
    savez = np.savez

    def half(file, *args, **kwargs):
        savez(file, *args, **kwargs)
        if checkpoints() == [80, 160]:
            os.truncate(file, Path(file).stat().st_size // 2)
            raise OSError(28, "No space left on device") if full else Killed

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with contextlib.nullcontext() if full else pytest.raises(Killed):
            begin(script)
    assert checkpoints() == [80, 160]
    if full:  # training went on
        message = capsys.readouterr().err
        assert "Step 240 is not saved" in message and "No space left on device" in message
        assert points(RUN) == points(whole)
    go_on(script)
    assert_same_run(whole)
