"""What MPO adds: temperatures, weighted samples, a decoupled M-step within trust regions."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import small_args
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from oracles import (  # isort: skip
    ACT, BATCH, DESCENT, OBS, SAMPLES, assert_close, assert_equal, compiled, difference,
    finite_differences, float64, init, moved, optimised,
    params_of, perturbed, perturbed_state, random_batch, replaced, shapes, update,
)  # fmt: skip

pytestmark = [pytest.mark.algorithms("mpo"), pytest.mark.backends("dmc")]

EPSILON = 0.1


def attained_kl(q, temperature) -> float:
    """KL to uniform of the weights that a temperature gives q [N, B], the mean over states."""
    x = (np.float64(q) - np.float64(q).max(axis=0)) / np.float64(temperature)
    log_ratio = special.log_softmax(x, axis=0) + np.log(len(x))
    return (np.exp(log_ratio) * log_ratio - np.expm1(log_ratio)).mean()


jitted = oracles.cache(jax.jit)


def newton(script, q, epsilon=EPSILON):
    return float(jitted(script.newton_temperature)(np.float32(q), epsilon))


@pytest.mark.parametrize("case", range(4))
def test_losses_and_gradients_are_those_of_acme(script, case, monkeypatch):
    """Weights, losses, KLs and all gradients of acme/jax/losses/mpo.py, on stored inputs (P8)."""
    monkeypatch.setattr(script, "policy", lambda actor, obs, args: actor)  # mean and deviation
    stored, prefix = np.load(Path(__file__).parent / "data" / "mpo_loss.npz"), f"case{case}/"
    keys = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
    acme = SimpleNamespace(**{key: stored[prefix + key] for key in keys})
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
    target = SimpleNamespace(
        target_actor=(acme.target_mean, acme.target_stddev), duals=SimpleNamespace(params=duals)
    )
    actor = jnp.asarray(acme.online_mean), jnp.asarray(acme.online_stddev)
    q, actions = jnp.asarray(acme.q_values), jnp.asarray(acme.actions)
    close = partial(np.testing.assert_allclose, rtol=1e-4)

    @jax.jit
    def both(actor, duals):
        weights, metrics = script.e_step(actions, q, duals, args)
        inputs = target, None, actions, weights, args
        step = jax.value_and_grad(script.actor_loss, has_aux=True)
        (actor_loss, (kls, _)), gradient = step(actor, *inputs)
        step = jax.value_and_grad(script.dual_loss, has_aux=True)
        (dual_loss, _), dual_gradient = step(duals, actions, q, kls, args)
        return metrics, kls, actor_loss + dual_loss, gradient, dual_gradient

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
        weights = jitted(script.e_step_weights)(q, np.float32(temperature))
        wanted = special.softmax(np.float64(q - q.max(axis=0)) / temperature, axis=0)
        np.testing.assert_allclose(weights, wanted, atol=1e-5)
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


def test_a_small_bound_is_met_in_spite_of_rounding(script):
    """Where weights are nearly uniform, their KL is a small difference of large terms."""
    q = 50 + np.random.default_rng(0).normal(size=(20, 64))
    for epsilon in (1e-3, 1e-4, 1e-5):
        kl = attained_kl(np.float32(q), newton(script, q, epsilon))
        assert kl == pytest.approx(epsilon, rel=1e-4)


def test_the_gradient_solver_weighs_by_the_temperature_before_its_step(script):
    args = small_args(script, temperature_solver="gradient", temperature=3.0)
    state = init(script, args)
    new, metrics = update(script, state, random_batch(script), args)
    for name in ("temperature", "penalty_temperature"):
        before, after = state.duals.params[name], new.duals.params[name]
        np.testing.assert_allclose(script.multiplier(before), 3, rtol=1e-5)
        np.testing.assert_allclose(metrics[name], 3, rtol=1e-5)
        np.testing.assert_allclose(np.abs(after - before), args.dual_lr, rtol=1e-3)
    assert shapes(new) == shapes(state)


@pytest.mark.parametrize("stddev", np.float32([0.03, 0.3, 1.0]))
@pytest.mark.parametrize("move", [0, 0.2, -0.5])
@pytest.mark.parametrize("factor", [1, 1.001, 1.01, 1.3, 0.6])
def test_the_kl_of_gaussians_is_the_expected_log_ratio(script, stddev, move, factor):
    """By quadrature (P7); the default bound of 1e-6 is a change of 0.1 % in the deviation."""
    new = np.float32([move * stddev, factor * stddev])
    kl = script.kl_normal(jnp.float32(0), jnp.asarray(stddev), *jnp.asarray(new))
    x = np.linspace(-12, 12, 100_001)
    ratio = stats.norm.logpdf(x) - stats.norm.logpdf(x, *float64(new) / stddev)
    expected = integrate.trapezoid(stats.norm.pdf(x) * ratio, x)
    np.testing.assert_allclose(kl, expected, rtol=5e-4, atol=1e-12)


@pytest.mark.parametrize("per_dim", [True, False])
def test_dual_variables_start_at_their_flags_and_can_always_come_back(script, per_dim):
    """Temperatures are solved for, and need none (P10)."""
    args = small_args(script, per_dim_constraining=per_dim, target_network_frequency=3)
    state = init(script, args)
    assert set(state.duals.params) == {"alpha_mean", "alpha_stddev"}
    for name, x in state.duals.params.items():
        expected = np.full(ACT if per_dim else 1, getattr(args, name))
        np.testing.assert_allclose(script.multiplier(x), expected, rtol=1e-5)
    low = jax.tree.map(lambda x: np.full(x.shape, -30, np.float32), state.duals.params)
    new, _ = update(script, replaced(state, duals=low), random_batch(script), args)
    assert_equal(new.duals.params, jax.tree.map(lambda x: np.full_like(x, -18), low))
    assert (script.multiplier(jnp.array([-1e3, -18.0, 0.0, 1e3])) > 0).all()


def test_the_first_policy_is_wide_and_central(script):
    args = small_args(script, initial_stddev=0.3)
    obs = jnp.float32(np.random.default_rng(0).normal(size=(BATCH, OBS)))
    mean, stddev = script.policy(init(script, args).actor.params, obs, args)
    np.testing.assert_allclose(mean, 0, atol=0.05)
    np.testing.assert_allclose(stddev, 0.3, rtol=0.05)


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


def test_sampled_actions_are_those_of_the_policy_in_their_state(script, monkeypatch):
    """N for every state, each with noise of its own."""
    obs, args = random_batch(script, size=2).obs, small_args(script, action_samples=10_007)
    monkeypatch.setattr(script, "policy", lambda *_: (obs[:, :ACT], np.full((2, ACT), 0.5)))
    actions = np.asarray(script.sample_actions(None, obs, jax.random.key(0), args))
    assert actions.shape == (10_007, 2, ACT)
    np.testing.assert_allclose(actions.mean(axis=0), obs[:, :ACT], atol=0.02)
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
    target = reward + args.gamma * discount * next_q.mean(axis=(0, 1))

    def loss(critic):
        return np.square(oracles.q_values(critic, obs, action, args) - target).mean(axis=1).sum()

    gradient = difference(old.critic.params, new.critic.params)
    assert_close(gradient, finite_differences(loss, old.critic.params), rtol=1e-4)
    temperature = solution(next_q.mean(axis=0), args.epsilon)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl_weights_rel"], 1, rtol=1e-3)

    # The M-step, with weights made of these values and samples, at the states of these samples.
    q, cost = next_q.mean(axis=0), -np.linalg.norm(u - np.clip(u, -1, 1), axis=-1)
    weights = special.softmax(q / temperature, axis=0)
    entropy = -special.xlogy(weights, weights).sum(axis=0).mean()
    np.testing.assert_allclose(metrics["effective_samples"], np.exp(entropy), rtol=1e-4)
    weights += special.softmax(cost / solution(cost, args.epsilon_penalty), axis=0)
    inputs = old, batch.next_obs, np.float32(u), np.float32(weights), args
    moving, (kls, _) = jax.grad(script.actor_loss, has_aux=True)(old.actor.params, *inputs)
    assert_close(difference(old.actor.params, new.actor.params), moving, rtol=1e-3)

    # Multipliers learn from the KLs of the policy that the samples moved, not of the new one.
    expected, _ = jax.grad(script.dual_loss, has_aux=True)(old.duals.params, u, q, kls, args)
    np.testing.assert_allclose(metrics["kl_mean_rel"], kls[0].mean() / args.epsilon_mean, rtol=1e-4)
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
