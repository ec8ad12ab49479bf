"""States, batches and references in NumPy (JAX would compile every operation for every shape)."""

from functools import cache, partial

import jax
import numpy as np
import optax
from conftest import SMALL, small_args
from flax.training.train_state import TrainState

OBS, ACT, BATCH = 5, 3, 7  # distinct primes, so that no two axes can be mistaken for each other
SAMPLES = SMALL["action_samples"]  # a prime, too, and no array has it beside [O]
LEARNING = 10_000  # a step after all random actions


def step_sizes(script, actor: float, critic: float, duals: float = 1e-2) -> dict:
    """The flags of Adam's step sizes; TD3 has one for all, SAC one for its actor and alpha."""
    if script.algorithm == "td3":
        return dict(learning_rate=critic)
    rates = dict(policy_lr=actor, q_lr=critic)
    return rates | (dict(dual_lr=duals) if script.algorithm == "mpo" else {})


def noiseless(script) -> dict:
    """The flags that leave no noise and no entropy in actions, targets and losses."""
    return {
        "td3": dict(policy_noise=0.0, exploration_noise=0.0),
        "mpo": dict(initial_stddev=1e-30),
        "sac": dict(log_std_min=-20.0, log_std_max=-20.0, alpha=1e-30, autotune=False),
    }[script.algorithm]


def always(script) -> dict:
    """The flag that lets TD3's actor, and the targets of TD3 and MPO, move at every update."""
    flags = dict(td3="policy_frequency", mpo="target_network_frequency")
    return {flags[script.algorithm]: 1} if script.algorithm in flags else {}


def plain_args(script, **changes):
    """Flags of networks that a test can write down."""
    return small_args(script, **dict(layer_norm=False, normalize_obs=False) | changes)


def constant(values) -> dict:
    """An actor whose last layer returns these values everywhere."""
    sizes = OBS, SMALL["hidden_width"], SMALL["hidden_width"], len(values)
    kernels = [np.zeros(sizes[i : i + 2], np.float32) for i in range(3)]
    biases = [*(kernel[0] for kernel in kernels[:2]), np.float32(values)]
    layers = [dict(kernel=x, bias=y) for x, y in zip(kernels, biases)]
    return {"params": {f"Dense_{i}": layer for i, layer in enumerate(layers)}}


def gaussian_actor(script, mean, std, args) -> dict:
    """An actor whose Gaussian is the same everywhere, [A] each; TD3's std is a flag."""
    mean, std = np.broadcast_arrays(np.atleast_1d(mean).astype(float), std)
    if script.algorithm == "td3":
        return constant(np.arctanh(mean))
    if script.algorithm == "mpo":
        spread = np.log(np.expm1(std * np.log(2) / args.initial_stddev))
    else:
        share = (np.log(std) - args.log_std_min) / (args.log_std_max - args.log_std_min)
        spread = np.arctanh(2 * share - 1)
    return constant(np.concatenate([mean, spread]))


@cache
def compiled(function):
    """The function under jit; compiled once for every value of `args`."""
    return jax.jit(function, static_argnames="args")


def init(script, args, seed: int = 0):
    return script.init(jax.random.key(seed), OBS, ACT, args)


def update(script, state, batch, args, seed: int = 0):
    return compiled(script.update)(state, batch, jax.random.key(seed), args=args)


def explore(script, state, buffer, args, obs=np.ones(OBS, np.float32), step=LEARNING, seed=0):
    key, actor, steps = jax.random.key(seed), state.actor.params, np.int32(step)
    actions = jax.vmap(lambda step: script.explore(actor, buffer, obs, key, step, args))
    return np.asarray(actions(steps.reshape(-1))).reshape(*steps.shape, -1)


def params_of(state, name: str):
    """The parameters of a network, trained or not."""
    value = getattr(state, name)
    return value.params if isinstance(value, TrainState) else value


def replaced(state, **params):
    """The state with other parameters, optimisers as they are."""
    for name, value in params.items():
        old = getattr(state, name)
        value = old.replace(params=value) if isinstance(old, TrainState) else value
        state = state._replace(**{name: value})
    return state


DESCENT, REST = optax.sgd(1.0), optax.sgd(0.0)


def optimised(state, by):
    """The state with other optimisers; a step of DESCENT subtracts the gradient."""
    trained = {name: x for name, x in state._asdict().items() if isinstance(x, TrainState)}
    return state._replace(
        **{name: x.replace(tx=by, opt_state=by.init(x.params)) for name, x in trained.items()}
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
        discount=np.float32(0.9 * (np.arange(size) % 2)),
        next_obs=np.float32(rng.normal(size=(size, OBS))),
    )


def same_observations(script, size: int):
    """A minibatch of one observation, repeated, with reward 1 and no termination."""
    batch = jax.tree.map(lambda x: np.repeat(x[:1], size, axis=0), random_batch(script))
    return batch._replace(reward=np.ones(size, np.float32), discount=np.ones(size, np.float32))


def assert_equal(actual, expected):
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


def float64(tree):
    return jax.tree.map(partial(np.asarray, dtype=np.float64), tree)


def difference(old, new):
    return jax.tree.map(np.subtract, float64(old), float64(new))


def mlp(network: dict, x, layer_norm: bool = False):
    """Two hidden layers with ReLU, then a linear one."""
    layers = network["params"]
    for i in range(3):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        if i < 2 and layer_norm:
            norm = layers[f"LayerNorm_{i}"]
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return x


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
    flat, ends = np.concatenate([x.ravel() for x in leaves]), np.cumsum([x.size for x in leaves])

    def as_tree(x):
        rows = zip(np.split(x, ends[:-1]), leaves)
        return jax.tree.unflatten(tree, [row.reshape(leaf.shape) for row, leaf in rows])

    steps = step * np.eye(flat.size)
    rises = [loss(as_tree(flat + x)) - loss(as_tree(flat - x)) for x in steps]
    return as_tree(np.array(rises) / (2 * step))
