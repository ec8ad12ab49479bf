"""Two problems with a known best policy, which every script's own `update` has to find.

Siblings share the text of their learning (a test compares it), so one backend is enough.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_args
from oracles import step_sizes
from scipy import linalg

pytestmark = pytest.mark.backends("dmc")

GAMMA, BATCH, UPDATES = 0.95, 128, 3000
STATES = np.linspace(-0.6, 0.6, 25)  # where the regulator's best action is inside the box
TUNED = {"xla_backend_optimization_level": 3}  # these run for longer than they compile


def solve(script, problem, seed: int = 0):
    """The state after learning from transitions `problem(state, action)`, drawn afresh."""
    rates = step_sizes(script, actor=1e-3, critic=1e-3)
    flags = rates | exact_flags(script)
    args = small_args(script, layer_norm=False, normalize_obs=False, gamma=GAMMA, **flags)

    def improve(state, key):
        state_key, action_key, update_key = jax.random.split(key, 3)
        obs = jax.random.uniform(state_key, (BATCH, 1), minval=-1.5, maxval=1.5)
        action = jax.random.uniform(action_key, (BATCH, 1), minval=-1, maxval=1)
        reward, discount, next_obs = problem(obs[:, 0], action[:, 0])
        discount = jnp.full(BATCH, discount)
        batch = script.Batch(obs, action, reward, discount, next_obs[:, None])
        return script.update(state, batch, update_key, args)[0], None

    def learn(state, key):
        return jax.lax.scan(improve, state, jax.random.split(key, UPDATES))[0]

    state = script.init(jax.random.key(seed), 1, 1, args)
    return jax.jit(learn, compiler_options=TUNED)(state, jax.random.key(100 + seed)), args


def error_of_actions(script, state, args, best) -> float:
    """How far greedy actions are from the best ones, root mean square."""
    env = SimpleNamespace(low=-np.ones(1), high=np.ones(1))
    policy = script.export(state, script.make_buffer(1, 1, args), env, args)
    actions = [script.greedy_action(policy, obs).item() for obs in np.float32(STATES)[:, None]]
    return np.sqrt(np.square(actions - best(STATES)).mean())


def exact_flags(script) -> dict:
    """What brings each algorithm's own optimum close to that of the problem.

    SAC's policy may keep a deviation of about 0.03. TD3 smooths nothing, and its critics are wide:
    a deterministic policy climbs to the nearest kink of ReLUs, so there must be many. MPO keeps
    less to its old policy than by default, as it has less time to move.
    """
    if script.algorithm == "td3":
        return dict(policy_noise=0.0, hidden_width=128)
    if script.algorithm == "mpo":
        trust = dict(target_network_frequency=25, epsilon_mean=0.01, epsilon_stddev=1e-4)
        return dict(hidden_width=64, action_samples=10, dual_lr=0.01, **trust)
    return dict(target_entropy_scale=2.0)


def test_contextual_bandit(script):
    def best(obs):
        return 0.5 * np.sin(2 * obs)

    def problem(obs, action):
        return -jnp.square(action - 0.5 * jnp.sin(2 * obs)), 0.0, obs

    state, args = solve(script, problem)
    assert error_of_actions(script, state, args, best) < 0.12


def test_linear_quadratic_regulator(script):
    a, b, cost = 0.9, 0.5, 0.1
    discounted = np.sqrt(GAMMA) * np.array([[[a]], [[b]]])
    value = linalg.solve_discrete_are(*discounted, np.eye(1), cost * np.eye(1)).item()
    gain = GAMMA * a * b * value / (cost + GAMMA * b**2 * value)
    np.testing.assert_allclose([value, gain], [1.24197, 1.34427], rtol=1e-5)

    def problem(obs, action):
        return -(jnp.square(obs) + cost * jnp.square(action)), 1.0, a * obs + b * action

    state, args = solve(script, problem)
    assert error_of_actions(script, state, args, lambda obs: -gain * obs) < 0.12
    # At rest nothing is lost; SAC adds the worth of its entropy, and MPO what its noise will cost.
    if script.algorithm == "td3":
        rest = jnp.zeros((1, 1))
        assert np.abs(script.q_values(state.critic.params, rest, rest, args)).max() < 0.1
