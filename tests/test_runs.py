"""Runs can be made again: what is random, what is not, and how often anything is compiled."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import small_args

TASKS = {"dmc": "cartpole-swingup", "gym": "Hopper-v5"}
STEPS, WARM_UP = 140, 40
FLAGS = dict(
    total_timesteps=STEPS, learning_starts=WARM_UP, eval_frequency=70, eval_max_steps=20,
    seed=5, run_dir="run",
)  # fmt: skip
RANDOM_FUNCTIONS = ("normal", "uniform", "randint", "truncated_normal", "categorical", "choice")


class Run(NamedTuple):
    """All that a run computed."""

    state: Any  # after the last update
    rows: np.ndarray  # [T, S, ...] transitions as inserted into the buffer
    metrics: dict[str, np.ndarray]  # [updates, S] of each metric
    eval_csv: bytes
    env_seeds: list[int]
    compiled: dict[str, int]  # how often each jitted function was

    @property
    def actions(self) -> np.ndarray:
        obs_dim = self.state.moments.mean.shape[-1]
        return self.rows[:, :, obs_dim : -obs_dim - 3]


def record(function, calls: list):
    """The function, but every call appends its arguments and its result."""

    def recorded(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    return recorded


def jitted(script) -> dict:
    return {name: x for name, x in vars(script).items() if hasattr(x, "_cache_size")}


def run(script, directory: Path, **changes) -> Run:
    """Runs `main` in a directory; the same flags are compiled once for all such runs."""
    args = small_args(script, **(FLAGS | {"env_id": TASKS[script.backend]} | changes))
    directory.mkdir()
    functions, calls = jitted(script), {"learn": [], "insert": [], "make_env": []}
    before = {name: function._cache_size() for name, function in functions.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for name, seen in calls.items():
            patch.setattr(script, name, record(getattr(script, name), seen))
        script.main(args)
    metrics = [metrics for _, (_, metrics) in calls["learn"]]
    return Run(
        state=calls["learn"][-1][1][0],
        rows=np.stack([args[2] for args, _ in calls["insert"]]),
        metrics=jax.tree.map(lambda *x: np.stack(x), *metrics),
        eval_csv=(directory / "run" / "eval.csv").read_bytes(),
        env_seeds=[args[1] for args, _ in calls["make_env"]],
        compiled={name: x._cache_size() - before[name] for name, x in functions.items()},
    )


def leaves(state) -> list[np.ndarray]:
    readable = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(x) for x in jax.tree.leaves(readable)]


def assert_same_training(a: Run, b: Run):
    """Equal to the last bit: transitions, metrics and the final state with key and optimizers."""
    np.testing.assert_array_equal(a.rows, b.rows)
    jax.tree.map(np.testing.assert_array_equal, a.metrics, b.metrics)
    jax.tree.map(np.testing.assert_array_equal, leaves(a.state), leaves(b.state))


BASELINES: dict[str, Run] = {}


@pytest.fixture
def baseline(script, tmp_path_factory) -> Run:
    """The one run of this script that others are compared with."""
    if script.__name__ not in BASELINES:
        jax.clear_caches()
        directory = tmp_path_factory.mktemp("baseline") / "first"
        BASELINES[script.__name__] = run(script, directory)
    return BASELINES[script.__name__]


# --- one seed -------------------------------------------------------------------------------------


def test_compiles_once(baseline):
    """One trace of every jitted function in a whole run."""
    assert {"init", "act", "explore", "insert", "learn"} <= set(baseline.compiled)
    assert set(baseline.compiled.values()) == {1}, baseline.compiled


def test_same_seed_same_run(script, baseline, tmp_path):
    again = run(script, tmp_path / "again")
    assert_same_training(baseline, again)
    assert again.eval_csv == baseline.eval_csv and again.eval_csv.count(b"\n") == 1 + 2 * 2


def test_evaluation_changes_no_training(script, baseline, tmp_path):
    never = run(script, tmp_path / "never", eval_frequency=0)
    assert_same_training(baseline, never)
    assert never.eval_csv.count(b"\n") == 1


def test_evaluation_is_greedy_and_fixed(script, monkeypatch):
    """The same policy has the same returns whatever the training's key, and never explores."""
    args = small_args(script, env_id=TASKS[script.backend], eval_max_steps=30)
    envs = script.Environments(args, range(args.eval_episodes))
    state = script.init(np.array([0]), envs.obs_dim, envs.action_dim, args)
    monkeypatch.setattr(script, "explore", None)
    first = script.evaluate(state, envs, args)
    envs.step(np.zeros((args.eval_episodes, envs.action_dim)))
    keys = jax.random.split(jax.random.key(99), 1)
    np.testing.assert_array_equal(first, script.evaluate(state._replace(key=keys), envs, args))
    assert len(np.unique(first[0])) == args.eval_episodes, "episodes are different ones"


# --- several seeds --------------------------------------------------------------------------------


class Group(NamedTuple):
    run: Run
    draws: list[tuple]  # the data of every key from which the device drew random numbers


GROUPS: dict[str, Group] = {}


def record_draws(patch) -> list[tuple]:
    """Lets every function of `jax.random` that draws numbers append the data of its key."""
    draws = []

    def recorded(function):
        def draw(key, *args, **kwargs):
            add = lambda data: draws.append(tuple(data.tolist()))  # noqa: E731
            jax.debug.callback(add, jax.random.key_data(key))
            return function(key, *args, **kwargs)

        return draw

    for name in RANDOM_FUNCTIONS:
        patch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
    return draws


@pytest.fixture
def group(script, tmp_path_factory) -> Group:
    """Seeds 3 to 6 side by side; the baseline is seed 5."""
    if script.__name__ not in GROUPS:
        with pytest.MonkeyPatch.context() as patch:
            draws = record_draws(patch)
            directory = tmp_path_factory.mktemp("group") / "first"
            result = run(script, directory, seed=3, num_seeds=4)
            jax.effects_barrier()
        GROUPS[script.__name__] = Group(result, draws)
    return GROUPS[script.__name__]


def test_seed_in_a_group_is_the_seed_alone(group, baseline):
    """Over a hundred updates; before the first of them to the last bit."""
    ours = jax.tree.map(lambda x: np.asarray(x)[2:3], leaves(group.run.state))
    np.testing.assert_array_equal(group.run.rows[:WARM_UP, 2:3], baseline.rows[:WARM_UP])
    np.testing.assert_allclose(group.run.rows[:, 2:3], baseline.rows, rtol=1e-3, atol=1e-3)
    for name, metric in baseline.metrics.items():
        assert len(metric) == STEPS - WARM_UP
        np.testing.assert_allclose(group.run.metrics[name][:, 2:3], metric, rtol=1e-3, atol=1e-3)
    for x, y in zip(ours, leaves(baseline.state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_no_key_is_used_twice(group):
    """Neither by two seeds nor by one seed at two times: exploration, minibatches, updates."""
    per_update = 3  # an action, the indices of a minibatch, the target's noise or action
    assert len(group.draws) >= 4 * (STEPS - WARM_UP) * per_update
    assert len(set(group.draws)) == len(group.draws)


def test_no_seed_shares_an_environment(group):
    """Training and evaluation environments of all seeds have seeds of their own."""
    seeds = group.run.env_seeds
    assert len(set(seeds)) == len(seeds) == 4 * (1 + FLAGS.get("eval_episodes", 2))
    first_rows = group.run.rows[0]
    assert len(np.unique(first_rows, axis=0)) == 4


def test_no_seed_shares_an_action(group):
    """Random in the warm-up, and afterwards too, in every dimension."""
    warm_up, explored = group.run.actions[:WARM_UP], group.run.actions[WARM_UP:]
    assert len(np.unique(warm_up)) == warm_up.size
    inside = explored[np.abs(explored) < 1]  # a clipped action is no random number
    assert len(np.unique(inside)) > 0.99 * inside.size


def test_no_seed_shares_a_network(script):
    """The first weights of the seeds differ in every matrix, and so do a seed's two critics."""
    state = script.init(np.arange(4), 5, 2, small_args(script))
    for x in jax.tree.leaves((state.actor, state.critic)):
        matrices = np.asarray(x).reshape(-1, *x.shape[-2:])
        if matrices.any() and not (matrices == 1).all():  # neither biases nor LayerNorm's scales
            assert len(np.unique(matrices, axis=0)) == len(matrices) >= 4
