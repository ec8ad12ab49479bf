"""What algorithms have in common: targets, critics, target networks, acting, replay, learning.

Siblings share the text of all this (a test compares it): the algorithms run on one backend, and
what all six scripts share on one of them.
"""

from types import SimpleNamespace

import jax
import numpy as np
import oracles
import pytest
from conftest import small_args

from oracles import (  # isort: skip
    ACT, BATCH, DESCENT, OBS, REST, always, assert_close, assert_equal, compiled, constant_critics,
    difference, finite_differences, float64, init, linear_args, moved, noiseless, optimised,
    params_of, perturbed, perturbed_state, random_batch, replaced, same_observations, shapes,
    step_sizes, td_target, update,
)  # fmt: skip


pytestmark = pytest.mark.backends("dmc")
ONE_SCRIPT = pytest.mark.algorithms("sac")
# MPO improves its policy another way, and copies its targets whole.
ACTOR_CRITIC = pytest.mark.algorithms("td3", "sac")


# --- targets and critics --------------------------------------------------------------------------


def test_the_target_is_the_reward_and_the_discounted_smaller_value(script):
    """At a termination exactly the reward, whatever the networks say."""
    args = linear_args(script, gamma=0.5, **noiseless(script))
    state, batch = init(script, args), same_observations(script, BATCH)
    batch = batch._replace(discount=np.float32([0, 0.1, 0.25, 0.5, 0.9, 0.95, 1]))

    def target(*values):
        slow = replaced(state, target_critic=constant_critics(*values))
        return td_target(script)(slow, batch, jax.random.key(0), args=args)

    assert target(0, 0).shape == (BATCH,)
    for values in ((2, 4), (4, 2)):
        np.testing.assert_allclose(target(*values), 1 + 0.5 * batch.discount * 2, rtol=1e-5)
    assert target(1e6, 1e6)[0] == 1


@ONE_SCRIPT
def test_the_critic_loss_ignores_the_order_and_repetition_of_samples(script):
    args = small_args(script)
    state, batch = init(script, args), random_batch(script)
    order = np.random.default_rng(0).permutation(BATCH)

    def gradient(rows):
        chosen = jax.tree.map(lambda x: x[rows], batch)
        loss = compiled(jax.grad(script.critic_loss, has_aux=True))
        return loss(state.critic.params, chosen, chosen.reward, args=args)[0]

    expected = gradient(np.arange(BATCH))
    assert_close(gradient(order), expected)
    assert_close(gradient(np.tile(order, 2)), expected)


# --- updates --------------------------------------------------------------------------------------


def gradient_args(script):
    """Flags of small networks, without noise and with LayerNorm in one algorithm."""
    flags = noiseless(script) | always(script)
    return small_args(script, hidden_width=3, layer_norm=script.algorithm == "mpo", **flags)


def test_the_critics_descend_the_error_to_a_fixed_target(script):
    args = gradient_args(script)
    old, batch = optimised(perturbed_state(script, args), DESCENT), random_batch(script)
    new, metrics = update(script, old, batch, args)

    obs, action, reward, discount, next_obs = float64(batch)
    slow_actor = old.target_actor if "target_actor" in old._fields else old.actor.params
    next_action = oracles.greedy(script, float64(slow_actor), next_obs)
    next_q = oracles.q_values(float64(old.target_critic), next_obs, next_action, args).min(axis=0)
    target = reward + args.gamma * discount * next_q

    def loss(critic):
        return np.square(oracles.q_values(critic, obs, action, args) - target).mean(axis=1).sum()

    gradient = difference(old.critic.params, new.critic.params)
    assert_close(gradient, finite_differences(loss, old.critic.params), rtol=1e-4)
    np.testing.assert_allclose(metrics["qf_loss"], loss(float64(old.critic.params)), rtol=1e-5)


@ACTOR_CRITIC
def test_the_actor_ascends_the_critics_just_updated(script):
    args = gradient_args(script)
    old, batch = optimised(perturbed_state(script, args), DESCENT), random_batch(script)
    new, _ = update(script, old, batch, args)
    obs, critic = float64(batch.obs), float64(new.critic.params)

    def loss(actor):
        q = oracles.q_values(critic, obs, oracles.greedy(script, actor, obs), args)
        return -(q[0] if script.algorithm == "td3" else q.min(axis=0)).mean()

    gradient = difference(old.actor.params, new.actor.params)
    assert_close(gradient, finite_differences(loss, old.actor.params), rtol=2e-4)


@ACTOR_CRITIC
def test_targets_follow_by_tau_what_the_networks_have_become(script):
    args = gradient_args(script)
    state = optimised(perturbed_state(script, args), DESCENT)

    def mixed(x, y):
        return (1 - args.tau) * x + args.tau * y

    for _ in range(3):
        old, (state, _) = state, update(script, state, random_batch(script), args)
        for name in [name for name in state._fields if name.startswith("target_")]:
            network = params_of(state, name.removeprefix("target_"))
            expected = jax.tree.map(mixed, getattr(old, name), network)
            assert_close(getattr(state, name), expected)


def test_the_first_step_of_adam_is_the_step_size_of_its_network(script):
    """Nothing changes its shape or type, and metrics are scalar."""
    rates = dict(actor=1e-3, critic=2e-3, duals=3e-3)
    args = small_args(script, **step_sizes(script, **rates), **always(script))
    if script.algorithm == "td3":
        rates["actor"] = rates["critic"]
    rates["alpha"] = rates["actor"]
    old = init(script, args)
    new, metrics = update(script, old, random_batch(script), args)
    for name in rates.keys() & set(new._fields):
        steps = difference(params_of(old, name), params_of(new, name))
        largest = max(np.abs(x).max() for x in jax.tree.leaves(steps))
        np.testing.assert_allclose(largest, rates[name], rtol=1e-2)
    assert shapes(new) == shapes(old)
    assert {x.shape for x in metrics.values()} == {()}


# --- acting ---------------------------------------------------------------------------------------


def unfamiliar(script, args):
    """Observations [B, O] of mean 3 and variance 4, and a buffer that knows of them."""
    obs = np.random.default_rng(0).normal(3, 2, (BATCH, OBS)).astype(np.float32)
    obs[0] = [1e6, -1e6, 3, 5, 1]
    moments = dict(mean=np.full(OBS, 3, np.float32), var=np.full(OBS, 4, np.float32))
    return obs, script.make_buffer(OBS, ACT, args)._replace(**moments)


@pytest.mark.parametrize("normalize_obs", [True, False])
def test_both_ways_of_acting_see_normalised_observations_and_bound_the_mean(script, normalize_obs):
    """The exported policy in NumPy, and exploring where its noise is nothing."""
    args = small_args(script, normalize_obs=normalize_obs, **noiseless(script))
    obs, buffer = unfamiliar(script, args)
    state, env = init(script, args), SimpleNamespace(low=-np.ones(ACT), high=np.ones(ACT))
    state = replaced(state, actor=perturbed(state.actor.params))
    policy = script.export(state, buffer, env, args)
    seen = np.clip((np.float64(obs) - 3) / 2, -10, 10) if normalize_obs else np.float64(obs)
    expected = oracles.greedy(script, float64(state.actor.params), seen)
    for x, action in zip(obs, expected):
        np.testing.assert_allclose(script.greedy_action(policy, x), action, atol=2e-5)
        explored = oracles.explore(script, state, buffer, args, x)
        np.testing.assert_allclose(explored, action, atol=2e-5)


def test_exploring_draws_a_new_action_in_the_box_at_every_step_and_of_every_run(script):
    """Once learning has started; before, the actor has no part in it."""
    args = small_args(script)
    buffer, state, other = (
        script.make_buffer(OBS, ACT, args),
        init(script, args),
        init(script, args, 1),
    )

    def explore(state, seed, step):
        return np.asarray(oracles.explore(script, state, buffer, args, step=step, seed=seed))

    steps = (args.learning_starts - 1, args.learning_starts, args.learning_starts + 1)
    actions = np.stack([explore(state, seed, step) for seed in (0, 1) for step in steps])
    assert len(np.unique(actions)) == actions.size
    assert np.abs(actions).max() <= 1
    for i, step in enumerate(steps):
        assert_equal(explore(state, 0, step), actions[i])
        assert moved(explore(other, 0, step), actions[i]) == (step > args.learning_starts)


def test_the_first_actions_are_uniform_in_the_box(script):
    args = small_args(script, learning_starts=10_000)
    state, buffer = init(script, args), script.make_buffer(OBS, ACT, args)
    actions = np.asarray(oracles.explore(script, state, buffer, args, step=np.arange(5_003)))
    quantiles = np.linspace(0, 1, 11)
    for i in range(ACT):
        np.testing.assert_allclose(
            np.quantile(actions[:, i], quantiles), 2 * quantiles - 1, atol=0.05
        )
    np.testing.assert_allclose(np.corrcoef(actions.T), np.eye(ACT), atol=0.06)


# --- initial state --------------------------------------------------------------------------------


def test_networks_start_apart_and_their_targets_with_them(script):
    args = small_args(script)
    state, other = init(script, args), init(script, args, seed=1)
    assert moved(*(jax.tree.map(lambda x: x[i], state.critic.params) for i in range(2)))
    for name in ("actor", "critic"):
        assert moved(params_of(state, name), params_of(other, name))
        if f"target_{name}" in state._fields:
            assert_equal(getattr(state, f"target_{name}"), params_of(state, name))


# --- replay ---------------------------------------------------------------------------------------


def random_transitions(script, number: int, seed: int = 0, mean: float = 0.0):
    """Transitions; the first entry of the action tells which one it is."""
    rng = np.random.default_rng(seed)
    data = random_batch(script, number, seed)
    data.action[:, 0] = np.arange(number)
    return data._replace(
        obs=np.float32(rng.normal(mean, 0.5, (number, OBS))), discount=np.ones(number, np.float32)
    )


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


def filled(script, number: int, args, **options):
    """The transitions, and the buffer after the last of them."""
    transitions = random_transitions(script, number, **options)
    *_, buffer = fill(script, transitions, args)
    return transitions, buffer


@ONE_SCRIPT
@pytest.mark.parametrize("number", [1, 2, 50])
def test_running_moments_are_those_of_all_observations_inserted(script, number):
    transitions, buffer = filled(script, number, small_args(script, buffer_size=13), mean=10)
    np.testing.assert_allclose(buffer.mean, transitions.obs.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(buffer.var, transitions.obs.var(axis=0), rtol=1e-3, atol=1e-6)


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
    all_of_it = before + number
    obs = np.float64(obs)
    expected = (before * mean + obs.sum(axis=0)) / all_of_it
    np.testing.assert_allclose(buffer.mean, expected, rtol=0, atol=2e-3)
    squares = before * (1 + (mean - expected) ** 2) + np.square(obs - expected).sum(axis=0)
    np.testing.assert_allclose(buffer.var, squares / all_of_it, rtol=2e-3)


@ONE_SCRIPT
@pytest.mark.parametrize("number", [1, 5, 30])
def test_the_latest_transitions_are_sampled_uniformly_and_normalised(script, number):
    args = small_args(script, buffer_size=13, batch_size=2000)
    transitions, buffer = filled(script, number, args, mean=3)
    batch = compiled(script.sample)(buffer, jax.random.key(0), args=args)
    index = np.asarray(batch.action[:, 0], int)
    drawn, counts = np.unique(index, return_counts=True)
    assert_equal(drawn, np.arange(max(0, number - 13), number))
    expected = 2000 / len(drawn)
    assert np.square(counts - expected).sum() / expected < 2 * len(drawn) + 10  # chi-squared
    mean, std = transitions.obs.mean(axis=0), transitions.obs.std(axis=0)

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
    args = small_args(
        script, n_step=n_step, buffer_size=size, batch_size=300, normalize_obs=False, gamma=0.9
    )
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


@ONE_SCRIPT
@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_a_constant_reward_is_worth_one_over_one_minus_gamma(script, n_step):
    """After however many steps a target bootstraps; so it is its own target."""
    args = small_args(script, n_step=n_step, buffer_size=20, gamma=0.95, batch_size=100)
    transitions = random_transitions(script, 20)
    transitions.reward[:] = 1
    *_, buffer = fill(script, transitions, args)
    batch = compiled(script.sample)(buffer, jax.random.key(0), args=args)
    np.testing.assert_allclose(batch.reward + 0.95 * batch.discount * 20, 20, rtol=1e-5)


# --- learning -------------------------------------------------------------------------------------


def learn(script, calls: int, updates_per_step: int):
    """The state after calls of `learn`, and the metrics of each."""
    args = small_args(script, updates_per_step=updates_per_step)
    _, buffer = filled(script, 20, small_args(script))
    state, metrics = init(script, args), []
    for _ in range(calls):
        state, new = script.learn(state, buffer, jax.random.key(1), args)
        metrics.append(new)
    return state, metrics


@pytest.mark.algorithms("td3")  # of which every second update skips the actor
def test_k_updates_per_step_are_k_single_updates_and_skipped_metrics_do_not_count(script):
    together, metrics = learn(script, 2, updates_per_step=2)
    one_by_one, single = learn(script, 4, updates_per_step=1)
    assert_close(*map(jax.tree.leaves, (together, one_by_one)))
    losses = [float(x["actor_loss"]) for x in single]
    np.testing.assert_array_equal(np.isnan(losses), [True, False, True, False])
    np.testing.assert_allclose([x["actor_loss"] for x in metrics], losses[1::2], rtol=1e-5)
    q = np.array([x["qf1_values"] for x in single]).reshape(2, 2)
    np.testing.assert_allclose([x["qf1_values"] for x in metrics], q.mean(axis=1), rtol=1e-4)


@ONE_SCRIPT
def test_every_update_has_a_minibatch_of_its_own(script):
    """And every run others than the next."""
    args = small_args(script)
    _, buffer = filled(script, 20, args)
    state = optimised(init(script, args), REST)
    values = []
    for seed in (0, 1):
        changing = state
        for _ in range(3):
            changing, metrics = script.learn(changing, buffer, jax.random.key(seed), args)
            values.append(float(metrics["qf1_values"]))
    assert len(set(values)) == len(values)
