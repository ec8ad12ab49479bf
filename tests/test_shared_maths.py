"""What algorithms have in common: targets, critics, target networks, acting, replay, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import small_args
from oracles import (
    ACT,
    BATCH,
    FROZEN,
    OBS,
    assert_close,
    assert_equal,
    compiled,
    constant_critics,
    delay,
    descended,
    finite_differences,
    float64,
    init,
    linear_args,
    moved,
    noiseless,
    perturbed,
    random_batch,
    same_observations,
    step_sizes,
    td_target,
    without_key,
)

# MPO improves its policy another way, and copies its targets whole.
ACTOR_CRITIC = pytest.mark.algorithms("td3", "sac")


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# --- targets and critics --------------------------------------------------------------------------


def test_targets_are_per_sample_and_losses_scalar(script):
    args = small_args(script)
    state, batch = init(script, args), random_batch(script)
    key = jax.random.key(0)
    target = jax.eval_shape(lambda: td_target(script)(state, batch, key, args=args))
    loss, metrics = jax.eval_shape(
        lambda: script.critic_loss(state.critic, batch, batch.reward, args)
    )
    assert target.shape == (BATCH,)
    assert {x.shape for x in (loss, *metrics.values())} == {()}


def test_an_update_keeps_every_shape_and_type(script):
    args = small_args(script)
    state = init(script, args)
    new_state, metrics = jax.eval_shape(lambda: script.update(state, random_batch(script), args))
    assert shapes(new_state) == shapes(state)
    assert {x.shape for x in metrics.values()} == {()}


def test_the_target_at_a_termination_is_the_reward_exactly(script):
    args = linear_args(script)
    state = init(script, args)._replace(target_critic=constant_critics(1e6, 1e6))
    batch = random_batch(script)._replace(discount=np.zeros(BATCH, np.float32))
    target = td_target(script)(state, batch, jax.random.key(0), args=args)
    assert_equal(target, batch.reward)


def test_the_target_elsewhere_moves_by_gamma_times_the_value(script):
    args = linear_args(script, gamma=0.9)
    state, batch = (
        init(script, args),
        random_batch(script)._replace(discount=np.ones(BATCH, np.float32)),
    )

    def target(value):
        critics = state._replace(target_critic=constant_critics(value, value))
        return td_target(script)(critics, batch, jax.random.key(0), args=args)

    np.testing.assert_allclose(target(10) - target(0), 9, rtol=1e-5)


def test_a_constant_reward_is_worth_one_over_one_minus_gamma(script):
    args = linear_args(script, gamma=0.95, **noiseless(script))
    state, batch = init(script, args), same_observations(script, BATCH)

    def target(value):
        critics = state._replace(target_critic=constant_critics(value, value))
        return td_target(script)(critics, batch, jax.random.key(0), args=args)[0]

    slope = target(1) - target(0)  # the target is affine in the value, so this is its fixed point
    np.testing.assert_allclose(target(0) / (1 - slope), 20, rtol=1e-4)


def test_the_target_takes_the_smaller_critic_whichever_it_is(script):
    args = linear_args(script, gamma=0.5, **noiseless(script))
    state, batch = init(script, args), same_observations(script, BATCH)
    for critics in (constant_critics(2, 4), constant_critics(4, 2)):
        state = state._replace(target_critic=critics)
        target = td_target(script)(state, batch, jax.random.key(0), args=args)
        np.testing.assert_allclose(target, 1 + 0.5 * 2, rtol=1e-5)


def test_without_clipped_double_q_the_mean_of_both_critics_counts(script):
    args = linear_args(script, gamma=0.5, clipped_double_q=False, **noiseless(script))
    state, batch = init(script, args), same_observations(script, BATCH)
    state = state._replace(target_critic=constant_critics(2, 4), critic=constant_critics(2, 4))
    target = td_target(script)(state, batch, jax.random.key(0), args=args)
    np.testing.assert_allclose(target, 1 + 0.5 * 3, rtol=1e-5)
    if script.algorithm == "sac":  # its actor takes the same value
        loss = compiled(script.actor_loss)
        clipped = dataclasses.replace(args, clipped_double_q=True)
        mean, smaller = (
            loss(state.actor, state, batch, jax.random.key(0), args=x)[0] for x in (args, clipped)
        )
        np.testing.assert_allclose(smaller - mean, 1, rtol=1e-5)


def test_the_critic_loss_ignores_the_order_and_repetition_of_samples(script):
    args = small_args(script)
    state, batch = init(script, args), random_batch(script)
    order = np.random.default_rng(0).permutation(BATCH)

    def gradient(rows):
        chosen = jax.tree.map(lambda x: x[rows], batch)
        loss = compiled(jax.grad(script.critic_loss, has_aux=True))
        return loss(state.critic, chosen, chosen.reward, args=args)[0]

    expected = gradient(np.arange(BATCH))
    assert_close(gradient(order), expected)
    assert_close(gradient(np.tile(order, 2)), expected)


def test_bfloat16_rounds_the_factors_between_hidden_layers_and_sums_in_float32(script):
    args = small_args(script, hidden_layers=3, bfloat16=True)
    full = dataclasses.replace(args, bfloat16=False)
    critic, batch = perturbed(init(script, args).critic), random_batch(script)
    q = compiled(script.q_values)(critic, batch.obs, batch.action, args=args)
    inputs = float64((critic, batch.obs, batch.action))
    exact, rounded = (oracles.q_values(*inputs, x) for x in (full, args))
    assert np.abs(q - rounded).max() < 0.1 * np.abs(exact - rounded).max()
    matrix = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    dims = ((1,), (0,)), ((), ())
    product = jax.eval_shape(lambda x: script.bfloat16_product(x, x, dims), matrix)
    assert product.dtype == jnp.float32

    def norm(tree):
        return np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))

    def gradient(args):
        loss = jax.grad(lambda critic: script.critic_loss(critic, batch, batch.reward, args)[0])
        return jax.jit(loss)(critic)

    exact, rounded = gradient(full), gradient(args)
    error = norm(jax.tree.map(jnp.subtract, rounded, exact)) / norm(exact)
    assert 1e-5 < error < 0.03


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_critics_descend_the_error_to_a_fixed_target(script, layer_norm):
    args = small_args(script, hidden_width=3, layer_norm=layer_norm, **noiseless(script))
    old, batch = init(script, args), random_batch(script)
    old = old._replace(critic=perturbed(old.critic), target_critic=perturbed(old.critic, seed=1))
    if "target_actor" in old._fields:
        old = old._replace(target_actor=perturbed(old.actor))
    new, metrics = compiled(script.update)(old, batch, args=args)

    obs, action, reward, discount, next_obs = float64(batch)
    slow_actor = getattr(old, "target_actor", old.actor)
    next_action = oracles.greedy(script, float64(slow_actor), next_obs)
    next_q = oracles.q_values(float64(old.target_critic), next_obs, next_action, args).min(axis=0)
    target = reward + args.gamma * discount * next_q

    def loss(critic):
        return np.square(oracles.q_values(critic, obs, action, args) - target).mean(axis=1).sum()

    assert_close(descended(new.critic_opt), finite_differences(loss, old.critic), rtol=1e-4)
    np.testing.assert_allclose(metrics["qf_loss"], loss(float64(old.critic)), rtol=1e-5)


@ACTOR_CRITIC
def test_the_actor_ascends_the_critics_just_updated(script):
    rates = step_sizes(script, critic=0.03)
    args = small_args(script, hidden_width=3, policy_frequency=1, **noiseless(script), **rates)
    old, batch = init(script, args), random_batch(script)
    old = old._replace(actor=perturbed(old.actor), critic=perturbed(old.critic))
    new, _ = compiled(script.update)(old, batch, args=args)
    obs = float64(batch.obs)

    def loss(actor):
        q = oracles.q_values(float64(new.critic), obs, oracles.greedy(script, actor, obs), args)
        return -(q[0] if script.algorithm == "td3" else q.min(axis=0)).mean()

    assert_close(descended(new.actor_opt), finite_differences(loss, old.actor), rtol=1e-4)


def test_the_first_step_of_adam_is_the_step_size_of_its_network(script):
    rates = dict(actor=1e-3, critic=2e-3, alpha=3e-3)
    if script.algorithm == "td3":
        rates["actor"] = rates["critic"]
    args = small_args(script, **delay(script, 1), **step_sizes(script, **rates))
    old = init(script, args)
    new, _ = compiled(script.update)(old, random_batch(script), args=args)
    rates["log_alpha"] = rates["duals"] = rates["alpha"]
    for name in {"actor", "critic", "log_alpha", "duals"} & set(new._fields):
        change = jax.tree.map(
            lambda x, y: np.abs(np.asarray(x) - y).max(), getattr(new, name), getattr(old, name)
        )
        np.testing.assert_allclose(max(jax.tree.leaves(change)), rates[name], rtol=1e-2)


@ACTOR_CRITIC
def test_targets_follow_by_tau(script):
    args = small_args(script, tau=0.005, policy_frequency=1, **step_sizes(script, **FROZEN))
    state, updates = init(script, args), 5
    targets = [name for name in state._fields if name.startswith("target_")]
    ones_and_zeros = {}
    for name in targets:
        online = getattr(state, name.removeprefix("target_"))
        ones_and_zeros[name] = jax.tree.map(np.zeros_like, online)
        ones_and_zeros[name.removeprefix("target_")] = jax.tree.map(np.ones_like, online)
    state = state._replace(**ones_and_zeros)
    for _ in range(updates):
        state, _ = compiled(script.update)(state, random_batch(script), args=args)
    for leaf in jax.tree.leaves([getattr(state, name) for name in targets]):
        np.testing.assert_allclose(leaf, 1 - 0.995**updates, rtol=1e-5)


@ACTOR_CRITIC
def test_a_critic_step_leaves_the_actor_alone(script):
    args = small_args(script, policy_frequency=1000)
    old = init(script, args)
    new, _ = compiled(script.update)(old, random_batch(script), args=args)
    kept = {"actor", "actor_opt", "target_actor", "log_alpha", "alpha_opt", "moments"}
    for name in kept & set(old._fields):
        assert_equal(getattr(new, name), getattr(old, name))
    assert moved(new.critic, old.critic)


@ACTOR_CRITIC
def test_the_critics_step_is_the_same_with_and_without_an_actor_step(script):
    states = []
    for period in (1, 1000):
        args = small_args(script, policy_frequency=period)
        state = init(script, args)
        states.append(compiled(script.update)(state, random_batch(script), args=args)[0])
    assert_close(states[0].critic, states[1].critic, rtol=1e-6)
    assert moved(states[0].actor, states[1].actor)


# --- acting ---------------------------------------------------------------------------------------


def test_act_is_the_bounded_mean_of_normalised_observations(script):
    args = small_args(script, num_seeds=2)
    obs = np.random.default_rng(0).normal(3, 2, (2, BATCH, OBS)).astype(np.float32)
    state = script.init(np.arange(2), OBS, ACT, args)
    state = state._replace(
        moments=script.Moments(np.full((2, OBS), 3, np.float32), np.full((2, OBS), 4, np.float32))
    )
    action = script.act(state, obs, args)
    seen = (obs - 3) / 2 if args.normalize_obs else obs
    for i in range(2):
        actor = float64(jax.tree.map(lambda x: x[i], state.actor))
        np.testing.assert_allclose(action[i], oracles.greedy(script, actor, seen[i]), atol=1e-5)


def test_exploring_draws_new_actions_in_the_box_and_new_keys(script):
    args = small_args(script)
    state = script.init(np.zeros(2, int), OBS, ACT, args)._replace(
        key=jax.random.split(jax.random.key(0))
    )
    obs = np.ones((2, OBS), np.float32)
    first_action, key = script.explore(state, obs, args)
    second_action, _ = script.explore(state._replace(key=key), obs, args)
    actions = np.concatenate([first_action, second_action])
    assert len(np.unique(actions)) == actions.size
    assert np.abs(actions).max() <= 1
    assert np.abs(actions - script.act(state, obs[:, None], args)[0]).min() > 0


def test_normalised_observations_have_mean_0_and_variance_1_within_10(script):
    args = small_args(script, normalize_obs=True)
    obs = np.random.default_rng(0).normal(5, 3, (1000, OBS)).astype(np.float32)
    moments = script.Moments(obs.mean(0), obs.var(0))
    normalised = np.asarray(script.normalize(obs, moments, args))
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std(0), 1, rtol=1e-4)
    extremes = script.normalize(np.float32([[1e6] * OBS, [-1e6] * OBS]), moments, args)
    assert_equal(extremes, np.float32([[10] * OBS, [-10] * OBS]))
    args = small_args(script, normalize_obs=False)
    assert_equal(script.normalize(obs, moments, args), obs)


# --- initial state --------------------------------------------------------------------------------


def test_every_seed_starts_as_it_would_alone_and_unlike_the_others(script):
    args = small_args(script)
    group = without_key(script.init(np.array([3, 5]), OBS, ACT, args))
    alone = without_key(script.init(np.array([5]), OBS, ACT, args))
    assert_close(jax.tree.map(lambda x: x[1:], group), alone)
    assert moved(*(jax.tree.map(lambda x: x[i], group.actor) for i in range(2)))
    assert moved(*(group.key[i] for i in range(2)))


def test_the_two_critics_start_apart_and_their_targets_with_them(script):
    state = init(script, small_args(script))
    assert moved(*(jax.tree.map(lambda x: x[i], state.critic) for i in range(2)))
    assert_equal(state.target_critic, state.critic)


# --- replay ---------------------------------------------------------------------------------------


def fill(script, transitions: int, capacity: int, rows=None):
    """A buffer of two seeds after insertions; row t of seed s holds the number t + s / 2."""
    args = small_args(script, num_seeds=2, buffer_size=capacity)
    buffer = script.make_buffer(OBS, ACT, args)
    moments = script.Moments(jnp.zeros((2, OBS)), jnp.ones((2, OBS)))
    for t in range(transitions):
        row = np.full((2, 2 * OBS + ACT + 3), [[t], [t + 0.5]]) if rows is None else rows[t]
        buffer, moments = script.insert(buffer, moments, row.astype(np.float32))
    return buffer, moments, args


def test_running_moments_are_those_of_all_observations_inserted(script):
    rows = np.random.default_rng(0).normal(10, 0.5, (50, 2, 2 * OBS + ACT + 3))
    _, moments, _ = fill(script, transitions=50, capacity=13, rows=rows)
    np.testing.assert_allclose(moments.mean, rows[:, :, :OBS].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, rows[:, :, :OBS].var(axis=0), rtol=1e-3)


def test_the_buffer_is_a_ring_of_the_latest_transitions(script):
    buffer, _, _ = fill(script, transitions=30, capacity=13)
    assert buffer.rows.shape[1] == 13
    latest = np.arange(17, 30)
    for seed in range(2):
        assert_equal(np.sort(buffer.rows[seed, :, 0]), np.float32(latest + seed / 2))
        assert (buffer.rows[seed] == buffer.rows[seed, :, :1]).all()


@pytest.mark.parametrize("transitions", [1, 5, 30])
def test_only_inserted_transitions_are_sampled_and_all_of_them(script, transitions):
    buffer, moments, _ = fill(script, transitions, capacity=13)
    args = small_args(script, batch_size=1000, normalize_obs=False)
    batch = script.sample(
        buffer.rows[0], buffer.count, oracles.first(moments), jax.random.key(0), args
    )
    values, counts = np.unique(batch.reward, return_counts=True)
    assert_equal(values, np.arange(max(0, transitions - 13), transitions, dtype=np.float32))
    assert counts.min() > 0.5 * 1000 / len(values)


def test_a_sample_puts_every_entry_in_its_field_and_normalises_observations(script):
    row = np.arange(2 * OBS + ACT + 3, dtype=np.float32)
    moments = script.Moments(np.full(OBS, 2, np.float32), np.full(OBS, 9, np.float32))
    args = small_args(script, normalize_obs=True)
    batch = script.sample(row[None], jnp.int32(1), moments, jax.random.key(0), args)
    obs, action, reward, discount, _, next_obs = np.split(row, np.cumsum([OBS, ACT, 1, 1, 1]))
    expected = (obs - 2) / 3, action, reward[0], discount[0], (next_obs - 2) / 3
    for field, value in zip(batch, expected):
        np.testing.assert_allclose(field, np.broadcast_to(value, field.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("transitions, capacity", [(30, 50), (67, 20), (50, 7)])
def test_windows_of_n_steps_are_those_of_a_loop_over_episodes(
    script, n_step, transitions, capacity
):
    rng = np.random.default_rng(n_step)
    rows = rng.normal(size=(transitions, 2, 2 * OBS + ACT + 3)).astype(np.float32)
    rows[..., OBS] = np.arange(transitions)[:, None]  # the action tells which transition it is
    terminated = rng.random((transitions, 2)) < 0.15
    rows[..., -OBS - 2] = ~terminated
    rows[..., -OBS - 1] = terminated | (rng.random((transitions, 2)) < 0.15)
    buffer, moments, _ = fill(script, transitions, capacity, rows)
    args = small_args(script, n_step=n_step, batch_size=300, normalize_obs=False)
    batch = script.sample(
        buffer.rows[0], buffer.count, oracles.first(moments), jax.random.key(0), args
    )
    for i, start in enumerate(np.asarray(batch.action[:, 0], int)):
        reward, discount, t = 0.0, 1.0, start
        while True:
            row = np.float64(rows[t, 0])
            reward += discount * row[OBS + ACT]
            if row[-OBS - 1] or t + 1 == min(start + n_step, transitions):
                break
            discount, t = discount * args.gamma, t + 1
        np.testing.assert_allclose(batch.reward[i], reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount[i], discount * row[-OBS - 2], rtol=1e-5)
        assert_equal(batch.obs[i], rows[start, 0, :OBS])
        assert_equal(batch.next_obs[i], rows[t, 0, -OBS:])


# --- learning -------------------------------------------------------------------------------------


def learner(script, seeds=(0, 1), **changes):
    """State, buffer and flags of seeds that have collected something."""
    rows = np.random.default_rng(0).normal(size=(20, 2, 2 * OBS + ACT + 3))
    buffer, moments, _ = fill(script, transitions=20, capacity=13, rows=rows)
    args = small_args(script, num_seeds=len(seeds), **delay(script, 2), **changes)
    state = script.init(np.array(seeds), OBS, ACT, args)
    chosen = np.array(seeds)
    moments = jax.tree.map(lambda x: x[chosen], moments)
    return state._replace(moments=moments), buffer._replace(rows=buffer.rows[chosen]), args


def test_k_updates_per_step_are_k_single_updates(script):
    state, buffer, args = learner(script, updates_per_step=4)
    together, _ = script.learn(state, buffer, args)
    state, buffer, args = learner(script, updates_per_step=1)
    for _ in range(4):
        state, _ = script.learn(state, buffer, args)
    assert_close(without_key(together), without_key(state))


def test_a_seed_learns_in_a_group_what_it_learns_alone(script):
    state, buffer, args = learner(script)
    group, group_metrics = script.learn(state, buffer, args)
    state, buffer, args = learner(script, seeds=(1,))
    alone, alone_metrics = script.learn(state, buffer, args)
    assert_close(jax.tree.map(lambda x: x[1:], without_key(group)), without_key(alone))
    assert_close(jax.tree.map(lambda x: x[1:], group_metrics), alone_metrics)


def test_seeds_learn_the_same_side_by_side_on_an_accelerator(script, monkeypatch):
    state, buffer, args = learner(script)
    one_by_one, _ = script.learn(state, buffer, args)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    state, buffer, args = learner(script, exp_name="side by side")  # other flags, another trace
    with jax.debug_key_reuse(False):  # it mistakes a vmapped cond for two uses of its key
        side_by_side, _ = script.learn(state, buffer, args)
    assert_close(without_key(side_by_side), without_key(one_by_one), rtol=1e-4)
