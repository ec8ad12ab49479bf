"""What MPO adds: temperatures, weighted samples, a decoupled M-step within trust regions."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from conftest import small_args
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from oracles import (  # isort: skip
    ACT, BATCH, DESCENT, OBS, SAMPLES, assert_close, assert_equal, compiled, constant, difference,
    finite_differences, float64, init, linear, linear_args, moved, optimised, params_of, perturbed,
    perturbed_state, random_batch, replaced, shapes, update,
)  # fmt: skip


pytestmark = [pytest.mark.algorithms("mpo"), pytest.mark.backends("dmc")]

EPSILON = 0.1


def gaussian_actor(mean, stddev, args):
    """An actor whose Gaussian is the same everywhere, [A] each."""
    mean, stddev = np.broadcast_arrays(np.atleast_1d(mean).astype(float), stddev)
    spread = np.log(np.expm1(stddev * np.log(2) / args.initial_stddev))
    return constant(np.concatenate([mean, spread]))


def trust_region(target_actor, duals):
    """What the M-step has to know of a state."""
    return SimpleNamespace(target_actor=target_actor, duals=SimpleNamespace(params=duals))


def free_policy(monkeypatch, script):
    """Lets mean and standard deviation themselves, [B, A] each, be the actor's parameters."""
    monkeypatch.setattr(script, "policy", lambda actor, obs, args: actor)


def log_mean_exp(x):
    return special.logsumexp(x, axis=0) - np.log(len(x))


def attained_kl(q, temperature) -> float:
    """KL to uniform of the weights that a temperature gives q [N, B], the mean over states."""
    x = (np.float64(q) - np.float64(q).max(axis=0)) / np.float64(temperature)
    log_ratio = x - log_mean_exp(x)
    return (np.exp(log_ratio) * log_ratio - np.expm1(log_ratio)).mean()


def dual(q, temperature, epsilon) -> float:
    """The function of the temperature that the E-step minimises."""
    q = np.float64(q)
    return temperature * (epsilon + log_mean_exp(q / temperature).mean())


def newton(script, q, epsilon=EPSILON):
    return float(jitted(script.newton_temperature)(np.float32(q), epsilon))


@oracles.cache
def jitted(function):
    return jax.jit(function)


def normal_q(samples=20, states=64, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, states))


# --- the loss of Acme, on stored inputs -----------------------------------------------------------


@pytest.fixture(params=range(4), ids="case{}".format)
def acme(request):
    """Inputs and outputs of acme/jax/losses/mpo.py."""
    stored = np.load(Path(__file__).parent / "data" / "mpo_loss.npz")
    prefix = f"case{request.param}/"
    keys = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
    return SimpleNamespace(**{key: stored[prefix + key] for key in keys})


def test_losses_and_gradients_are_those_of_acme(script, acme, monkeypatch):
    """Weights, losses, KLs and all gradients, with and without penalty and per dimension."""
    free_policy(monkeypatch, script)
    penalty = hasattr(acme, "raw_penalty_temperature")
    args = small_args(
        script, temperature_solver="gradient", action_penalty=penalty,
        per_dim_constraining=acme.alpha_mean.size == acme.online_mean.shape[1],
        epsilon=float(acme.epsilon), epsilon_penalty=float(acme.epsilon_penalty),
        epsilon_mean=float(acme.epsilon_mean), epsilon_stddev=float(acme.epsilon_stddev),
    )  # fmt: skip
    names = ["temperature", "penalty_temperature"][: 1 + penalty]
    duals = {name: getattr(acme, f"raw_{name}")[0] for name in names}
    duals |= {"alpha_mean": acme.raw_alpha_mean, "alpha_stddev": acme.raw_alpha_stddev}
    duals = jax.tree.map(jnp.asarray, {"penalty_temperature": 0.0} | duals)
    target = trust_region((acme.target_mean, acme.target_stddev), duals)
    actor = jnp.asarray(acme.online_mean), jnp.asarray(acme.online_stddev)
    q, actions = jnp.asarray(acme.q_values), jnp.asarray(acme.actions)
    close = partial(np.testing.assert_allclose, rtol=1e-4)

    close(script.multiplier(duals["temperature"]), acme.temperature[0])
    close(script.multiplier(duals["alpha_mean"]), acme.alpha_mean)
    close(script.multiplier(duals["alpha_stddev"]), acme.alpha_stddev)
    close(script.e_step_weights(q, acme.temperature[0]), acme.weights_q_only, atol=1e-30)
    loss = script.temperature_loss(acme.temperature[0], q, args.epsilon)
    close(loss, acme.temperature_loss_q_only[0])

    def m_step(actor, weights):
        return script.actor_loss(actor, target, None, actions, weights, args)

    def dual_step(duals, kls):
        return script.dual_loss(duals, actions, q, kls, args)

    @jax.jit
    def both(actor, duals):
        weights, metrics = script.e_step(actions, q, duals, args)
        actor_loss, gradient = jax.value_and_grad(m_step, has_aux=True)(actor, weights)
        kls, _ = actor_loss[1]
        dual_loss, dual_gradient = jax.value_and_grad(dual_step, has_aux=True)(duals, kls)
        return metrics, kls, actor_loss[0] + dual_loss[0], gradient, dual_gradient

    metrics, kls, loss, gradient, dual_gradient = both(actor, duals)
    close(metrics["kl_weights_rel"], acme.kl_q_rel)
    close(np.squeeze(kls[0] / args.epsilon_mean), np.squeeze(acme.kl_mean_rel))
    close(np.squeeze(kls[1] / args.epsilon_stddev), np.squeeze(acme.kl_stddev_rel))
    unused = script.multiplier(duals["penalty_temperature"]), script.penalty(actions)
    unused = 0 if penalty else script.temperature_loss(*unused, args.epsilon_penalty)
    close(loss - unused, acme.total_loss)
    assert_close(gradient, (acme.grad_online_mean, acme.grad_online_stddev), rtol=1e-4)
    for name in (*names, "alpha_mean", "alpha_stddev"):
        close(np.atleast_1d(dual_gradient[name]), getattr(acme, f"grad_raw_{name}"))


# --- the temperature ------------------------------------------------------------------------------

FAMILIES = {
    "normal": lambda rng, n, b: rng.normal(size=(n, b)),
    "heavy tails": lambda rng, n, b: rng.standard_t(2, size=(n, b)),
    "two values": lambda rng, n, b: rng.integers(0, 2, (n, b)).astype(float),
    "one good action": lambda rng, n, b: np.eye(n)[:, :1] * np.ones((n, b)),
    "smooth": lambda rng, n, b: -np.square(rng.normal(size=(n, b)) + rng.normal(size=b)),
    "some states constant": lambda rng, n, b: rng.normal(size=(n, b)) * (rng.random(b) < 0.2),
    "an outlier": lambda rng, n, b: rng.normal(size=(n, b)) + 1e4 * np.eye(n, b),
    "a large state": lambda rng, n, b: rng.normal(size=(n, b)) * (1 + 1e6 * np.eye(1, b)),
    "constant": lambda rng, n, b: np.zeros((n, b)),
}


@st.composite
def problems(draw):
    """Q-values [N, B] and a bound."""
    shape = draw(st.sampled_from([(1, 7), (2, 1), (2, 7), (20, 7), (20, 256), (64, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    q = FAMILIES[draw(st.sampled_from(list(FAMILIES)))](rng, *shape)
    q = q * np.exp(draw(st.floats(0, 4)) * rng.normal(size=shape[1]))  # states of unequal size
    q = q * 10 ** draw(st.floats(-6, 6)) + draw(st.sampled_from([0, 1, 50])) * rng.normal()
    return np.float32(q), np.exp(draw(st.floats(np.log(1e-3), np.log(2))))


def solution(q, epsilon) -> float | None:
    """The temperature at which the KL is epsilon, in float64; None if there is none."""
    q = np.float64(q)
    scale = np.ptp(q, axis=0).max()

    def excess(x):
        return attained_kl(q, scale * np.exp(x)) - epsilon

    lowest = np.log(1e-10)
    if scale == 0 or excess(lowest) <= 0:
        return None
    return scale * np.exp(optimize.brentq(excess, lowest, 30, xtol=1e-12, rtol=1e-12))


def test_newton_finds_the_temperature_at_every_scale(script):
    """In the attained KL, to float32 precision; with no solution, the greediest weights."""
    binding = []

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(problems())
    def check(problem):
        q, epsilon = problem
        temperature, expected = newton(script, q, epsilon), solution(q, epsilon)
        assert np.isfinite(temperature) and temperature > 0
        weights = np.float64(jitted(script.e_step_weights)(q, np.float32(temperature)))
        assert np.isfinite(weights).all()
        binding.append(expected is not None)
        if binding[-1]:
            assert attained_kl(q, temperature) == pytest.approx(epsilon, rel=3e-5)
            return
        scale = np.ptp(np.float64(q), axis=0).max()
        assert attained_kl(q, temperature) <= epsilon * (1 + 3e-5)
        assert temperature <= max(1e-9 * scale, 1e-20)

    check()
    assert 0.3 < np.mean(binding) < 0.9  # both kinds were there


@pytest.mark.parametrize("family", ["normal", "heavy tails", "smooth", "an outlier"])
def test_slsqp_agrees_with_newton(script, family):
    """At every scale, to a hundredth of the attained KL."""
    rng = np.random.default_rng(0)
    slsqp = jax.jit(lambda q: script.slsqp_temperature(q, EPSILON))
    for exponent in (-6, -3, 0, 3, 6):
        q = np.float32(FAMILIES[family](rng, 20, 64) * 10.0**exponent)
        kl = attained_kl(q, float(slsqp(q)))
        assert kl == pytest.approx(attained_kl(q, newton(script, q)), rel=1e-2)
    constant = np.ones((20, 64), np.float32)
    np.testing.assert_allclose(script.e_step_weights(constant, slsqp(constant)), 1 / 20, rtol=1e-6)


def test_the_mean_kl_of_the_weights_is_the_bound(script):
    """Weights sum to 1, and prefer actions as their values do (P1, P12)."""
    q = normal_q()
    q[:, 0] = 3  # where nothing can be preferred
    weights, metrics = compiled(script.e_step)(
        jnp.zeros((20, 64, ACT)), jnp.float32(q), {}, args=small_args(script, action_penalty=False)
    )
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
    assert_equal(np.argsort(weights, axis=0)[:, 1:], np.argsort(np.float32(q), axis=0)[:, 1:])
    np.testing.assert_allclose(weights[:, 0], 1 / 20, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_weights_rel"], 1, rtol=1e-3)
    entropy = -special.xlogy(weights, weights).sum(axis=0).mean()
    np.testing.assert_allclose(metrics["effective_samples"], np.exp(entropy), rtol=1e-4)
    np.testing.assert_allclose(metrics["temperature"], newton(script, q), rtol=1e-5)


def test_the_temperature_minimises_the_convex_dual(script):
    """In float64, and without the formula of the KL (P2)."""
    q = normal_q()
    best = newton(script, q)
    for factor in (1 - 1e-3, 1 + 1e-3):
        assert dual(q, best * factor, EPSILON) > dual(q, best, EPSILON)
    temperatures = best * np.linspace(0.1, 10, 50)
    values = np.array([dual(q, x, EPSILON) for x in temperatures])
    assert (np.diff(values, n=2) >= 0).all()
    ours = [script.temperature_loss(x, jnp.float32(q), EPSILON) for x in temperatures]
    np.testing.assert_allclose(ours, values, rtol=1e-5)


def test_a_small_bound_is_met_in_spite_of_rounding(script):
    """Where weights are nearly uniform, their KL is a small difference of large terms."""
    q = 50 + normal_q()
    for epsilon in (1e-3, 1e-4, 1e-5):
        kl = attained_kl(np.float32(q), newton(script, q, epsilon))
        assert kl == pytest.approx(epsilon, rel=1e-4)


def test_the_temperature_of_one_good_action_and_of_gaussian_values(script):
    """p log(N p) + (1 - p) log(N (1 - p) / (N - 1)) = epsilon for the weight p of the one (P3)."""
    for samples, ratio in ((2, 1.059947), (20, 0.724863), (64, 0.521666)):
        for gap in (1e-3, 1.0, 1e3):
            q = np.zeros((samples, BATCH))
            q[0] = gap
            np.testing.assert_allclose(newton(script, q), ratio * gap, rtol=1e-5)
    q = 3 * normal_q(samples=10_007, states=BATCH)
    np.testing.assert_allclose(newton(script, q), 3 / np.sqrt(2 * EPSILON), rtol=0.02)


def test_the_temperature_scales_with_the_values_and_ignores_all_else(script):
    """Shifts of states, the order of samples and of states, and repetition (P4)."""
    q, rng = normal_q(), np.random.default_rng(1)
    temperature = newton(script, q)
    for scale in (1e-6, 1e4):
        np.testing.assert_allclose(newton(script, scale * q), scale * temperature, rtol=1e-5)
    for other in (
        q + 10 * rng.normal(size=64),
        rng.permutation(q),
        q[:, rng.permutation(64)],
        np.repeat(q, 3, axis=0),
    ):
        np.testing.assert_allclose(newton(script, other), temperature, rtol=1e-5)


@pytest.mark.parametrize(
    "q, epsilon",
    [
        (np.full((20, BATCH), 50.0), EPSILON),
        (normal_q(samples=1), EPSILON),
        (normal_q(samples=20), np.log(20) + 0.01),
        (normal_q() * (np.arange(64) < 1), EPSILON),  # 1 of 64 states is worth at most 0.047
    ],
    ids=["constant", "one sample", "loose", "few states"],
)
def test_weights_are_greedy_where_the_bound_cannot_be_reached(script, q, epsilon):
    """Uniform over the best actions of every state (P5)."""
    q = np.float32(q)
    weights = script.e_step_weights(q, jnp.float32(newton(script, q, epsilon)))
    best = q == q.max(axis=0)
    np.testing.assert_allclose(weights, best / best.sum(axis=0), atol=1e-6)


def test_the_gradient_solver_weighs_by_the_temperature_before_its_step(script):
    args = small_args(script, temperature_solver="gradient", temperature=3.0)
    state = init(script, args)
    new, metrics = update(script, state, random_batch(script), args)
    for name in ("temperature", "penalty_temperature"):
        before, after = state.duals.params[name], new.duals.params[name]
        np.testing.assert_allclose(script.multiplier(before), 3, rtol=1e-5)
        np.testing.assert_allclose(metrics[name], 3, rtol=1e-5)
        np.testing.assert_allclose(np.abs(after - before), args.dual_lr, rtol=1e-3)
    assert {x.shape for x in metrics.values()} == {()}
    assert shapes(new) == shapes(state)


def test_the_gradient_solver_ends_where_newton_is(script):
    """Adam on the dual of unchanging values."""
    q = jnp.float32(normal_q())
    loss = jax.grad(lambda x: script.temperature_loss(script.multiplier(x), q, EPSILON))
    x = optimize.brentq(lambda x: float(jitted(loss)(x)), -2, 10, xtol=1e-4)
    np.testing.assert_allclose(script.multiplier(x), newton(script, q), rtol=1e-3)


# --- the penalty ----------------------------------------------------------------------------------


def test_penalty_weights_tell_actions_outside_the_box_from_those_inside(script):
    """Nothing outside: uniform; an action outside weighs less than the rest (P11)."""
    rng = np.random.default_rng(0)
    inside = jnp.float32(rng.uniform(-1, 1, (SAMPLES, BATCH, ACT)))
    outside = inside.at[2, 3, 1].set(1.5)
    args = small_args(script)
    q = jnp.zeros((SAMPLES, BATCH))
    for actions in (inside, outside):
        weights, metrics = script.e_step(actions, q, {}, args)
        np.testing.assert_allclose(weights.sum(axis=0), 2, rtol=1e-5)
        penalty_weights = np.asarray(weights) - 1 / SAMPLES  # those of equal values are uniform
        expected = np.full((SAMPLES, BATCH), 1 / SAMPLES)
        if actions is outside:
            assert penalty_weights[2, 3] < 1 / SAMPLES - 1e-3
            np.testing.assert_allclose(metrics["kl_penalty_rel"], 1, rtol=1e-3)
            expected[:, 3] = penalty_weights[:, 3]
        np.testing.assert_allclose(penalty_weights, expected, atol=1e-6)
    weights, metrics = script.e_step(outside, q, {}, small_args(script, action_penalty=False))
    np.testing.assert_allclose(weights, 1 / SAMPLES, rtol=1e-6)
    assert "kl_penalty_rel" not in metrics


# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stddev", [0.03, 0.3, 1.0])
def test_the_kl_of_gaussians_is_the_expected_log_ratio(script, stddev):
    """By Monte Carlo, in every dimension (P7)."""
    old = np.array([0.1, -0.2, 0.5]), stddev * np.array([1.0, 1.2, 0.8])
    new = old[0] + stddev * np.array([0.2, 0.0, -0.5]), old[1] * np.array([1.0, 1.3, 0.6])
    x = np.random.default_rng(0).normal(*old, size=(1_000_003, 3))
    ratio = stats.norm.logpdf(x, *old) - stats.norm.logpdf(x, *new)
    error = ratio.std(axis=0) / np.sqrt(len(x))
    kl = np.asarray(script.kl_normal(*(jnp.float32(x) for x in (*old, *new))))
    assert (np.abs(kl - ratio.mean(axis=0)) <= 4 * error + 1e-9).all()
    zero = script.kl_normal(*(jnp.float32(x) for x in (*old, *old)))
    assert_equal(zero, np.zeros(3))


def test_the_kl_of_small_steps_is_accurate(script):
    """A change of 1 % in the deviation is 9.83e-5, one of 0.1 % the default bound of 1e-6."""
    stddev = jnp.float32([0.03, 0.3, 1.0])
    for change, rtol in ((0.01, 1e-4), (0.001, 2e-3)):
        d = np.log1p(change)
        kl = script.kl_normal(stddev, stddev, stddev, stddev * jnp.float32(1 + change))
        np.testing.assert_allclose(kl, d + np.expm1(-2 * d) / 2, rtol=rtol)
    kl = script.kl_normal(stddev, stddev, stddev, 1.01 * stddev)
    np.testing.assert_allclose(kl, 9.83e-5, rtol=1e-3)
    move = script.kl_normal(stddev, stddev, stddev + 0.01, stddev)
    np.testing.assert_allclose(move, (0.01 / stddev) ** 2 / 2, rtol=1e-4)


# --- the M-step -----------------------------------------------------------------------------------


def m_step_problem(script, seed=0, **changes):
    """Flags, the state of a free policy, sampled actions and weights of mass 2."""
    rng = np.random.default_rng(seed)
    old = rng.uniform(-0.5, 0.5, (BATCH, ACT)), rng.uniform(0.2, 0.8, (BATCH, ACT))
    actions = old[0] + old[1] * rng.normal(size=(SAMPLES, BATCH, ACT))
    weights = 2 * rng.dirichlet(np.ones(SAMPLES), BATCH).T
    args = small_args(script, **changes)
    constraints = ACT if args.per_dim_constraining else 1
    duals = jnp.linspace(-1, 1, constraints), jnp.linspace(1, 2, constraints)
    duals = dict(zip(("alpha_mean", "alpha_stddev"), duals))
    state = trust_region(jax.tree.map(jnp.float32, old), duals)
    return args, state, jnp.float32(actions), jnp.float32(weights)


def multipliers(state):
    """Those of the mean and of the standard deviation, in float64."""
    duals = state.duals.params
    return (np.log1p(np.exp(float64(duals[name]))) for name in ("alpha_mean", "alpha_stddev"))


@pytest.mark.parametrize("per_dim", [True, False])
def test_the_m_step_is_weighted_likelihood_and_weighted_kls(script, monkeypatch, per_dim):
    """Its gradient, by finite differences of a loss with densities of SciPy (P8)."""
    free_policy(monkeypatch, script)
    args, state, actions, weights = m_step_problem(script, per_dim_constraining=per_dim)
    inputs = state, None, actions, weights, args
    old_mean, old_stddev = float64(state.target_actor)
    u, w = float64(actions), float64(weights)
    alpha_mean, alpha_stddev = multipliers(state)
    rng = np.random.default_rng(1)
    actor = (
        jnp.float32(old_mean + 0.1 * rng.normal(size=old_mean.shape)),
        jnp.float32(old_stddev * np.exp(0.2 * rng.normal(size=old_mean.shape))),
    )

    def loss(actor):
        mean, stddev = actor
        fit = stats.norm.logpdf(u, mean, old_stddev) + stats.norm.logpdf(u, old_mean, stddev)
        kl_mean = (mean - old_mean) ** 2 / (2 * old_stddev**2)
        kl_stddev = np.log(stddev / old_stddev) + old_stddev**2 / (2 * stddev**2) - 0.5
        kls = (alpha_mean * kl_mean).sum(axis=1) + (alpha_stddev * kl_stddev).sum(axis=1)
        return (kls - (w * fit.sum(axis=2)).sum(axis=0)).mean()

    ours = jax.jit(jax.value_and_grad(lambda p: script.actor_loss(p, *inputs)[0]))(actor)
    np.testing.assert_allclose(ours[0], loss(float64(actor)), rtol=1e-5)
    assert_close(ours[1], finite_differences(loss, actor), rtol=2e-4)


def test_the_m_step_ends_between_the_target_policy_and_the_samples(script, monkeypatch):
    """The closed form for a free policy and fixed multipliers (P9)."""
    free_policy(monkeypatch, script)
    args, state, actions, weights = m_step_problem(script)
    inputs = script.actor_loss, state, None, actions, weights, args

    def step(actor, _):
        return script.gradient_step(actor, *inputs)[0], None

    actor = script.trained(state.target_actor, optax.linear_schedule(3e-3, 0, 4000))
    actor, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=4000))(actor)
    old_mean, old_stddev = float64(state.target_actor)
    u, w = float64(actions), float64(weights)[..., None] / 2
    alpha_mean, alpha_stddev = (x / 2 for x in multipliers(state))
    expected = ((w * u).sum(axis=0) + alpha_mean * old_mean) / (1 + alpha_mean)
    np.testing.assert_allclose(actor.params[0], expected, atol=1e-4)
    spread = (w * (u - old_mean) ** 2).sum(axis=0)
    expected = np.sqrt((spread + alpha_stddev * old_stddev**2) / (1 + alpha_stddev))
    np.testing.assert_allclose(actor.params[1], expected, atol=1e-4)


def test_multipliers_settle_where_the_kl_is_its_bound(script, monkeypatch):
    """One state, a free mean and its multiplier, learned together (P9)."""
    free_policy(monkeypatch, script)
    old_mean, old_stddev, epsilon = 0.3, 0.4, 2.5e-3
    args = small_args(script, epsilon_mean=epsilon, epsilon_stddev=1.0, action_penalty=False)
    rng = np.random.default_rng(0)
    actions = jnp.float32(old_mean + old_stddev * rng.normal(size=(SAMPLES, 1, 1)))
    weights = jnp.float32(rng.dirichlet(np.ones(SAMPLES))[:, None])
    old = jnp.full((1, 1), old_mean), jnp.full((1, 1), old_stddev)

    def step(carry, _):
        actor, duals = carry
        inputs = trust_region(old, duals.params), None, actions, weights, args
        actor, (kls, _) = script.gradient_step(actor, script.actor_loss, *inputs)
        inputs = script.dual_loss, actions, None, kls, args
        duals, metrics = script.gradient_step(duals, *inputs)
        return (actor, duals), metrics

    duals = {"alpha_mean": jnp.zeros(1), "alpha_stddev": jnp.zeros(1)}
    carry = script.trained(old, 1e-3), script.trained(duals, 1e-2)
    _, metrics = jax.jit(lambda x: jax.lax.scan(step, x, length=8000))(carry)
    best = (np.asarray(weights) * np.asarray(actions)[..., 0]).sum()
    expected = abs(best - old_mean) / (old_stddev * np.sqrt(2 * epsilon)) - 1
    assert expected > 0.5
    np.testing.assert_allclose(metrics["kl_mean_rel"][-2000:].mean(), 1, rtol=0.03)
    np.testing.assert_allclose(metrics["alpha_mean"][-2000:].mean(), expected, rtol=0.05)


@pytest.mark.parametrize("per_dim", [True, False])
def test_a_multiplier_rises_while_its_kl_is_above_the_bound(script, per_dim):
    """And falls while it is below, each by itself, and never below 0 (P10)."""
    args = small_args(script, per_dim_constraining=per_dim, action_penalty=False)
    duals = init(script, args).duals.params
    constraints = ACT if per_dim else 1
    assert set(duals) == {"alpha_mean", "alpha_stddev"}  # temperatures are solved for
    for name, x in duals.items():
        assert x.shape == (constraints,)
        np.testing.assert_allclose(script.multiplier(x), getattr(args, name), rtol=1e-5)
    direction = np.array([1.0, -1, 1])[:constraints]
    kls = (
        args.epsilon_mean * jnp.float32(1 + 0.5 * direction),
        args.epsilon_stddev * jnp.float32(1 - 0.5 * direction),
    )
    gradient, metrics = jax.grad(script.dual_loss, has_aux=True)(duals, None, None, kls, args)
    assert_equal(np.sign(-gradient["alpha_mean"]), direction)
    assert_equal(np.sign(-gradient["alpha_stddev"]), -direction)
    np.testing.assert_allclose(metrics["kl_mean_rel"], np.mean(1 + 0.5 * direction), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_mean_rel_max"], 1.5, rtol=1e-5)
    assert (script.multiplier(jnp.array([-1e3, -18.0, 0.0, 1e3])) > 0).all()


def test_dual_variables_stay_where_they_can_come_back_from(script):
    args = small_args(script, target_network_frequency=3)
    state = init(script, args)
    low = jax.tree.map(lambda x: np.full(x.shape, -30, np.float32), state.duals.params)
    new, _ = update(script, replaced(state, duals=low), random_batch(script), args)
    assert_equal(new.duals.params, jax.tree.map(lambda x: np.full_like(x, -18), low))


# --- the policy and acting ------------------------------------------------------------------------


def test_the_first_policy_is_wide_and_central(script):
    args = small_args(script, initial_stddev=0.3)
    obs = jnp.float32(np.random.default_rng(0).normal(size=(BATCH, OBS)))
    mean, stddev = script.policy(init(script, args).actor.params, obs, args)
    np.testing.assert_allclose(mean, 0, atol=0.05)
    np.testing.assert_allclose(stddev, 0.3, rtol=0.05)


def test_exploring_samples_the_gaussian_and_clips_it(script):
    args, buffer = linear_args(script), script.make_buffer(OBS, ACT, small_args(script))
    mean, stddev = np.array([0.0, 0.9, -0.5]), np.array([0.2, 0.5, 0.05])
    state = replaced(init(script, args), actor=gaussian_actor(mean, stddev, args))
    steps = 10_000 + np.arange(5_003)
    action = np.asarray(oracles.explore(script, state, buffer, args, step=steps))
    np.testing.assert_allclose(np.corrcoef(action.T), np.eye(ACT), atol=0.06)
    assert np.abs(action).max() == 1
    probabilities = np.array([0.05, 0.3, 0.5])
    for i in range(ACT):
        expected = np.clip(stats.norm.ppf(probabilities, mean[i], stddev[i]), -1, 1)
        np.testing.assert_allclose(
            np.quantile(action[:, i], probabilities), expected, atol=0.1 * stddev[i]
        )


# --- targets and updates --------------------------------------------------------------------------


def test_the_target_is_the_smaller_expected_value(script):
    args = linear_args(script, gamma=0.9)
    batch = random_batch(script)
    next_q = np.random.default_rng(0).normal(size=(2, SAMPLES, BATCH)).astype(np.float32)
    target = script.td_target(batch, jnp.asarray(next_q), args)
    smaller = np.minimum(next_q[0].mean(axis=0), next_q[1].mean(axis=0))
    expected = batch.reward + 0.9 * batch.discount * smaller
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [1, SAMPLES, 100])  # all states at once, or 3 and 3 and 1
@pytest.mark.parametrize("layer_norm", [False, True])
def test_values_of_sampled_actions_are_those_of_the_critics(script, samples, layer_norm):
    """At the actions that the environment would receive: clipped, not squashed."""
    args = small_args(script, action_samples=samples, layer_norm=layer_norm)
    critic = perturbed(init(script, args).critic.params)
    obs = random_batch(script).obs
    actions = np.float32(np.random.default_rng(1).normal(size=(samples, BATCH, ACT)))
    values = compiled(script.sampled_values)(critic, obs, actions, args=args)
    assert values.shape == (2, samples, BATCH)
    for j in range(samples):
        expected = oracles.q_values(float64(critic), obs, np.clip(actions[j], -1, 1), args)
        assert_close(values[:, j], expected)


def test_sampled_actions_are_those_of_the_policy_in_their_state(script):
    """N for every state, each with noise of its own."""
    args = linear_args(script, action_samples=10_007)
    kernel = np.zeros((OBS, 2 * ACT))
    kernel[0, :ACT] = 1
    bias = gaussian_actor(0.1 * np.arange(ACT), 0.5, args)["params"]["Dense_2"]["bias"]
    actor = linear(kernel, bias)
    obs = jnp.arange(2.0)[:, None] * jnp.ones((1, OBS))
    actions = np.asarray(script.sample_actions(actor, obs, jax.random.key(0), args))
    assert actions.shape == (10_007, 2, ACT)
    expected = np.arange(2)[:, None] + 0.1 * np.arange(ACT)
    np.testing.assert_allclose(actions.mean(axis=0), expected, atol=0.02)
    np.testing.assert_allclose(actions.std(axis=0), 0.5, rtol=0.03)
    correlation = np.corrcoef(actions.reshape(len(actions), -1).T)
    np.testing.assert_allclose(correlation, np.eye(2 * ACT), atol=0.05)
    assert (np.abs(actions) > 1).any()  # the critics clip them, and the penalty needs the rest


def test_an_update_follows_the_target_networks(script, monkeypatch):
    """The critics descend the error to a fixed target; samples and values are of the targets."""
    args = small_args(script, hidden_width=3)
    old, batch = optimised(perturbed_state(script, args), DESCENT), random_batch(script)
    noise = np.random.default_rng(0).normal(size=(SAMPLES, BATCH, ACT)).astype(np.float32)

    def sample_actions(actor, obs, key, args):
        mean, stddev = script.policy(actor, obs, args)
        return mean[None] + stddev[None] * noise

    monkeypatch.setattr(script, "sample_actions", sample_actions)
    key = jax.random.key(0)
    new, metrics = jax.jit(lambda *x: script.update(*x, key, args))(old, batch)

    obs, action, reward, discount, next_obs = float64(batch)
    out = oracles.mlp(float64(old.target_actor), next_obs)
    mean, spread = out[:, :ACT], out[:, ACT:]
    u = mean + (args.initial_stddev / np.log(2) * np.log1p(np.exp(spread)) + 1e-6) * noise
    values = partial(oracles.q_values, float64(old.target_critic), next_obs, args=args)
    next_q = np.stack([values(np.clip(x, -1, 1)) for x in u], axis=1)
    target = reward + args.gamma * discount * next_q.mean(axis=1).min(axis=0)

    def loss(critic):
        return np.square(oracles.q_values(critic, obs, action, args) - target).mean(axis=1).sum()

    gradient = difference(old.critic.params, new.critic.params)
    assert_close(gradient, finite_differences(loss, old.critic.params), rtol=1e-4)
    temperature = solution(next_q.mean(axis=0), args.epsilon)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-4)

    # The M-step, with weights made of these values and samples, at the states of these samples.
    q, cost = next_q.mean(axis=0), -np.linalg.norm(u - np.clip(u, -1, 1), axis=-1)
    weights = special.softmax(q / temperature, axis=0)
    weights += special.softmax(cost / solution(cost, args.epsilon_penalty), axis=0)
    inputs = old, batch.next_obs, np.float32(u), np.float32(weights), args
    moving, (kls, _) = jax.grad(script.actor_loss, has_aux=True)(old.actor.params, *inputs)
    assert_close(difference(old.actor.params, new.actor.params), moving, rtol=1e-3)

    # Multipliers learn from the KLs of the policy that the samples moved, not of the new one.
    expected, _ = jax.grad(script.dual_loss, has_aux=True)(old.duals.params, u, q, kls, args)
    assert_close(difference(old.duals.params, new.duals.params), expected, rtol=1e-3)


def test_targets_are_copies_every_period(script):
    args = small_args(script, target_network_frequency=3)
    state, batch = init(script, args), random_batch(script)
    for number in range(1, 7):
        old, (state, _) = state, update(script, state, batch, args)
        for name in ("actor", "critic"):
            target, online = getattr(state, f"target_{name}"), params_of(state, name)
            assert moved(online, params_of(old, name))
            if number % 3 == 0:
                assert_equal(target, online)
            else:
                assert_equal(target, getattr(old, f"target_{name}"))
        assert moved(state.duals.params, old.duals.params)


def test_solvers_share_an_update(script, monkeypatch):
    """Temperatures of Newton and SLSQP lead to the same steps, and no step traces anything anew."""
    traces, original = [], script.temperature_loss
    monkeypatch.setattr(
        script, "temperature_loss", lambda *args: (traces.append(args), original(*args))[1]
    )
    batch, results = random_batch(script), []
    for solver in ("newton", "slsqp"):
        args = small_args(script, temperature_solver=solver, target_network_frequency=3)
        state, step = init(script, args), jax.jit(partial(script.update, args=args))
        seen = []
        for number in range(3):
            state, metrics = step(state, batch, jax.random.key(number))
            seen.append(len(traces))
        assert seen[0] == seen[-1]
        results.append(metrics)
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=2e-2, err_msg=name)
