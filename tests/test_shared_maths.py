"""What algorithms have in common, each on one backend, or all six scripts: on one of them."""

from types import SimpleNamespace

import jax
import numpy as np
import oracles
import pytest
from conftest import SMALL, small_args
from scipy import stats

from oracles import (  # isort: skip
    ACT, BATCH, DESCENT, LEARNING, OBS, REST, always, assert_close, assert_equal, compiled,
    difference, explore, finite_differences, float64, gaussian_actor, init, plain_args, moved,
    noiseless, optimised, params_of, perturbed, perturbed_state, random_batch, replaced, shapes,
    step_sizes, update,
)  # fmt: skip

pytestmark = pytest.mark.backends("dmc")
ONE_SCRIPT = pytest.mark.algorithms("sac")


@pytest.fixture(params=[False, True])
def descent(script, request, monkeypatch):
    """Flags, a minibatch, and what an update of small networks without noise makes of a state."""
    monkeypatch.setitem(SMALL, "clipped_double_q", request.param)  # MPO has the mean always
    flags = noiseless(script) | always(script)
    args = small_args(script, hidden_width=3, layer_norm=script.algorithm == "mpo", **flags)
    old, batch = optimised(perturbed_state(script, args), DESCENT), random_batch(script)
    return args, batch, old, *update(script, old, batch, args)


def test_the_critics_descend_the_error_to_a_fixed_target(script, descent):
    """The reward and the discounted smaller value, or their mean, of the target networks."""
    args, batch, old, new, metrics = descent
    obs, action, reward, discount, next_obs = float64(batch)
    slow_actor = old.target_actor if "target_actor" in old._fields else old.actor.params
    next_action = oracles.greedy(script, float64(slow_actor), next_obs)
    next_q = oracles.q_values(float64(old.target_critic), next_obs, next_action, args)
    next_v = (next_q.min if getattr(args, "clipped_double_q", False) else next_q.mean)(axis=0)
    target = reward + args.gamma * discount * next_v

    def loss(critic):
        return np.square(oracles.q_values(critic, obs, action, args) - target).mean(axis=1).sum()

    gradient = difference(old.critic.params, new.critic.params)
    assert_close(gradient, finite_differences(loss, old.critic.params), rtol=1e-4)
    np.testing.assert_allclose(metrics["qf_loss"], loss(float64(old.critic.params)), rtol=1e-5)


@pytest.mark.algorithms("td3", "sac")  # MPO improves its policy another way, and copies targets
def test_the_actor_ascends_the_critics_just_updated_and_targets_follow_by_tau(script, descent):
    """TD3's the first critic, SAC's the smaller or the mean; targets what networks have become."""
    args, batch, old, new, _ = descent
    obs, critic = float64(batch.obs), float64(new.critic.params)

    def loss(actor):
        q = oracles.q_values(critic, obs, oracles.greedy(script, actor, obs), args)
        q = q[:1] if script.algorithm == "td3" else q
        return -(q.min if args.clipped_double_q else q.mean)(axis=0).mean()

    gradient = difference(old.actor.params, new.actor.params)
    assert_close(gradient, finite_differences(loss, old.actor.params), rtol=2e-4)
    for name in [name for name in new._fields if name.startswith("target_")]:
        network = params_of(new, name.removeprefix("target_"))
        mixed = lambda x, y: (1 - args.tau) * x + args.tau * y
        assert_close(getattr(new, name), jax.tree.map(mixed, getattr(old, name), network))


def test_the_first_step_of_adam_is_the_step_size_of_its_network(script):
    """Nothing changes its shape or type, and metrics are scalar."""
    rates = dict(actor=1e-3, critic=2e-3, duals=3e-3)
    args = small_args(script, **step_sizes(script, **rates), **always(script))
    actor = rates["critic" if script.algorithm == "td3" else "actor"]
    rates |= dict(actor=actor, alpha=actor)
    old = init(script, args)
    new, metrics = update(script, old, random_batch(script), args)
    for name in rates.keys() & set(new._fields):
        steps = difference(params_of(old, name), params_of(new, name))
        largest = max(np.abs(x).max() for x in jax.tree.leaves(steps))
        np.testing.assert_allclose(largest, rates[name], rtol=1e-2)
    assert shapes(new) == shapes(old)
    assert {x.shape for x in metrics.values()} == {()}


def test_networks_start_apart_and_their_targets_with_them(script):
    args = small_args(script)
    state, other = init(script, args), init(script, args, seed=1)
    assert moved(*(jax.tree.map(lambda x: x[i], state.critic.params) for i in range(2)))
    for name in ("actor", "critic"):
        assert moved(params_of(state, name), params_of(other, name))
        if f"target_{name}" in state._fields:
            assert_equal(getattr(state, f"target_{name}"), params_of(state, name))


@pytest.mark.parametrize("normalize_obs", [True, False])
def test_both_ways_of_acting_see_normalised_observations_and_bound_the_mean(script, normalize_obs):
    """The exported policy in NumPy, and exploring where its noise is nothing."""
    args = small_args(script, normalize_obs=normalize_obs, **noiseless(script))
    obs = np.random.default_rng(0).normal(3, 2, (BATCH, OBS)).astype(np.float32)
    obs[0] = [1e6, -1e6, 3, 5, 1]
    moments = dict(mean=np.full(OBS, 3, np.float32), var=np.full(OBS, 4, np.float32))
    buffer = script.make_buffer(OBS, ACT, args)._replace(**moments)
    state, env = init(script, args), SimpleNamespace(low=-np.ones(ACT), high=np.ones(ACT))
    state = replaced(state, actor=perturbed(state.actor.params))
    policy = script.export(state, buffer, env, args)
    seen = np.clip((np.float64(obs) - 3) / 2, -10, 10) if normalize_obs else np.float64(obs)
    for x, action in zip(obs, oracles.greedy(script, float64(state.actor.params), seen)):
        np.testing.assert_allclose(script.greedy_action(policy, x), action, atol=2e-5)
        np.testing.assert_allclose(explore(script, state, buffer, args, x), action, atol=2e-5)


def test_exploring_draws_a_new_action_in_the_box_at_every_step_and_of_every_run(script):
    """Once learning has started; before, the actor has no part in it."""
    args = small_args(script)
    buffer, steps = script.make_buffer(OBS, ACT, args), args.learning_starts + np.arange(-1, 2)
    states = init(script, args), init(script, args, 1)

    def actions(state, seed):
        return explore(script, states[state], buffer, args, step=steps, seed=seed)

    assert len(np.unique([actions(0, 0), actions(0, 1)])) == 2 * actions(0, 0).size
    assert np.abs(actions(0, 0)).max() <= 1
    other = (actions(1, 0) != actions(0, 0)).any(axis=1)
    assert_equal(other, steps > args.learning_starts)


@pytest.mark.parametrize("learning", [False, True])
def test_exploring_samples_the_gaussian_of_the_policy_and_at_first_the_box(script, learning):
    """SAC squashes its samples, the others clip them; TD3's deviation is a flag's."""
    mean, std = np.array([0.0, 0.9, -0.5]), np.array([0.2, 0.5, 0.05])
    flags = dict(learning_starts=LEARNING)
    if script.algorithm == "td3":
        std[:] = flags["exploration_noise"] = 0.3
    args = plain_args(script, **flags)
    state = replaced(init(script, args), actor=gaussian_actor(script, mean, std, args))
    buffer, steps = script.make_buffer(OBS, ACT, args), np.arange(5_003) + (LEARNING + 1) * learning
    action = explore(script, state, buffer, args, step=steps)
    shares = np.array([[0.05], [0.3], [0.5], [0.7], [0.95]])
    wanted, scale = np.tile(2 * shares - 1, ACT), 0.5
    if learning:
        wanted, scale = stats.norm.ppf(shares, mean, std), std
        wanted = np.tanh(wanted) if script.algorithm == "sac" else np.clip(wanted, -1, 1)
    found = np.quantile(action, shares[:, 0], axis=0)
    np.testing.assert_allclose((found - wanted) / scale, 0, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(action.T), np.eye(ACT), atol=0.06)
    assert np.abs(action).max() <= 1


def random_transitions(script, number: int, mean: float = 0.0):
    """Transitions; the first entry of the action tells which one it is."""
    data = random_batch(script, number)
    data.action[:, 0] = np.arange(number)
    obs = np.random.default_rng(0).normal(mean, 0.5, (number, OBS))
    return data._replace(obs=np.float32(obs), discount=np.ones(number, np.float32))


def row(transitions, t: int):
    return jax.tree.map(lambda x: x[t], transitions)


def fill(script, transitions, args, ends=()):
    """A buffer after every insertion, one by one; episodes end with the transitions `ends`."""
    buffer = script.make_buffer(OBS, ACT, args)
    for t in range(len(transitions.obs)):
        buffer = script.insert(buffer, row(transitions, t), args)
        if t in ends:
            buffer = script.next_episode(buffer)
        yield buffer


@ONE_SCRIPT
def test_running_moments_go_on_moving_after_a_million_observations(script):
    """Where the mean is 33 or 100 standard deviations, steps are below the rounding of float32."""
    before, number, args = 1_000_000, 200_000, small_args(script, buffer_size=13)
    mean = np.float64([0, 33, -33, 100, -100])
    obs = np.float32(np.random.default_rng(0).normal(mean + 1, 2, (number, OBS)))
    empty = script.make_buffer(OBS, ACT, args)
    buffer = empty._replace(count=empty.count + before, mean=np.float32(mean))  # variance is 1
    blank = row(empty.data, 0)

    def step(buffer, obs):
        return script.insert(buffer, blank._replace(obs=obs), args), None

    buffer, _ = jax.jit(lambda *x: jax.lax.scan(step, *x))(buffer, obs)
    obs = np.float64(obs)
    expected = (before * mean + obs.sum(axis=0)) / (before + number)
    np.testing.assert_allclose(buffer.mean, expected, rtol=0, atol=2e-3)
    squares = before * (1 + (mean - expected) ** 2) + np.square(obs - expected).sum(axis=0)
    np.testing.assert_allclose(buffer.var, squares / (before + number), rtol=2e-3)


@ONE_SCRIPT
@pytest.mark.parametrize("number", [1, 2, 50])
def test_the_latest_transitions_are_sampled_uniformly_and_normalised(script, number):
    args = small_args(script, buffer_size=13, batch_size=2000)
    transitions = random_transitions(script, number, mean=3)
    *_, buffer = fill(script, transitions, args)
    mean, std = transitions.obs.mean(axis=0), transitions.obs.std(axis=0)
    np.testing.assert_allclose(buffer.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(buffer.var, std**2, rtol=1e-3, atol=1e-6)
    batch = compiled(script.sample)(buffer, jax.random.key(0), args=args)
    index = np.asarray(batch.action[:, 0], int)
    drawn, counts = np.unique(index, return_counts=True)
    assert_equal(drawn, np.arange(max(0, number - 13), number))
    expected = 2000 / len(drawn)
    assert np.square(counts - expected).sum() / expected < 2 * len(drawn) + 10  # chi-squared

    def seen(obs):
        return np.clip((obs[index] - mean) / (std + 1e-6), -10, 10)

    for name in ("action", "reward", "discount"):
        assert_equal(getattr(batch, name), getattr(transitions, name)[index])
    np.testing.assert_allclose(batch.obs, seen(transitions.obs), atol=1e-3)
    np.testing.assert_allclose(batch.next_obs, seen(transitions.next_obs), rtol=1e-3, atol=1e-3)


def n_step_target(transitions, start: int, now: int, ends, args):
    """Reward, discount and next observation of a transition, by a loop in float64."""
    reward, t = 0.0, start
    while True:
        reward += args.gamma ** (t - start) * float(transitions.reward[t])
        if t in ends or t == now or t == start + args.n_step - 1:
            discount = args.gamma ** (t - start) * float(transitions.discount[t])
            return reward, discount, transitions.next_obs[t]
        t += 1


@ONE_SCRIPT
@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("number, size", [(30, 50), (67, 20), (50, 7)])
def test_targets_of_n_steps_are_those_of_a_loop_over_episodes(script, n_step, number, size):
    """Episodes of 1 to 2 n steps end both ways; the newest transitions have fewer steps yet."""
    rng = np.random.default_rng(n_step)
    sizes = dict(n_step=n_step, buffer_size=size, batch_size=300)
    args = small_args(script, **sizes, normalize_obs=False, gamma=0.9)
    ends = set(np.cumsum(rng.integers(1, 2 * n_step + 1, number)) - 1)
    transitions = random_transitions(script, number)
    terminated = [t for t in ends if t < number and rng.random() < 0.5]
    transitions.discount[terminated] = 0
    for now, buffer in enumerate(fill(script, transitions, args, ends)):
        if now % 5 and now < number - 1:
            continue
        batch = compiled(script.sample)(buffer, jax.random.key(now), args=args)
        index = np.asarray(batch.action[:, 0], int)
        assert_equal(np.unique(index), np.arange(max(0, now + 1 - size), now + 1))
        known = {i: n_step_target(transitions, i, now, ends, args) for i in np.unique(index)}
        reward, discount, next_obs = map(np.stack, zip(*(known[i] for i in index)))
        np.testing.assert_allclose(batch.reward, reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount, discount, rtol=1e-5)
        assert_equal(batch.next_obs, next_obs)
        assert_equal(batch.obs, transitions.obs[index])


def learn(script, state, calls: int, updates_per_step: int = 1, seed: int = 1):
    args, metrics = small_args(script, updates_per_step=updates_per_step), []
    *_, buffer = fill(script, random_transitions(script, 20), small_args(script))
    for _ in range(calls):
        state, new = script.learn(state, buffer, jax.random.key(seed), args)
        metrics.append(new)
    return state, {name: np.array([x[name] for x in metrics]) for name in new}


@pytest.mark.algorithms("td3")  # of which every second update skips the actor
def test_k_updates_per_step_are_k_single_updates_and_skipped_metrics_do_not_count(script):
    state = init(script, small_args(script))
    together, metrics = learn(script, state, 2, updates_per_step=2)
    one_by_one, single = learn(script, state, 4)
    assert_close(*map(jax.tree.leaves, (together, one_by_one)))
    losses, q = single["actor_loss"], single["qf1_values"].reshape(2, 2)
    assert_equal(np.isnan(losses), [True, False, True, False])
    np.testing.assert_allclose(metrics["actor_loss"], losses[1::2], rtol=1e-5)
    np.testing.assert_allclose(metrics["qf1_values"], q.mean(axis=1), rtol=1e-4)


@ONE_SCRIPT
def test_every_update_has_a_minibatch_of_its_own(script):
    state = optimised(init(script, small_args(script)), REST)
    values = [learn(script, state, 3, seed=seed)[1]["qf1_values"] for seed in (0, 1)]
    assert len(np.unique(values)) == 6
