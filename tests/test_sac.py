"""What SAC adds: the density of a squashed Gaussian, the entropy in values, and its temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import small_args
from scipy import integrate, optimize, stats

from oracles import (  # isort: skip
    ACT, BATCH, OBS, assert_close, compiled, constant, constant_critics, finite_differences,
    float64, init, linear_args, perturbed_state, random_batch, replaced, same_observations,
    td_target, update,
)  # fmt: skip


pytestmark = [pytest.mark.algorithms("sac"), pytest.mark.backends("dmc")]

DRAWS = 20_011


def gaussian_actor(mean, std, args):
    """An actor whose Gaussian is the same everywhere, [A] each."""
    mean, std = np.broadcast_arrays(np.atleast_1d(mean), std)
    share = (np.log(std) - args.log_std_min) / (args.log_std_max - args.log_std_min)
    return constant(np.concatenate([mean, np.arctanh(2 * share - 1)]))


def drawn(script, actor, args, draws: int = DRAWS):
    """Actions [draws, A] at equal observations and their log-probabilities [draws], in float64."""
    obs = np.zeros((draws, OBS), np.float32)
    return float64(compiled(script.sample_action)(actor, obs, jax.random.key(0), args=args))


def noise_of(script, dimensions: int, draws: int = DRAWS):
    """The noise of `drawn`, [draws, A], read off a policy whose actions do not round to 1."""
    args = linear_args(script)
    actor = gaussian_actor(np.zeros(dimensions), 0.3, args)
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


# --- the density ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mean, std", [(mean, std) for mean in (0, 1, -3, 20, -20) for std in (0.05, 0.5, 2)]
)
def test_the_density_is_the_change_of_variables_and_integrates_to_one(script, mean, std):
    """Also where actions round to 1."""
    args = linear_args(script)
    action, log_prob = drawn(script, gaussian_actor(mean, std, args), args)
    noise = noise_of(script, dimensions=1)[:, 0]
    u = mean + std * noise
    np.testing.assert_allclose(action[:, 0], np.tanh(u), atol=1e-5)
    expected = stats.norm.logpdf(u, mean, std) - log_slope(u)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    order = np.argsort(noise)
    slope = std * np.exp(log_slope(u))  # of the action in the noise
    total = integrate.trapezoid((np.exp(log_prob) * slope)[order], noise[order])
    np.testing.assert_allclose(total, 1, atol=1e-3)


def test_the_log_probability_is_the_sum_over_action_dimensions(script):
    args, noise = linear_args(script), noise_of(script, ACT)
    mean, std = np.array([0.0, 1.0, -2.0]), np.array([0.1, 0.5, 2.0])
    action, log_prob = drawn(script, gaussian_actor(mean, std, args), args)
    u = mean + std * noise
    expected = (stats.norm.logpdf(u, mean, std) - log_slope(u)).sum(axis=1)
    assert action.shape == (DRAWS, ACT)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("u", [-20.0, 20.0])
def test_the_log_probability_has_a_gradient_where_the_action_rounds_to_one(script, u):
    args = linear_args(script)

    def density(actor):
        obs = jnp.zeros((1, OBS))
        return script.sample_action(actor, obs, jax.random.key(0), args)[1].sum()

    gradient = jax.jit(jax.grad(density))(gaussian_actor(u, 0.5, args))["params"]["Dense_2"]["bias"]
    np.testing.assert_allclose(gradient[0], 2 * np.tanh(u), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_exploring_samples_the_gaussian_of_the_actor(script):
    args = linear_args(script)
    mean, std = np.array([0.0, 0.5, -1.0]), np.array([0.1, 0.5, 1.0])
    state = replaced(init(script, args), actor=gaussian_actor(mean, std, args))
    buffer = script.make_buffer(OBS, ACT, args)
    action = oracles.explore(script, state, buffer, args, step=10_000 + np.arange(5_003))
    u = np.arctanh(np.float64(action))
    np.testing.assert_allclose(u.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(u.std(axis=0), std, rtol=0.04)
    np.testing.assert_allclose(np.corrcoef(u.T), np.eye(ACT), atol=0.06)


def test_the_spread_stays_between_its_bounds(script):
    args = linear_args(script, log_std_min=-3.0, log_std_max=1.0)
    actor = constant([0, 0, 0, -1e3, 0, 1e3])
    _, log_std = script.policy(actor, np.zeros(OBS, np.float32), args)
    np.testing.assert_allclose(log_std, [-3, -1, 1], atol=1e-6)


# --- the entropy in values and in the actor -------------------------------------------------------


def test_a_soft_value_holds_alpha_times_the_entropy(script):
    std, value = 0.5, 2.0
    args = linear_args(script, gamma=0.9, alpha=0.4)
    networks = dict(actor=gaussian_actor(np.zeros(ACT), std, args))
    networks["target_critic"] = constant_critics(value, value)
    state, batch = replaced(init(script, args), **networks), same_observations(script, DRAWS)
    target = td_target(script)(state, batch, jax.random.key(0), args=args)
    expected = 1 + 0.9 * (value + 0.4 * ACT * entropy_of_squashed(std))
    error = np.std(target) / np.sqrt(DRAWS)
    np.testing.assert_allclose(np.mean(target), expected, atol=4 * error)


@pytest.mark.parametrize("std, entropy", [(0.0897, -1.0), (0.150, -0.5), (0.874, 0.6836)])
def test_the_reported_entropy_is_summed_over_action_dimensions(script, std, entropy):
    args = linear_args(script)
    state = replaced(init(script, args), actor=gaussian_actor(np.zeros(ACT), std, args))
    inputs = state.actor.params, state, same_observations(script, DRAWS), jax.random.key(0)
    _, metrics = compiled(script.actor_loss)(*inputs, args=args)
    np.testing.assert_allclose(entropy_of_squashed(std), entropy, atol=5e-3)
    np.testing.assert_allclose(metrics["entropy"], ACT * entropy_of_squashed(std), atol=0.05)


def test_without_values_the_actor_goes_to_the_largest_entropy(script):
    args = linear_args(script, policy_lr=1e-3)
    state = replaced(init(script, args), critic=constant_critics(0, 0))
    batch = same_observations(script, 512)

    def step(actor, key):
        actor, metrics = script.gradient_step(actor, script.actor_loss, state, batch, key, args)
        return actor, (metrics["entropy"], *script.policy(actor.params, batch.obs[0], args))

    keys = jax.random.split(jax.random.key(0), 1000)
    _, path = jax.jit(lambda x: jax.lax.scan(step, x, keys))(state.actor)
    entropy, mean, log_std = (np.mean(x[-500:], axis=0) for x in path)  # of noisy steps
    best = optimize.minimize_scalar(
        lambda std: -entropy_of_squashed(std), bounds=(0.3, 2), method="bounded"
    )
    np.testing.assert_allclose(np.exp(log_std), best.x, rtol=0.05)
    np.testing.assert_allclose(mean, 0, atol=0.05)
    np.testing.assert_allclose(entropy, -ACT * best.fun, atol=0.02)


def test_the_actor_descends_alpha_log_prob_minus_the_smaller_value(script):
    args = small_args(script, hidden_width=3, alpha=0.5)
    state, batch = perturbed_state(script, args), random_batch(script)
    critic, noise = float64(state.critic.params), noise_of(script, ACT, BATCH)
    low, high = args.log_std_min, args.log_std_max

    def loss(actor):
        mean, spread = np.split(oracles.mlp(actor, float64(batch.obs)), 2, axis=1)
        std = np.exp(low + (high - low) * (1 + np.tanh(spread)) / 2)
        action = np.tanh(mean + std * noise)
        density = stats.norm.pdf(noise) / std / (1 - action**2)
        q = oracles.q_values(critic, float64(batch.obs), action, args)
        return (0.5 * np.log(density).sum(axis=1) - q.min(axis=0)).mean()

    descend = compiled(jax.grad(script.actor_loss, has_aux=True))
    gradient, _ = descend(state.actor.params, state, batch, jax.random.key(0), args=args)
    assert_close(gradient, finite_differences(loss, state.actor.params), rtol=3e-4)


# --- the temperature ------------------------------------------------------------------------------


def test_the_temperature_is_still_at_the_target_entropy(script):
    gradient = jax.grad(lambda *inputs: script.alpha_loss(*inputs)[0])
    for entropy, sign in ((-1.5, 0), (-1.0, 1), (-2.0, -1)):  # more than asked for lowers alpha
        slope = gradient({"log_alpha": 0.3}, entropy, -1.5)["log_alpha"]
        assert np.sign(np.round(slope, 6)) == sign


@pytest.mark.parametrize("entropy, direction", [(-0.7, 1), (-0.33, -1), (0.3, -1)])
def test_updates_raise_alpha_when_entropy_is_short_and_lower_it_else(script, entropy, direction):
    """Entropy for each of the three action dimensions, of which -0.5 is asked for."""
    args = linear_args(script, target_entropy_scale=0.5)
    std = optimize.brentq(lambda std: entropy_of_squashed(std) - entropy, 0.05, 0.8)
    state = replaced(init(script, args), actor=gaussian_actor(np.zeros(ACT), std, args))
    new, _ = update(script, state, random_batch(script, size=512), args)
    change = float(new.alpha.params["log_alpha"] - state.alpha.params["log_alpha"])
    np.testing.assert_allclose(change, direction * 3e-4, rtol=1e-3)


def test_alpha_starts_at_its_flag_and_stays_there_without_autotune(script):
    args = small_args(script, alpha=0.3, autotune=False)
    old = init(script, args)
    new, _ = update(script, old, random_batch(script), args)
    for state in (old, new):
        np.testing.assert_allclose(np.exp(state.alpha.params["log_alpha"]), 0.3, rtol=1e-6)
