"""Runs of `main` in this process, how to stop them, and what they leave behind."""

import contextlib
import csv
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

NUMBERS = itertools.count()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script sees it."""


def run(script, args, killed_at: int | None = None):
    """`main`, killed in the action with this number, after the environment's step."""
    insert, actions, writers = script.insert, itertools.count(1), []

    def insert_or_die(*inputs):
        if next(actions) == killed_at:
            raise Killed
        return insert(*inputs)

    def writer(*inputs, **options):
        # Files of the same second would have the same name; the end of a process closes them.
        writers.append(SummaryWriter(*inputs, **options, filename_suffix=f".{next(NUMBERS)}"))
        return writers[-1]

    # The checks of conftest.py take a third of the time; the tests of the mathematics have them on.
    with pytest.MonkeyPatch.context() as patch, jax.debug_key_reuse(False):
        patch.setattr(script, "insert", insert_or_die)
        patch.setattr(script, "SummaryWriter", writer)
        try:
            with pytest.raises(Killed) if killed_at else contextlib.nullcontext():
                script.main(args)
        finally:
            for opened in writers:
                opened.close()


def parse(script, *words: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *words])
        return script.parse_args()


def exits(capsys, function, *inputs, **flags) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        function(*inputs, **flags)
    return end.value.code, capsys.readouterr().err


class Saved(NamedTuple):
    """The newest checkpoint of a run."""

    buffer: Any
    state: Any
    results: np.ndarray  # [n, 5] the rows of eval.csv

    def rows(self) -> Any:
        """The transitions in the buffer, in the order in which they came."""
        count, size = int(self.buffer.count), len(self.buffer.data.reward)
        index = np.arange(max(0, count - size), count) % size
        return jax.tree.map(lambda x: np.asarray(x)[index], self.buffer.data)


def saved(script, args, run_dir: str | Path = "run") -> Saved:
    env = script.Interface(args)
    sizes = env.obs_dim, env.low.size, args
    with jax.debug_key_reuse(False):
        state = script.init(jax.random.key(0), *sizes)
    return Saved(*script.load(Path(run_dir), script.make_buffer(*sizes), state, np.zeros((0, 5))))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def newest(run_dir: Path) -> dict[str, np.ndarray]:
    return arrays(max((run_dir / "checkpoint").glob("*.npz")))


def scalars(run_dir: Path) -> dict[str, list]:
    """Steps and values of every tag of the event files, but for the speed."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag != "charts/SPS"}
    return {tag: [(event.step, event.value) for event in found[tag]] for tag in found}


def evaluations(run_dir: Path) -> list[dict]:
    """The rows of eval.csv, which ends with a whole line."""
    text = (run_dir / "eval.csv").read_text()
    assert text.startswith("global_step,seed,episode,return,length\n") and text.endswith("\n")
    return list(csv.DictReader(text.splitlines()))


def assert_same_run(a: Path, b: Path):
    """To the last bit: networks, optimisers, buffer, moments, evaluations, policy."""
    np.testing.assert_equal(newest(a), newest(b))
    np.testing.assert_equal(arrays(a / "policy.npz"), arrays(b / "policy.npz"))
    assert (a / "eval.csv").read_bytes() == (b / "eval.csv").read_bytes()


def points(run_dir: Path) -> set[tuple]:
    """What is on the charts; of losses, means over updates since the run went on, the steps."""
    found = scalars(run_dir).items()
    return {(tag, step, "loss" in tag or value) for tag, values in found for step, value in values}
