"""A linear-quadratic regulator, whose best policy is known: each algorithm's `update` finds it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import plain_args, step_sizes
from scipy import linalg

pytestmark = pytest.mark.backends("dmc")

GAMMA, BATCH, UPDATES = 0.95, 128, 3000
A, B, COST = 0.9, 0.5, 0.1
TUNED = {"xla_backend_optimization_level": 3}  # this runs for longer than it compiles
# What brings each algorithm's own optimum close to that of the problem. SAC may keep a deviation of
# about 0.03. TD3 smooths nothing, and its critics are wide: a deterministic policy climbs to the
# nearest kink of ReLUs, so there must be many. MPO keeps less to its old policy: it has less time.
FLAGS = {
    "td3": dict(policy_noise=0.0, hidden_width=128),
    "mpo": dict(hidden_width=64, action_samples=10, epsilon_mean=0.01, epsilon_stddev=1e-4)
    | dict(target_network_frequency=25),
    "sac": dict(target_entropy_scale=2.0),
}


def test_linear_quadratic_regulator(script):
    flags = step_sizes(script, actor=1e-3, critic=1e-3) | FLAGS[script.algorithm]
    args = plain_args(script, gamma=GAMMA, **flags)

    def improve(state, key):
        obs_key, action_key, update_key = jax.random.split(key, 3)
        obs = jax.random.uniform(obs_key, (BATCH, 1), minval=-1.5, maxval=1.5)
        action = jax.random.uniform(action_key, (BATCH, 1), minval=-1, maxval=1)
        reward = -(jnp.square(obs) + COST * jnp.square(action))[:, 0]
        batch = script.Batch(obs, action, reward, jnp.ones(BATCH), A * obs + B * action)
        return script.update(state, batch, update_key, args)[0], None

    learn = jax.jit(lambda *x: jax.lax.scan(improve, *x)[0], compiler_options=TUNED)
    keys = jax.random.split(jax.random.key(100), UPDATES)
    state = learn(script.init(jax.random.key(0), 1, 1, args), keys)

    discounted = np.sqrt(GAMMA) * np.array([[[A]], [[B]]])
    value = linalg.solve_discrete_are(*discounted, np.eye(1), COST * np.eye(1)).item()
    gain = GAMMA * A * B * value / (COST + GAMMA * B**2 * value)
    env, obs = SimpleNamespace(low=-np.ones(1), high=np.ones(1)), np.float32(np.linspace(-0.6, 0.6))
    policy = script.export(state, script.make_buffer(1, 1, args), env, args)
    actions = [script.greedy_action(policy, x).item() for x in obs[:, None]]
    assert np.abs(gain * obs).max() < 0.9  # inside the box
    assert np.sqrt(np.square(actions + gain * obs).mean()) < 0.12
    # At rest nothing is lost; SAC adds the worth of its entropy, and MPO what its noise will cost.
    if script.algorithm == "td3":
        rest = jnp.zeros((1, 1))
        assert np.abs(script.q_values(state.critic.params, rest, rest, args)).max() < 0.1
