"""What SAC adds: the density of a squashed Gaussian, the entropy in values, and its temperature."""

import jax
import numpy as np
import oracles
import pytest
from conftest import small_args
from scipy import integrate, optimize, stats

from oracles import (  # isort: skip
    ACT, BATCH, OBS, assert_close, compiled, finite_differences, float64, gaussian_actor, init,
    perturbed_state, plain_args, random_batch, replaced, same_observations, update,
)  # fmt: skip

pytestmark = [pytest.mark.algorithms("sac"), pytest.mark.backends("dmc")]

DRAWS = 20_011


def drawn(script, actor, args, draws: int = DRAWS):
    """Actions [draws, A] at equal observations and their log-probabilities [draws], in float64."""
    obs = np.zeros((draws, OBS), np.float32)
    return float64(compiled(script.sample_action)(actor, obs, jax.random.key(0), args=args))


def noise_of(script, dimensions: int, draws: int = DRAWS):
    """The noise of `drawn`, [draws, A], read off a policy whose actions do not round to 1."""
    args = plain_args(script)
    actor = gaussian_actor(script, np.zeros(dimensions), 0.3, args)
    return np.arctanh(drawn(script, actor, args, draws)[0]) / 0.3


def log_slope(u):
    """Logarithm of the derivative of tanh; by central differences where these are accurate."""
    near, step = np.clip(u, -4, 4), 1e-5
    differences = np.log((np.tanh(near + step) - np.tanh(near - step)) / (2 * step))
    return np.where(np.abs(u) < 4, differences, 2 * (np.log(2) - u - np.logaddexp(0, -2 * u)))


def entropy_of_squashed(std: float) -> float:
    """Differential entropy of tanh(u), u ~ N(0, std), by quadrature."""
    expected, _ = integrate.quad(lambda x: log_slope(std * x) * stats.norm.pdf(x), -8, 8)
    return stats.norm.entropy(scale=std) + expected


@pytest.mark.parametrize("mean", [0, 1, -3, 20, -20])
@pytest.mark.parametrize("std", [0.05, 0.5, 2])
def test_the_density_is_the_change_of_variables_and_integrates_to_one(script, mean, std):
    args = plain_args(script)
    actor = gaussian_actor(script, mean, std, args)
    action, log_prob = drawn(script, actor, args)
    noise = noise_of(script, dimensions=1)[:, 0]
    u = mean + std * noise
    np.testing.assert_allclose(action[:, 0], np.tanh(u), atol=1e-5)
    expected = stats.norm.logpdf(u, mean, std) - log_slope(u)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    order = np.argsort(noise)
    slope = std * np.exp(log_slope(u))  # of the action in the noise
    total = integrate.trapezoid((np.exp(log_prob) * slope)[order], noise[order])
    np.testing.assert_allclose(total, 1, atol=1e-3)

    def mean_log_prob(actor):
        obs = np.zeros((DRAWS, OBS), np.float32)
        return script.sample_action(actor, obs, jax.random.key(0), args)[1].mean()

    gradient = jax.grad(mean_log_prob)(actor)["params"]["Dense_2"]["bias"]
    np.testing.assert_allclose(gradient[0], 2 * np.tanh(u).mean(), rtol=1e-4, atol=1e-4)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("clipped_double_q, value", [(True, 1), (False, 2)])
def test_a_soft_value_holds_alpha_times_the_entropy(script, clipped_double_q, value):
    args = plain_args(script, gamma=0.9, alpha=0.4, clipped_double_q=clipped_double_q)
    actor = gaussian_actor(script, np.zeros(ACT), 0.5, args)
    state, batch = init(script, args), same_observations(script, DRAWS)
    critics = jax.tree.map(np.zeros_like, state.target_critic)
    critics["params"]["Dense_2"]["bias"][:] = [[1], [3]]
    state = replaced(state, actor=actor, target_critic=critics)
    target = compiled(script.td_target)(state, batch, jax.random.key(0), args=args)
    expected = 1 + 0.9 * (value + 0.4 * ACT * entropy_of_squashed(0.5))
    np.testing.assert_allclose(np.mean(target), expected, atol=4 * stats.sem(target))


@pytest.mark.parametrize("value, clipped", [(np.min, True), (np.mean, False)])
def test_the_actor_descends_alpha_log_prob_minus_the_value(script, value, clipped):
    args = small_args(script, hidden_width=3, alpha=0.5, clipped_double_q=clipped)
    state, batch = perturbed_state(script, args), random_batch(script)
    critic, noise = float64(state.critic.params), noise_of(script, ACT, BATCH)
    low, high = args.log_std_min, args.log_std_max

    def loss(actor):
        mean, spread = np.split(oracles.mlp(actor, float64(batch.obs)), 2, axis=1)
        std = np.exp(low + (high - low) * (1 + np.tanh(spread)) / 2)
        action = np.tanh(mean + std * noise)
        density = stats.norm.pdf(noise) / std / (1 - action**2)
        q = oracles.q_values(critic, float64(batch.obs), action, args)
        return (0.5 * np.log(density).sum(axis=1) - value(q, axis=0)).mean()

    descend = compiled(jax.grad(script.actor_loss, has_aux=True))
    gradient, _ = descend(state.actor.params, state, batch, jax.random.key(0), args=args)
    assert_close(gradient, finite_differences(loss, state.actor.params), rtol=3e-4)


@pytest.mark.parametrize("entropy, direction", [(-0.7, 1), (-0.33, -1), (0.3, -1)])
def test_updates_raise_alpha_when_entropy_is_short_and_lower_it_else(script, entropy, direction):
    """Entropy for each of the three action dimensions, of which -0.5 is asked for."""
    args = plain_args(script, target_entropy_scale=0.5)
    std = optimize.brentq(lambda std: entropy_of_squashed(std) - entropy, 0.05, 0.8)
    state = replaced(init(script, args), actor=gaussian_actor(script, np.zeros(ACT), std, args))
    new, metrics = update(script, state, random_batch(script, size=512), args)
    change = float(new.alpha.params["log_alpha"] - state.alpha.params["log_alpha"])
    np.testing.assert_allclose(change, direction * 3e-4, rtol=1e-3)
    np.testing.assert_allclose(metrics["entropy"], ACT * entropy, atol=0.3)


def test_alpha_starts_at_its_flag_and_stays_there_without_autotune(script):
    args = small_args(script, alpha=0.3, autotune=False)
    old = init(script, args)
    for state in (old, update(script, old, random_batch(script), args)[0]):
        np.testing.assert_allclose(np.exp(state.alpha.params["log_alpha"]), 0.3, rtol=1e-6)
