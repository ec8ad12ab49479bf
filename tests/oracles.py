"""States, batches and float64 references that the tests of the mathematics share.

The references are NumPy, written from the papers; they share no line with the scripts. Inputs and
comparisons are NumPy too: outside jit, JAX would compile every operation for every shape.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from conftest import SMALL, small_args

OBS, ACT, BATCH = 5, 3, 7  # distinct primes, so that no two axes can be mistaken for each other
SAMPLES = SMALL["action_samples"]  # a prime, too, and no array has it beside [O]


# --- inputs ---------------------------------------------------------------------------------------


def step_sizes(script, actor=3e-4, critic=3e-4, alpha=3e-4) -> dict:
    """The flags of Adam's step sizes; TD3 has one for the actor and the critics.

    The last is that of alpha, which SAC and MPO call their multipliers.
    """
    if script.algorithm == "td3":
        return dict(learning_rate=critic)
    third = "alpha_lr" if script.algorithm == "sac" else "dual_lr"
    return {"policy_lr": actor, "q_lr": critic, third: alpha}


FROZEN = dict(actor=1e-30, critic=1e-30, alpha=1e-30)  # no float32 parameter moves by so little


def noiseless(script) -> dict:
    """The flags that leave no noise and no entropy in targets and losses."""
    if script.algorithm == "td3":
        return dict(policy_noise=0.0)
    if script.algorithm == "mpo":
        return dict(initial_stddev=1e-30)
    return dict(log_std_min=-20.0, log_std_max=-20.0, alpha=1e-30, autotune=False)


def delay(script, period: int) -> dict:
    """The flag of what does not happen at every update: a step of the actor, or new targets."""
    flag = "target_network_frequency" if script.algorithm == "mpo" else "policy_frequency"
    return {flag: period}


def linear_args(script, **changes):
    """Flags of networks without hidden layers, whose parameters a test can write down."""
    return small_args(script, hidden_layers=0, normalize_obs=False, **changes)


def linear(kernel, bias) -> dict:
    """Parameters of a network without hidden layers."""
    return {"params": {"head": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}}


def constant_critics(first: float, second: float) -> dict:
    """Both critics without hidden layers, each with one value everywhere."""
    return linear(np.zeros((2, OBS + ACT, 1)), [[first], [second]])


@cache
def compiled(function):
    """The function under jit; compiled once for every value of `args`."""
    return jax.jit(function, static_argnames="args")


@cache
def td_target(script):
    """`td_target(state, batch, key, args=args)` under jit: MPO's with the values it is made of."""

    def target(state, batch, key, args):
        actions = script.sample_actions(state.target_actor, batch.next_obs, key, args)
        next_q = script.sampled_values(state.target_critic, batch.next_obs, actions, args)
        return script.td_target(batch, next_q, args)

    return compiled(target if script.algorithm == "mpo" else script.td_target)


@jax.jit
def first(tree):
    """The entry of the first seed."""
    return jax.tree.map(lambda x: x[0], tree)


def init(script, args, seed: int = 0):
    """The state of one seed before its first update."""
    return first(script.init(np.array([seed]), OBS, ACT, args))


def perturbed(params, seed: int = 0):
    """Parameters with noise on all: fresh biases of 0 would put dead ReLUs on their kink."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(rng.normal(0, 0.3, x.shape)), params)


def random_batch(script, size: int = BATCH, seed: int = 0):
    """A minibatch of which every second transition terminates."""
    rng = np.random.default_rng(seed)
    return script.Batch(
        obs=np.float32(rng.normal(size=(size, OBS))),
        action=np.float32(rng.uniform(-1, 1, (size, ACT))),
        reward=np.float32(rng.normal(size=size)),
        discount=np.float32(np.arange(size) % 2),
        next_obs=np.float32(rng.normal(size=(size, OBS))),
    )


def same_observations(script, size: int):
    """A minibatch of one observation, repeated, with reward 1 and no termination."""
    batch = jax.tree.map(lambda x: np.repeat(x[:1], size, axis=0), random_batch(script))
    return batch._replace(reward=np.ones(size, np.float32), discount=np.ones(size, np.float32))


def assert_equal(actual, expected):
    """Every leaf of the two trees is the same, bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol: float = 1e-5):
    """Every leaf agrees, relative to the largest entry of the leaf."""

    def compare(x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(np.asarray(y)).max())

    jax.tree.map(compare, actual, expected)


def moved(new, old) -> bool:
    """Whether any leaf changed at all."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)


def without_key(state):
    """The state with its key as numbers, which can be compared."""
    return state._replace(key=jax.random.key_data(state.key))


# --- references in float64 ------------------------------------------------------------------------


def float64(tree):
    return jax.tree.map(partial(np.asarray, dtype=np.float64), tree)


def mlp(params: dict, x, layer_norm: bool = False, bfloat16: bool = False):
    """Dense layers with ReLU, then a linear head."""
    layers = params["params"]
    for i in range(sum(name.startswith("Dense") for name in layers)):
        factors = x, layers[f"Dense_{i}"]["kernel"]
        if bfloat16 and i > 0:
            factors = [factor.astype(jnp.bfloat16).astype(factor.dtype) for factor in factors]
        x = factors[0] @ factors[1] + layers[f"Dense_{i}"]["bias"]
        if layer_norm:
            norm = layers[f"LayerNorm_{i}"]
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0)
    return x @ layers["head"]["kernel"] + layers["head"]["bias"]


def q_values(critic, obs, action, args):
    """Both critics, [2, B]."""
    x = np.concatenate([obs, action], axis=1)
    both = [jax.tree.map(lambda p: p[i], critic) for i in range(2)]
    return np.stack([mlp(one, x, args.layer_norm, args.bfloat16)[:, 0] for one in both])


def greedy(script, actor, obs):
    """The squashed or clipped mean; actors of SAC and MPO have the spread after the mean."""
    mean = mlp(actor, obs)[..., :ACT]
    return np.clip(mean, -1, 1) if script.algorithm == "mpo" else np.tanh(mean)


def finite_differences(loss, params, step: float = 1e-6):
    """The gradient of `loss(params)` by central differences, a tree like params."""
    leaves, tree = jax.tree.flatten(float64(params))
    leaves = [leaf.copy() for leaf in leaves]
    gradients = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients):
        for i in np.ndindex(leaf.shape):
            here = leaf[i]
            leaf[i] = here + step
            above = loss(jax.tree.unflatten(tree, leaves))
            leaf[i] = here - step
            gradient[i] = (above - loss(jax.tree.unflatten(tree, leaves))) / (2 * step)
            leaf[i] = here
    return jax.tree.unflatten(tree, gradients)


def descended(opt_state):
    """The gradient of the first step that Adam took: its first moment is 0.1 of it."""
    return jax.tree.map(lambda moment: np.asarray(moment) / 0.1, opt_state[0].mu)
