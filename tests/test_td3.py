"""What TD3 adds: smoothed targets, one critic for the actor, delayed steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_args
from oracles import (
    ACT,
    BATCH,
    OBS,
    assert_close,
    compiled,
    constant_critics,
    init,
    linear,
    linear_args,
    moved,
    random_batch,
    same_observations,
    step_sizes,
)
from scipy import integrate, stats

pytestmark = pytest.mark.algorithms("td3")


def constant_actor(action):
    """An actor without hidden layers that plays one action everywhere."""
    return linear(np.zeros((OBS, ACT)), np.arctanh(action))


def value_of(dimension: int):
    """Both critics without hidden layers; the value is the action in one dimension."""
    kernel = np.zeros((2, OBS + ACT, 1))
    kernel[:, OBS + dimension] = 1
    return linear(kernel, np.zeros((2, 1)))


def target_actions(script, slow_action, samples: int, **flags):
    """Actions [B, A] of the smoothed target policy, read off critics that return an action."""
    args = linear_args(script, gamma=1.0, **flags)
    batch = same_observations(script, samples)._replace(reward=jnp.zeros(samples))
    state = init(script, args)._replace(target_actor=constant_actor(slow_action))

    def dimension(i):
        probing = state._replace(target_critic=value_of(i))
        return compiled(script.td_target)(probing, batch, jax.random.key(0), args=args)

    return np.stack([dimension(i) for i in range(ACT)], axis=1)


def variance_of_clipped_normal(std: float, bound: float) -> float:
    inside, _ = integrate.quad(lambda x: x**2 * stats.norm.pdf(x, scale=std), -bound, bound)
    return inside + 2 * bound**2 * stats.norm.sf(bound, scale=std)


def test_smoothing_is_clipped_gaussian_noise_of_its_own_for_every_sample(script):
    slow_action = np.array([0.0, 0.3, -0.4])
    noise = target_actions(script, slow_action, samples=30_011) - slow_action
    assert np.abs(noise).max() <= 0.5 + 1e-6
    expected = variance_of_clipped_normal(std=0.2, bound=0.5)
    np.testing.assert_allclose(noise.var(axis=0), expected, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.005)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(ACT), atol=0.03)
    assert len(np.unique(noise[:, 0])) > 0.9 * len(noise)


def test_smoothing_obeys_its_flags(script):
    noise = target_actions(script, np.zeros(ACT), 5_003, policy_noise=0.1, noise_clip=0.15)
    assert np.abs(noise).max() <= 0.15 + 1e-6
    expected = variance_of_clipped_normal(std=0.1, bound=0.15)
    np.testing.assert_allclose(noise.var(axis=0), expected, rtol=0.05)


def test_smoothed_actions_stay_in_the_box(script):
    slow_action = np.array([0.9, 0.9, -0.9])
    actions = target_actions(script, slow_action, samples=BATCH * 100)
    np.testing.assert_array_equal(np.abs(actions).max(axis=0), 1)


def test_exploration_noise_is_gaussian_with_its_flag_and_clipped_to_the_box(script):
    args, seeds = linear_args(script, exploration_noise=0.3), 5_003
    state = init(script, args)._replace(actor=constant_actor(np.array([0.0, 0.1, 0.9])))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *x.shape)), state)
    state = state._replace(key=jax.random.split(jax.random.key(0), seeds))
    action = np.asarray(script.explore(state, np.zeros((seeds, OBS), np.float32), args)[0])
    np.testing.assert_allclose(action[:, :2].std(axis=0), 0.3, rtol=0.04)
    np.testing.assert_allclose(action[:, :2].mean(axis=0), [0, 0.1], atol=0.02)
    assert action[:, 2].max() == 1


def test_the_actor_and_all_targets_move_at_every_second_update(script):
    args = small_args(script, policy_frequency=2)
    state, batch = init(script, args), random_batch(script)
    for number in range(1, 6):
        old, (state, metrics) = state, compiled(script.update)(state, batch, args=args)
        assert moved(state.critic, old.critic)
        for name in ("actor", "target_actor", "target_critic"):
            assert moved(getattr(state, name), getattr(old, name)) == (number % 2 == 0), name
        assert np.isfinite(metrics["actor_loss"]) == (number % 2 == 0)


def test_the_actor_follows_the_first_critic_only(script):
    args = small_args(script)
    state, batch = init(script, args), random_batch(script)

    def gradient(critic):
        loss = compiled(jax.grad(script.actor_loss, has_aux=True))
        return loss(state.actor, state._replace(critic=critic), batch, args=args)[0]

    other_second = jax.tree.map(lambda x: x.at[1].set(-3 * x[1]), state.critic)
    assert_close(gradient(other_second), gradient(state.critic), rtol=1e-6)


def test_the_actor_of_a_linear_critic_goes_to_the_corner_it_prefers(script):
    args = linear_args(script, policy_frequency=1, **step_sizes(script))
    preference = np.array([1.0, -2.0, 0.5])
    kernel = np.zeros((2, OBS + ACT, 1))
    kernel[0, OBS:, 0] = preference
    state = init(script, args)._replace(critic=linear(kernel, np.zeros((2, 1))))
    batch = same_observations(script, BATCH)

    def step(carry, _):
        actor, opt_state, _ = script.gradient_step(
            lambda p: script.actor_loss(p, state, batch, args), *carry, 0.05
        )
        return (actor, opt_state), None

    carry = state.actor, state.actor_opt
    (actor, _), _ = jax.jit(lambda x: jax.lax.scan(step, x, length=300))(carry)
    np.testing.assert_allclose(
        script.policy(actor, batch.obs[0], args), np.sign(preference), atol=0.01
    )


def test_targets_come_from_the_slow_networks(script):
    args = linear_args(script, gamma=1.0, policy_noise=0.0)
    batch = same_observations(script, BATCH)
    fast = dict(actor=constant_actor(np.full(ACT, 0.7)), critic=constant_critics(99, 99))
    slow = dict(target_actor=constant_actor(np.full(ACT, 0.2)), target_critic=value_of(0))
    state = init(script, args)._replace(**fast, **slow)
    target = compiled(script.td_target)(state, batch, jax.random.key(0), args=args)
    np.testing.assert_allclose(target, 1 + 0.2, rtol=1e-5)
