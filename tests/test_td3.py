"""What TD3 adds: smoothed targets, one critic for the actor, delayed steps."""

import jax
import numpy as np
import oracles
import pytest
from conftest import small_args
from scipy import integrate, stats

from oracles import (  # isort: skip
    ACT, BATCH, OBS, action_critics, assert_close, compiled, constant, constant_critics, init,
    linear_args, moved, params_of, random_batch, replaced, same_observations, td_target, update,
)  # fmt: skip


pytestmark = [pytest.mark.algorithms("td3"), pytest.mark.backends("dmc")]


def constant_actor(action):
    """An actor that plays one action everywhere."""
    return constant(np.arctanh(action))


def target_actions(script, slow_action, samples: int, **flags):
    """Actions [B, A] of the smoothed target policy, read off critics that return an action."""
    args = linear_args(script, gamma=1.0, **flags)
    batch = same_observations(script, samples)._replace(reward=np.zeros(samples, np.float32))
    state = replaced(init(script, args), target_actor=constant_actor(slow_action))

    def dimension(i):
        probing = replaced(state, target_critic=action_critics(np.eye(ACT)[i]))
        return td_target(script)(probing, batch, jax.random.key(0), args=args)

    return np.stack([dimension(i) for i in range(ACT)], axis=1)


def variance_of_clipped_normal(std: float, bound: float) -> float:
    inside, _ = integrate.quad(lambda x: x**2 * stats.norm.pdf(x, scale=std), -bound, bound)
    return inside + 2 * bound**2 * stats.norm.sf(bound, scale=std)


@pytest.mark.parametrize("std, bound", [(0.2, 0.5), (0.1, 0.15)])
def test_smoothing_is_clipped_gaussian_noise_of_its_own_for_every_sample(script, std, bound):
    slow_action, flags = np.array([0.0, 0.3, -0.4]), dict(policy_noise=std, noise_clip=bound)
    noise = target_actions(script, slow_action, samples=30_011, **flags) - slow_action
    assert np.abs(noise).max() <= bound + 1e-6
    expected = variance_of_clipped_normal(std, bound)
    np.testing.assert_allclose(noise.var(axis=0), expected, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.005)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(ACT), atol=0.03)
    assert len(np.unique(noise[np.abs(noise) < bound - 1e-4])) > 0.8 * noise[:, 0].size


def test_smoothed_actions_stay_in_the_box(script):
    slow_action = np.array([0.9, 0.9, -0.9])
    actions = target_actions(script, slow_action, samples=BATCH * 100)
    np.testing.assert_allclose(np.abs(actions).max(axis=0), 1, rtol=1e-6)


def test_exploration_noise_is_gaussian_with_its_flag_and_clipped_to_the_box(script):
    args = linear_args(script, exploration_noise=0.3)
    state = replaced(init(script, args), actor=constant_actor([0.0, 0.1, 0.9]))
    buffer = script.make_buffer(OBS, ACT, args)
    action = np.asarray(
        oracles.explore(script, state, buffer, args, step=10_000 + np.arange(5_003))
    )
    np.testing.assert_allclose(action[:, :2].std(axis=0), 0.3, rtol=0.04)
    np.testing.assert_allclose(action[:, :2].mean(axis=0), [0, 0.1], atol=0.02)
    np.testing.assert_allclose(np.corrcoef(action.T), np.eye(ACT), atol=0.06)
    assert action[:, 2].max() == 1


def test_the_actor_and_all_targets_move_at_every_second_update(script):
    args = small_args(script, policy_frequency=2)
    state, batch = init(script, args), random_batch(script)
    for number in range(1, 6):
        old, (state, metrics) = state, update(script, state, batch, args)
        assert moved(state.critic.params, old.critic.params)
        for name in ("actor", "target_actor", "target_critic"):
            networks = params_of(state, name), params_of(old, name)
            assert moved(*networks) == (number % 2 == 0), name
        assert np.isfinite(metrics["actor_loss"]) == (number % 2 == 0)


def test_the_actor_follows_the_first_critic_only(script):
    args = small_args(script)
    state, batch = init(script, args), random_batch(script)

    def gradient(critic):
        loss = compiled(jax.grad(script.actor_loss, has_aux=True))
        return loss(state.actor.params, replaced(state, critic=critic), batch, args=args)[0]

    critic = jax.tree.map(np.asarray, state.critic.params)
    other_second = jax.tree.map(lambda x: np.stack([x[0], 1 - 3 * x[1]]), critic)
    assert_close(gradient(other_second), gradient(critic), rtol=1e-6)


def test_the_actor_of_a_linear_critic_goes_to_the_corner_it_prefers(script):
    args, preference = linear_args(script, learning_rate=0.01), np.array([1.0, -2.0, 0.5])
    state = replaced(init(script, args), critic=action_critics(preference))
    batch = same_observations(script, BATCH)

    def step(actor, _):
        return script.gradient_step(actor, script.actor_loss, state, batch, args)

    actor, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=300))(state.actor)
    action = script.policy(actor.params, batch.obs[0], args)
    np.testing.assert_allclose(action, np.sign(preference), atol=0.01)


def test_targets_come_from_the_slow_networks(script):
    args = linear_args(script, gamma=1.0, policy_noise=0.0)
    fast = dict(actor=constant_actor(np.full(ACT, 0.7)), critic=constant_critics(99, 99))
    slow = dict(target_actor=constant_actor(np.full(ACT, 0.2)))
    slow["target_critic"] = action_critics([1, 0, 0])
    state, batch = replaced(init(script, args), **fast, **slow), same_observations(script, BATCH)
    target = td_target(script)(state, batch, jax.random.key(0), args=args)
    np.testing.assert_allclose(target, 1 + 0.2, rtol=1e-5)
