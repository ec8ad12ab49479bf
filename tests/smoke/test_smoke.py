"""Each script trains for a moment on a real task, and leaves behind all that it promises."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import small_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Odd, so that delayed updates do not happen in the very steps that are logged, and enough for MPO
# to copy its target networks.
UPDATES = 101
# Long enough for an episode to end under random actions: cartpole has only its time limit.
TASKS = {"dmc": ("cartpole-swingup", 1050), "gym": ("Hopper-v5", 350)}
CONFIG = {"args", "versions", "commit", "device", "machine", "xla_flags", "resumed"}


class Run(NamedTuple):
    """What one run of a script did."""

    args: Any
    directory: Path
    before: list[np.ndarray]  # the leaves of the state before the first update
    after: list[np.ndarray]  # and after the last
    metrics: list[dict]  # of each update


RUNS: dict[str, Run] = {}


def leaves(state) -> list[np.ndarray]:
    """Copies of all arrays of a state, which is donated to the next update."""
    readable = state._replace(key=jax.random.key_data(state.key))
    return [np.array(x) for x in jax.tree.leaves(readable)]


def train(script, directory: Path) -> Run:
    env_id, steps = TASKS[script.backend]
    args = small_args(
        script, env_id=env_id, run_dir=str(directory), total_timesteps=steps,
        learning_starts=steps - UPDATES, eval_frequency=steps - 50, eval_max_steps=100,
    )  # fmt: skip
    states, metrics = [], []
    learn = script.learn

    def watched_learn(state, *rest):
        if not states:
            states.append(leaves(state))
        state, metric = learn(state, *rest)
        metrics.append(metric)
        states[1:] = [state]
        return state, metric

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "learn", watched_learn)
        script.main(args)
    return Run(args, directory, states[0], leaves(states[1]), metrics)


@pytest.fixture
def run(script, tmp_path_factory) -> Run:
    """The one run of this script that all tests here look at."""
    if script.__name__ not in RUNS:
        RUNS[script.__name__] = train(script, tmp_path_factory.mktemp("smoke") / "run")
    return RUNS[script.__name__]


@pytest.fixture
def scalars(run) -> dict[str, list]:
    """Each tag of the event files with its (step, value, ...) events."""
    events = EventAccumulator(str(run.directory)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.fixture
def evaluations(run) -> list[dict]:
    """The rows of eval.csv."""
    with (run.directory / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def test_learns(run):
    """One update for every step after the warm-up, and each changes all of the state."""
    assert len(run.metrics) == UPDATES
    assert all(np.isfinite(x).all() for x in run.after)
    assert all((x != y).any() for x, y in zip(run.before, run.after, strict=True))


def test_metrics_are_finite(run):
    """Delayed updates leave nan now and then, but no metric is never there."""
    for name in run.metrics[0]:
        assert any(np.isfinite(metric[name]).all() for metric in run.metrics), name


def test_logs_losses(run, scalars):
    """Every metric of an update is logged against environment steps, and readable."""
    logged = {tag for tag in scalars if tag.startswith("losses/")}
    assert logged == {f"losses/{name}" for name in run.metrics[0]}
    args = run.args
    steps = [s for s in range(args.learning_starts + 1, args.total_timesteps + 1) if s % 10 == 0]
    for tag in logged:
        logged_at = [event.step for event in scalars[tag]]
        # Before its first step a delayed network has nothing to log.
        assert logged_at in (steps, steps[1:])
        assert any(math.isfinite(event.value) for event in scalars[tag]), f"{tag} is always nan"


def test_logs_episodes(run, scalars):
    """Episodes of training end where their lengths add up to."""
    lengths = [event.value for event in scalars["charts/episodic_length"]]
    assert [event.step for event in scalars["charts/episodic_return"]] == list(np.cumsum(lengths))
    assert all(event.value > 0 for event in scalars["charts/SPS"])
    assert set(scalars) == {tag for tag in scalars if tag.startswith("losses/")} | {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return",
    }  # fmt: skip


def test_evaluates(run, scalars, evaluations):
    """One row for each episode of the evaluation, whose mean is on the chart."""
    step = run.args.eval_frequency
    assert list(evaluations[0]) == ["global_step", "seed", "episode", "return", "length"]
    keys = [(row["global_step"], row["seed"], row["episode"]) for row in evaluations]
    assert keys == [(str(step), "0", str(i)) for i in range(run.args.eval_episodes)]
    assert all(0 < int(row["length"]) <= run.args.eval_max_steps for row in evaluations)
    (event,) = scalars["eval/episodic_return"]
    assert event.step == step
    assert event.value == pytest.approx(np.mean([float(row["return"]) for row in evaluations]))


def test_writes_config(run):
    """config.json holds what it takes to make the run again."""
    config = json.loads((run.directory / "config.json").read_text())
    assert set(config) == CONFIG
    assert config["args"] == vars(run.args)
    assert config["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "flax", "optax", "numpy", "mujoco"} <= set(config["versions"])
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", config["commit"])
    assert config["device"] and "cores" in config["machine"]
