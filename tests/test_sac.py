"""What SAC adds: the density of a squashed Gaussian, the entropy in values, and its temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import small_args
from oracles import (
    ACT,
    BATCH,
    OBS,
    assert_close,
    compiled,
    constant_critics,
    finite_differences,
    float64,
    init,
    linear,
    linear_args,
    moved,
    perturbed,
    random_batch,
    same_observations,
    step_sizes,
)
from scipy import integrate, optimize, stats

pytestmark = pytest.mark.algorithms("sac")

GAUSSIANS = [(mean, std) for mean in (0.0, 1.0, -3.0) for std in (0.05, 0.5, 2.0)]


def gaussian_actor(mean, std, args):
    """An actor without hidden layers whose Gaussian is the same everywhere, [A] each."""
    mean, std = np.broadcast_arrays(np.atleast_1d(mean), std)
    share = (np.log(std) - args.log_std_min) / (args.log_std_max - args.log_std_min)
    bias = np.concatenate([mean, np.arctanh(2 * share - 1)])
    return linear(np.zeros((OBS, len(bias))), bias)


def log_prob_of(script, monkeypatch, noise, mean, std):
    """Log-probabilities [...] of the actions that this noise [..., A] leads to."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.float32(noise).reshape(shape))
    args = linear_args(script)
    obs = jnp.zeros((*np.shape(noise)[:-1], OBS))
    actor = gaussian_actor(mean, std, args)
    action, log_prob = script.sample_action(actor, obs, jax.random.key(0), args)
    assert action.shape == np.shape(noise)
    return np.float64(log_prob)


def entropy_of_squashed(std: float) -> float:
    """Differential entropy of tanh(u), u ~ N(0, std), by quadrature."""

    def log_slope(x):
        return np.log(1 - np.tanh(std * x) ** 2) * stats.norm.pdf(x)

    return stats.norm.entropy(scale=std) + integrate.quad(log_slope, -8, 8)[0]


# --- the density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, std", GAUSSIANS)
def test_the_density_of_one_action_integrates_to_one(script, monkeypatch, mean, std):
    noise = np.linspace(-7, 7, 4001)
    log_prob = log_prob_of(script, monkeypatch, noise[:, None], mean, std)
    slope = std / np.cosh(mean + std * noise) ** 2  # of the action in the noise
    total = integrate.trapezoid(np.exp(log_prob) * slope, noise)
    np.testing.assert_allclose(total, 1, atol=1e-4)


def test_the_density_of_two_actions_integrates_to_one(script, monkeypatch):
    line = np.linspace(-6, 6, 121)
    noise = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    mean, std = np.array([0.5, -1.0]), np.array([0.4, 1.5])
    log_prob = log_prob_of(script, monkeypatch, noise, mean, std)
    slope = (std / np.cosh(mean + std * noise) ** 2).prod(axis=-1)
    total = integrate.trapezoid(integrate.trapezoid(np.exp(log_prob) * slope, line), line)
    np.testing.assert_allclose(total, 1, atol=1e-4)


def test_the_log_probability_is_the_sum_over_action_dimensions(script, monkeypatch):
    noise = np.random.default_rng(0).normal(size=(BATCH, ACT))
    mean, std = np.array([0.0, 1.0, -2.0]), np.array([0.1, 0.5, 2.0])
    joint = log_prob_of(script, monkeypatch, noise, mean, std)
    single = [log_prob_of(script, monkeypatch, noise[:, [i]], mean[i], std[i]) for i in range(ACT)]
    assert joint.shape == (BATCH,)
    np.testing.assert_allclose(joint, np.sum(single, axis=0), rtol=1e-4, atol=1e-4)


def test_the_log_probability_is_the_change_of_variables(script, monkeypatch):
    u, mean, std, step = np.linspace(-4, 4, 81), 0.5, 0.8, 1e-5
    log_prob = log_prob_of(script, monkeypatch, ((u - mean) / std)[:, None], mean, std)
    slope = (np.tanh(u + step) - np.tanh(u - step)) / (2 * step)
    expected = stats.norm.logpdf(u, mean, std) - np.log(slope)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("u", [-20.0, 20.0])
def test_the_log_probability_is_exact_where_the_action_rounds_to_one(script, monkeypatch, u):
    noise = np.full((1, 1), 0.5)
    mean = u - 0.5
    log_prob = log_prob_of(script, monkeypatch, noise, mean, 1.0)
    log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    np.testing.assert_allclose(log_prob, stats.norm.logpdf(0.5) - log_slope, rtol=1e-5)

    args = linear_args(script)

    def density(actor):
        obs = jnp.zeros((1, OBS))
        return script.sample_action(actor, obs, jax.random.key(0), args)[1].sum()

    gradient = jax.grad(density)(gaussian_actor(mean, 1.0, args))["params"]["head"]["bias"]
    np.testing.assert_allclose(gradient[0], 2 * np.tanh(u), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_exploring_samples_the_gaussian_of_the_actor(script):
    args, seeds = linear_args(script), 5_003
    mean, std = np.array([0.0, 0.5, -1.0]), np.array([0.1, 0.5, 1.0])
    state = init(script, args)._replace(actor=gaussian_actor(mean, std, args))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *x.shape)), state)
    state = state._replace(key=jax.random.split(jax.random.key(0), seeds))
    action, _ = script.explore(state, np.zeros((seeds, OBS), np.float32), args)
    u = np.arctanh(np.float64(action))
    np.testing.assert_allclose(u.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(u.std(axis=0), std, rtol=0.04)


def test_the_spread_stays_between_its_bounds(script):
    args = linear_args(script, log_std_min=-3.0, log_std_max=1.0)
    spread = np.array([-1e3, 0.0, 1e3])
    actor = linear(np.zeros((OBS, 2 * ACT)), np.concatenate([np.zeros(ACT), spread]))
    _, log_std = script.policy(actor, jnp.zeros(OBS), args)
    np.testing.assert_allclose(log_std, [-3, -1, 1], atol=1e-6)


# --- the entropy in values and in the actor -------------------------------------------------------


def test_a_soft_value_holds_alpha_times_the_entropy(script):
    std, value, samples = 0.5, 2.0, 20_011
    args = linear_args(script, gamma=0.9, alpha=0.4)
    state = init(script, args)._replace(
        actor=gaussian_actor(np.zeros(ACT), std, args), target_critic=constant_critics(value, value)
    )
    batch = same_observations(script, samples)
    target = compiled(script.td_target)(state, batch, jax.random.key(0), args=args)
    expected = 1 + 0.9 * (value + 0.4 * ACT * entropy_of_squashed(std))
    error = np.std(target) / np.sqrt(samples)
    np.testing.assert_allclose(np.mean(target), expected, atol=4 * error)


@pytest.mark.parametrize("std, entropy", [(0.0897, -1.0), (0.150, -0.5), (0.874, 0.6836)])
def test_the_reported_entropy_is_summed_over_action_dimensions(script, std, entropy):
    args, samples = linear_args(script), 20_011
    state = init(script, args)._replace(actor=gaussian_actor(np.zeros(ACT), std, args))
    batch = same_observations(script, samples)
    key = jax.random.key(0)
    _, metrics = compiled(script.actor_loss)(state.actor, state, batch, key, args=args)
    np.testing.assert_allclose(entropy_of_squashed(std), entropy, atol=5e-3)
    np.testing.assert_allclose(metrics["entropy"], ACT * entropy_of_squashed(std), atol=0.05)


def test_without_values_the_actor_goes_to_the_largest_entropy(script):
    args = linear_args(script)
    state = init(script, args)._replace(critic=constant_critics(0, 0))
    batch = same_observations(script, 512)

    def step(carry, key):
        actor, opt_state, metrics = script.gradient_step(
            lambda p: script.actor_loss(p, state, batch, key, args), *carry, 0.004
        )
        return (actor, opt_state), metrics["entropy"]

    keys = jax.random.split(jax.random.key(0), 600)
    carry = state.actor, state.actor_opt
    (actor, _), entropy = jax.jit(lambda x: jax.lax.scan(step, x, keys))(carry)
    best = optimize.minimize_scalar(
        lambda std: -entropy_of_squashed(std), bounds=(0.3, 2), method="bounded"
    )
    mean, log_std = script.policy(actor, batch.obs[0], args)
    np.testing.assert_allclose(np.exp(log_std), best.x, rtol=0.05)
    np.testing.assert_allclose(mean, 0, atol=0.05)
    np.testing.assert_allclose(np.mean(entropy[-100:]), -ACT * best.fun, atol=0.02)


def test_the_actor_descends_alpha_log_prob_minus_the_smaller_value(script, monkeypatch):
    noise = np.random.default_rng(0).normal(size=(BATCH, ACT))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.float32(noise).reshape(shape))
    args = small_args(script, hidden_width=3, alpha=0.5)
    state, batch = init(script, args), random_batch(script)
    actor, critic = perturbed(state.actor), perturbed(state.critic)
    low, high = args.log_std_min, args.log_std_max

    def loss(actor):
        mean, spread = np.split(oracles.mlp(actor, float64(batch.obs)), 2, axis=1)
        std = np.exp(low + (high - low) * (1 + np.tanh(spread)) / 2)
        action = np.tanh(mean + std * noise)
        density = stats.norm.pdf(noise) / std / (1 - action**2)
        q = oracles.q_values(float64(critic), float64(batch.obs), action, args)
        return (0.5 * np.log(density).sum(axis=1) - q.min(axis=0)).mean()

    gradient = jax.jit(
        lambda p: jax.grad(script.actor_loss, has_aux=True)(
            p, state._replace(critic=critic), batch, jax.random.key(0), args
        )
    )(actor)[0]
    assert_close(gradient, finite_differences(loss, actor), rtol=2e-4)


# --- the temperature ------------------------------------------------------------------------------


def test_the_temperature_is_still_at_the_target_entropy(script):
    gradient = jax.grad(script.alpha_loss, has_aux=True)
    assert abs(gradient(0.3, -1.5, -1.5)[0]) <= 1e-6
    assert gradient(0.3, -1.0, -1.5)[0] > 0  # more entropy than asked for: descending lowers alpha
    assert gradient(0.3, -2.0, -1.5)[0] < 0


@pytest.mark.parametrize("std, direction", [(0.05, 1), (0.8, -1)])
def test_updates_raise_alpha_when_entropy_is_short_and_lower_it_else(script, std, direction):
    args = linear_args(script, batch_size=64, target_entropy_scale=0.5)
    state = init(script, args)
    state = state._replace(actor=gaussian_actor(np.zeros(ACT), std, args))
    new, _ = compiled(script.update)(state, random_batch(script, size=64), args=args)
    assert np.sign(np.asarray(new.log_alpha) - state.log_alpha) == direction
    np.testing.assert_allclose(np.abs(new.log_alpha - state.log_alpha), 3e-4, rtol=1e-3)


def test_alpha_starts_at_its_flag_and_stays_there_without_autotune(script):
    args = linear_args(script, alpha=0.3, autotune=False, **step_sizes(script))
    state = init(script, args)
    new, _ = compiled(script.update)(state, random_batch(script), args=args)
    for s in (state, new):
        np.testing.assert_allclose(np.exp(s.log_alpha), 0.3, rtol=1e-6)


def test_the_actor_and_the_targets_move_at_multiples_of_their_periods(script):
    args = small_args(script, policy_frequency=2, target_network_frequency=3)
    state, batch = init(script, args), random_batch(script)
    for number in range(1, 7):
        old, (state, _) = state, compiled(script.update)(state, batch, args=args)
        assert moved(state.critic, old.critic)
        assert moved(state.actor, old.actor) == (number % 2 == 0)
        assert moved(state.log_alpha, old.log_alpha) == (number % 2 == 0)
        assert moved(state.target_critic, old.target_critic) == (number % 3 == 0)
