"""States, batches and float64 references that the tests of the mathematics share.

The references are NumPy, written from the papers; they share no line with the scripts. Inputs and
comparisons are NumPy too: outside jit, JAX would compile every operation for every shape.
"""

from functools import cache, partial

import jax
import numpy as np
import optax
from conftest import SMALL, small_args
from flax.training.train_state import TrainState

OBS, ACT, BATCH = 5, 3, 7  # distinct primes, so that no two axes can be mistaken for each other
SAMPLES = SMALL["action_samples"]  # a prime, too, and no array has it beside [O]


# --- inputs ---------------------------------------------------------------------------------------


def step_sizes(script, actor=3e-4, critic=3e-4, duals=3e-4) -> dict:
    """The flags of Adam's step sizes; TD3 has one for all, SAC one for its actor and alpha."""
    if script.algorithm == "td3":
        return dict(learning_rate=critic)
    rates = dict(policy_lr=actor, q_lr=critic)
    return rates | (dict(dual_lr=duals) if script.algorithm == "mpo" else {})


def noiseless(script) -> dict:
    """The flags that leave no noise and no entropy in actions, targets and losses."""
    if script.algorithm == "td3":
        return dict(policy_noise=0.0, exploration_noise=0.0)
    if script.algorithm == "mpo":
        return dict(initial_stddev=1e-30)
    return dict(log_std_min=-20.0, log_std_max=-20.0, alpha=1e-30, autotune=False)


def always(script) -> dict:
    """The flag that lets TD3's actor, and the targets of TD3 and MPO, move at every update."""
    flags = dict(td3="policy_frequency", mpo="target_network_frequency")
    return {flags[script.algorithm]: 1} if script.algorithm in flags else {}


def linear_args(script, **changes):
    """Flags of networks that a test can write down with `linear`."""
    return small_args(script, **dict(layer_norm=False, normalize_obs=False) | changes)


def linear(kernel, bias) -> dict:
    """Parameters of a network that is linear: its hidden layers pass on both signs of the input."""
    kernel, bias = np.float32(kernel), np.float32(bias)
    inputs, width, critics = kernel.shape[-2], SMALL["hidden_width"], kernel.shape[:-2]
    unused = np.zeros((*critics, width - 2 * inputs, kernel.shape[-1]), np.float32)
    both = np.eye(inputs, width) - np.eye(inputs, width, inputs)
    layers = both, np.eye(width), np.concatenate([kernel, -kernel, unused], axis=-2)
    biases = np.zeros(width), np.zeros(width), bias
    return {
        "params": {
            f"Dense_{i}": {
                "kernel": np.float32(np.broadcast_to(layer, (*critics, *layer.shape[-2:]))),
                "bias": np.float32(np.broadcast_to(offset, (*critics, offset.shape[-1]))),
            }
            for i, (layer, offset) in enumerate(zip(layers, biases))
        }
    }


def constant(values) -> dict:
    """An actor whose last layer returns these values everywhere."""
    return linear(np.zeros((OBS, len(values))), values)


def constant_critics(first: float, second: float) -> dict:
    """Both critics, each with one value everywhere."""
    return linear(np.zeros((2, OBS + ACT, 1)), [[first], [second]])


def action_critics(preference) -> dict:
    """Both critics; the value is the scalar product of the action with a preference [A]."""
    kernel = np.concatenate([np.zeros(OBS), preference])[:, None]
    return linear(np.stack([kernel, kernel]), np.zeros((2, 1)))


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


def init(script, args, seed: int = 0):
    """The state before its first update."""
    return script.init(jax.random.key(seed), OBS, ACT, args)


def update(script, state, batch, args, seed: int = 0):
    """State and metrics after an update."""
    return compiled(script.update)(state, batch, jax.random.key(seed), args=args)


def explore(script, state, buffer, args, obs=np.ones(OBS, np.float32), step=10_000, seed=0):
    """Actions [..., A] at steps [...] of a run that has been learning, unless step says else."""
    key, actor = jax.random.key(seed), state.actor.params

    def at(step):
        return script.explore(actor, buffer, obs, key, step, args)

    step = np.int32(step)
    return jax.vmap(at)(step) if step.ndim else at(step)


def params_of(state, name: str):
    """The parameters of a network, trained or not."""
    value = getattr(state, name)
    return value.params if isinstance(value, TrainState) else value


def replaced(state, **params):
    """The state with other parameters, optimisers as they are."""

    def fields():
        for name, value in params.items():
            old = getattr(state, name)
            yield name, old.replace(params=value) if isinstance(old, TrainState) else value

    return state._replace(**dict(fields()))


DESCENT, REST = optax.sgd(1.0), optax.sgd(0.0)


def optimised(state, by, *names: str):
    """The state with another optimiser for these networks, or for all.

    After a step of DESCENT, old parameters minus new ones are the gradient.
    """
    fields = state._asdict().items()
    trained = {name: x for name, x in fields if isinstance(x, TrainState)}
    chosen = {name: trained[name] for name in names or trained}
    return state._replace(
        **{name: x.replace(tx=by, opt_state=by.init(x.params)) for name, x in chosen.items()}
    )


def perturbed(params, seed: int = 0):
    """Parameters with noise on all: fresh biases of 0 would put dead ReLUs on their kink."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(rng.normal(0, 0.3, x.shape)), params)


def perturbed_state(script, args):
    """A state before its first update in which no two networks are alike."""
    state = init(script, args)
    names = [name for name in state._fields if "actor" in name or "critic" in name]
    noisy = {name: perturbed(params_of(state, name), i) for i, name in enumerate(names)}
    return replaced(state, **noisy)


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


# --- comparisons ----------------------------------------------------------------------------------


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


def shapes(tree):
    """Shape and type of every leaf; a change of any, even of weak types, compiles all again."""
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


# --- references in float64 ------------------------------------------------------------------------


def float64(tree):
    return jax.tree.map(partial(np.asarray, dtype=np.float64), tree)


def difference(old, new):
    """Old parameters minus new ones: after a step of DESCENT, the gradient."""
    return jax.tree.map(np.subtract, float64(old), float64(new))


def mlp(network: dict, x, layer_norm: bool = False):
    """Two hidden layers with ReLU, then a linear one."""
    layers = network["params"]
    for i in range(3):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        if i == 2:
            return x
        if layer_norm:
            norm = layers[f"LayerNorm_{i}"]
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0)


def q_values(critic, obs, action, args):
    """Both critics, [2, B]."""
    x = np.concatenate([obs, action], axis=1)
    both = [jax.tree.map(lambda p: p[i], critic) for i in range(2)]
    return np.stack([mlp(one, x, args.layer_norm)[:, 0] for one in both])


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
