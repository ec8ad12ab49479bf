"""What TD3 adds: smoothed targets, delayed steps."""

import jax
import numpy as np
import pytest
from conftest import small_args
from scipy import integrate, stats

from oracles import (  # isort: skip
    ACT, gaussian_actor, init, moved, params_of, plain_args, random_batch, replaced,
    same_observations, update,
)  # fmt: skip

pytestmark = [pytest.mark.algorithms("td3"), pytest.mark.backends("dmc")]


@pytest.fixture
def target_actions(script, monkeypatch):
    """`target_actions(slow_action, samples)`, [B, A], of the smoothed target policy."""
    monkeypatch.setattr(script, "q_values", lambda critic, obs, action, args: action[None])

    def values(slow_action, samples: int, **flags):
        args, ones = plain_args(script, gamma=1.0, **flags), np.ones((samples, 1), np.float32)
        batch = same_observations(script, samples)._replace(reward=0 * ones, discount=ones)
        actor = gaussian_actor(script, slow_action, 0, args)
        state = replaced(init(script, args), target_actor=actor)
        return np.asarray(script.td_target(state, batch, jax.random.key(0), args))

    return values


@pytest.mark.parametrize("std, bound", [(0.2, 0.5), (0.1, 0.15)])
def test_smoothing_is_clipped_gaussian_noise_of_its_own_for_each_sample(target_actions, std, bound):
    slow_action, flags = np.array([0.0, 0.3, -0.4]), dict(policy_noise=std, noise_clip=bound)
    noise = target_actions(slow_action, 30_011, **flags) - slow_action
    assert np.abs(noise).max() <= bound + 1e-6
    variance, _ = integrate.quad(lambda x: x**2 * stats.norm.pdf(x, scale=std), -bound, bound)
    variance += 2 * bound**2 * stats.norm.sf(bound, scale=std)
    np.testing.assert_allclose(noise.var(axis=0), variance, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.005)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(ACT), atol=0.03)
    assert len(np.unique(noise[np.abs(noise) < bound - 1e-4])) > 0.8 * noise[:, 0].size


def test_smoothed_actions_stay_in_the_box(target_actions):
    actions = target_actions(np.array([0.9, 0.9, -0.9]), 1_009)
    np.testing.assert_allclose(np.abs(actions).max(axis=0), 1, rtol=1e-6)


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
