# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.6", "flax>=0.10.6", "optax>=0.2.4", "numpy>=2.2", "gymnasium>=1.3", "shimmy>=2.0.1",
#   "mujoco>=3.3.2,<4", "pydantic>=2.10", "tyro>=0.9.20",
#   "tensorboardX>=2.6.2", "tqdm>=4.66", "scipy>=1.14", "moviepy>=2.1",
# ]
# ///
"""Maximum a Posteriori Policy Optimisation on Gymnasium environments, in one file.

Abdolmaleki et al., "Maximum a Posteriori Policy Optimisation", arXiv:1806.06920v1, with the
decoupled M-step of "Relative Entropy Regularized Policy Iteration", arXiv:1812.02256v1.

    python mpo_gym.py --env-id HalfCheetah-v5 --total-timesteps 1000000

Where a default may depart from the paper, its flag has the paper's in brackets. Besides, the
temperature is solved for exactly, the critics are two, and actions are clipped to [-1, 1].
"""

import importlib
import json
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from scipy import optimize
from tensorboardX import SummaryWriter
from tqdm import tqdm

Params = Any  # a tree of Flax parameters
Fraction = Annotated[float, Field(gt=0, le=1)]


class Args(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Flags of the run, from --env-id its environment's, from --buffer-size MPO's."""

    exp_name: str = Path(__file__).stem  # name of the experiment, in the run directory's name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of all that is random
    run_dir: str | None = None  # where to begin or go on; else runs/ID__NAME__SEED__TIME
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "jax-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # film one episode of every evaluation into RUN_DIR/videos
    total_timesteps: PositiveInt = 1_000_000  # environment steps
    eval_frequency: NonNegativeInt = 5_000  # environment steps between evaluations, 0 for none
    eval_episodes: PositiveInt = 10  # episodes of the greedy policy in an evaluation
    log_frequency: PositiveInt = 1_000  # environment steps between logged losses
    checkpoint_frequency: NonNegativeInt = 25_000  # steps between checkpoints, 0 for none

    env_id: str = "HalfCheetah-v5"  # registered id, package:id, or old_gym/id for OpenAI Gym
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    action_repeat: PositiveInt = 1  # environment steps for which an action is held

    buffer_size: PositiveInt = 1_000_000  # transitions kept for replay
    learning_starts: PositiveInt = 10_000  # random environment steps at first
    updates_per_step: PositiveInt = 1  # gradient updates for each action
    batch_size: PositiveInt = 256  # transitions in the minibatch of an update
    gamma: Fraction = 0.99  # discount factor
    n_step: PositiveInt = 1  # rewards in a target before it bootstraps
    target_network_frequency: PositiveInt = 100  # updates between copies of actor and critics
    action_samples: PositiveInt = 20  # actions sampled in each state, N
    hidden_width: PositiveInt = 256  # units of each of the two hidden layers
    layer_norm: bool = True  # LayerNorm before each activation of the critics (paper: off)
    normalize_obs: bool = True  # normalise observations by their running moments (paper: off)

    policy_lr: PositiveFloat = 3e-4  # Adam's step size for the actor
    q_lr: PositiveFloat = 3e-4  # Adam's step size for the critics
    dual_lr: PositiveFloat = 1e-2  # Adam's step size for the dual variables
    temperature_solver: Literal["newton", "slsqp", "gradient"] = "newton"  # exact, or Adam's steps
    temperature: PositiveFloat = 1.0  # start of the temperatures with --temperature-solver gradient
    alpha_mean: PositiveFloat = 1.0  # start of the multipliers that hold back the mean
    alpha_stddev: PositiveFloat = 10.0  # start of those that hold back the standard deviation
    epsilon: PositiveFloat = 0.1  # bound on the KL of the weights of sampled actions
    epsilon_penalty: PositiveFloat = 1e-3  # the same bound for the weights that penalise actions
    epsilon_mean: PositiveFloat = 2.5e-3  # bound on the KL that moving the policy's mean causes
    epsilon_stddev: PositiveFloat = 1e-6  # bound on the KL of changing its standard deviation
    per_dim_constraining: bool = True  # bound these per dimension, not their sum (paper: off)
    action_penalty: bool = True  # weigh sampled actions by their distance from [-1, 1] (paper: off)
    initial_stddev: PositiveFloat = 0.5  # the policy's standard deviation before the first update


def warn(message: str):
    """Prints a sentence on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    warn(message)
    sys.exit(code)


# --- environment ----------------------------------------------------------------------------------


def make_env(args: Args, **options) -> gym.Env:
    """An environment of Gymnasium, a package, the current directory, or the old OpenAI Gym."""
    sys.path.append(os.getcwd())
    env_id, options = args.env_id, options | json.loads(args.env_kwargs)
    options |= {"disable_env_checker": True}  # the old one fails on NumPy 2
    if env_id.startswith("old_gym/"):
        options = {"env_id": env_id.removeprefix("old_gym/"), "make_kwargs": options}
        env_id = "shimmy:GymV26Environment-v0"
    env = gym.make(env_id, **options)
    # Evaluation would wait for the end of an episode that has none.
    return env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, 10_000)


class Interface(gym.Wrapper):
    """Observations are float32 [O], actions in [-1, 1]; what the environment returns is checked.

    An episode is a function of its numbers and its actions. With `film` the first is filmed.
    """

    def __init__(self, args: Args, film: Path | None = None):
        try:
            env = make_env(args, **{"render_mode": "rgb_array"} if film else {})
            if film:
                env.reset(), env.render()
                env = gym.wrappers.RecordVideo(env, str(film), lambda episode: episode == 0)
            if not isinstance(box := env.action_space, gym.spaces.Box):
                raise TypeError(f"Actions are {box}, not a Box.")
            # Actuators without a limit (lqr says 1e10) are driven in [-1, 1], or 1 from the other.
            middle = np.clip(0, box.low, box.high)
            bounded = lambda x: np.where(abs(np.float64(x)) < 1e6, x, middle + np.sign(x))
            self.low, self.high = (bounded(x).astype(box.dtype) for x in (box.low, box.high))
            self.obs_dim = gym.spaces.flatten_space(env.observation_space).shape[0]
        except Exception as error:  # environments and renderers raise what they like
            if film:
                warn(f"--capture-video is off: {error!r}")
                return self.__init__(args)
            given = f"--env-id {args.env_id} --env-kwargs {args.env_kwargs} cannot be used"
            wanted = "*_dmc.py take domain-task; *_gym.py Env-v5, package:Env or old_gym/Env."
            raise gym.error.Error(f"{given}: {str(error) or repr(error)} {wanted}") from error
        env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
        env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="totals")
        super().__init__(gym.wrappers.RepeatAction(env, args.action_repeat))

    def reset(self, *numbers: int) -> np.ndarray:
        """Begins the episode that the numbers stand for; returns obs [O]."""
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)  # below 2^31
        return self.checked(lambda: (self.env.reset(seed=seed)[0], 0.0, False, False, {}))[0]

    def step(self, action: np.ndarray):
        """Returns obs [O], reward, terminated, truncated and info after an action [A]."""
        low, high = np.float64(self.low), np.float64(self.high)  # differences of integers overflow
        action = low + (action.reshape(low.shape) + 1.0) / 2 * (high - low)
        action = np.round(action) if self.low.dtype.kind in "iu" else action
        # Clipped after the cast, as rounding to float32 can leave the Box.
        action = np.clip(action.astype(self.low.dtype), self.low, self.high)
        return self.checked(lambda: self.env.step(action))

    def checked(self, call):
        """The result of a call; gym.error.Error where nothing can be learned from it."""
        try:
            obs, reward, terminated, truncated, info = call()
            obs = np.float32(gym.spaces.flatten(self.env.observation_space, obs))
            if obs.size != self.obs_dim or not np.isfinite([*obs, np.float32(reward)]).all():
                raise ValueError(f"not {self.obs_dim} finite numbers: {obs}, reward {reward}")
        except Exception as error:
            raise gym.error.Error(f"The environment broke down: {error!r}") from error
        # Taken out of what may be the environment's own dictionary, the same one at each step.
        info = {"episode": info.pop("totals")} if "totals" in info else {}
        return obs, reward, terminated, truncated and not terminated, info


# --- networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two hidden layers with ReLU, and a linear one; LayerNorm, if asked for, before each ReLU."""

    args: Args
    out: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(self.args.hidden_width)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.out)(x)


def q_values(critic: Params, obs, action, args: Args):
    """Both critics, [2, B]."""
    net = MLP(args, 1, args.layer_norm)
    x = jnp.concatenate([obs, action], axis=-1)
    return jax.vmap(net.apply, in_axes=(0, None))(critic, x).squeeze(-1)


def policy(actor: Params, obs, args: Args):
    """Mean and standard deviation, [..., A] each, of the Gaussian whose samples are clipped."""
    net = MLP(args, actor["params"]["Dense_2"]["bias"].size)
    mean, spread = jnp.split(net.apply(actor, obs), 2, axis=-1)
    return mean, args.initial_stddev / jnp.log(2) * jax.nn.softplus(spread) + 1e-6


def sample_actions(actor: Params, obs, key, args: Args):
    """Actions [N, B, A] of the policy at obs [B, O], before they are clipped to [-1, 1]."""
    mean, stddev = policy(actor, obs, args)
    noise = jax.random.normal(key, (args.action_samples, *mean.shape))
    return mean[None] + stddev[None] * noise


# --- state ----------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that learning changes."""

    actor: TrainState  # theta
    critic: TrainState  # phi_1 and phi_2, on a leading axis of 2
    target_actor: Params
    target_critic: Params
    duals: TrainState  # before `multiplier`: alpha_mean and _stddev [A], temperatures [] if learned


@partial(jax.jit, static_argnames=("obs_dim", "action_dim", "args"))
def init(key, obs_dim: int, action_dim: int, args: Args) -> State:
    """The state before the first update."""
    actor_key, critic_key = jax.random.split(key)
    actor = MLP(args, 2 * action_dim).init(actor_key, jnp.zeros(obs_dim))
    # The first policy is nearly the same everywhere: mean 0 and the initial deviation.
    actor["params"]["Dense_2"] = jax.tree.map(lambda x: 0.01 * x, actor["params"]["Dense_2"])
    init_critic = jax.vmap(MLP(args, 1, args.layer_norm).init, in_axes=(0, None))
    critic = init_critic(jax.random.split(critic_key), jnp.zeros(obs_dim + action_dim))
    shape = (action_dim if args.per_dim_constraining else 1,)
    duals = {name: dual(getattr(args, name), shape) for name in ("alpha_mean", "alpha_stddev")}
    if args.temperature_solver == "gradient":
        duals |= {name: dual(args.temperature) for name in ("temperature", "penalty_temperature")}
    return State(
        actor=trained(actor, args.policy_lr),
        critic=trained(critic, args.q_lr),
        target_actor=actor,
        target_critic=critic,
        duals=trained(duals, args.dual_lr),
    )


def trained(params: Params, learning_rate: float) -> TrainState:
    """Parameters with an optimiser of their own."""
    adam = optax.flatten(optax.adam(learning_rate))  # of one vector: fewer arrays to hand about
    return TrainState.create(apply_fn=None, params=params, tx=adam)


# --- replay buffer --------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions; the observations of a minibatch are normalised."""

    obs: jax.Array  # [B, O]
    action: jax.Array  # [B, A] in [-1, 1]
    reward: jax.Array  # [B] discounted sum over k <= n_step steps
    discount: jax.Array  # [B] 0 where the episode terminated, else gamma^(k - 1) after k steps
    next_obs: jax.Array  # [B, O] what the steps led to, never the observation after a reset


class Buffer(NamedTuple):
    """A ring of transitions, and what is known of all that were ever inserted."""

    data: Batch  # B is --buffer-size
    count: jax.Array  # [] transitions so far
    began: jax.Array  # [] count when the episode under way began
    episode: jax.Array  # [] its number
    mean: jax.Array  # [O] of the observations
    lost: jax.Array  # [O] what rounding added to the mean (Kahan), which else stalls after 1e6 rows
    var: jax.Array  # [O] of the observations


def make_buffer(obs_dim: int, action_dim: int, args: Args) -> Buffer:
    """An empty buffer."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", memory)
    if (size := 4 * args.buffer_size * (2 * obs_dim + action_dim + 2)) > memory:
        fail(f"--buffer-size {args.buffer_size} takes {size >> 30} GiB of {memory >> 30} in all.")
    shapes = Batch((obs_dim,), (action_dim,), (), (), (obs_dim,))
    counts, moments = jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, obs_dim)).at[2].set(1)
    data = (jnp.zeros((args.buffer_size, *shape)) for shape in shapes)
    return Buffer(Batch(*data), *(x.squeeze() for x in counts), *moments)


@partial(jax.jit, static_argnames="args", donate_argnames="buffer")
def insert(buffer: Buffer, new: Batch, args: Args) -> Buffer:
    """Adds a transition, also to the up to n_step - 1 before it in its episode.

    A call of its own with the buffer donated: together with `sample` it would copy all of it.
    """
    data, count, began, episode, mean, lost, var = buffer
    k = jnp.arange(args.n_step)  # transitions ago; what is before the episode gets no index
    index = jnp.where(k <= count - began, (count - k) % args.buffer_size, args.buffer_size)
    data = Batch(
        obs=data.obs.at[index[0]].set(new.obs),
        action=data.action.at[index[0]].set(new.action),
        reward=data.reward.at[index[0]].set(0).at[index].add(args.gamma**k * new.reward),
        discount=data.discount.at[index].set(args.gamma**k * new.discount),
        next_obs=data.next_obs.at[index].set(new.next_obs[None]),
    )
    count += 1
    delta = new.obs - mean + lost
    change = delta / count - lost
    lost = (mean + change) - mean - change
    # Welford's update, as a running mean; it forgets the initial variance at the first row.
    var += (jnp.square(delta) * (1 - 1 / count) - var) / count
    return Buffer(data, count, began, episode, mean + change, lost, var)


def sample(buffer: Buffer, key, args: Args) -> Batch:
    """A minibatch drawn uniformly, with replacement."""
    stored = jnp.minimum(buffer.count, args.buffer_size)
    index = jax.random.randint(key, args.batch_size, 0, stored)
    obs, *columns, next_obs = (x[index] for x in buffer.data)
    return Batch(normalize(obs, buffer, args), *columns, normalize(next_obs, buffer, args))


def next_episode(buffer: Buffer) -> Buffer:
    """The buffer when the episode under way has ended."""
    return buffer._replace(began=buffer.count + 0, episode=buffer.episode + 1)


# --- acting ---------------------------------------------------------------------------------------

SQUASH = "clip"  # what brings the greedy action to [-1, 1]


def normalize(obs, buffer: Buffer, args: Args):
    """Observations [..., O] with mean 0 and variance 1, clipped to [-10, 10]."""
    mean, std = (jnp.broadcast_to(x, obs.shape) for x in (buffer.mean, jnp.sqrt(buffer.var)))
    return jnp.clip((obs - mean) / (std + 1e-6), -10, 10) if args.normalize_obs else obs


@partial(jax.jit, static_argnames="args")
def explore(actor: Params, buffer: Buffer, obs, key, step, args: Args):
    """An action [A] for obs [O], of the policy or at first uniformly random; `key` is the run's."""
    key, uniform_key = jax.random.split(jax.random.fold_in(key, step))
    mean, stddev = policy(actor, normalize(obs, buffer, args), args)
    action = mean + stddev * jax.random.normal(key, mean.shape)
    uniform = jax.random.uniform(uniform_key, action.shape, minval=-1, maxval=1)
    return jnp.clip(jnp.where(step > args.learning_starts, action, uniform), -1, 1)


def export(state: State, buffer: Buffer, env: Interface, args: Args) -> dict[str, np.ndarray]:
    """The greedy policy as the arrays of policy.npz, in NumPy."""
    mean, std, clip = np.asarray(buffer.mean), np.sqrt(buffer.var) + np.float32(1e-6), 10.0
    if not args.normalize_obs:
        mean, std, clip = np.zeros_like(mean), np.ones_like(std), np.inf
    arrays = {"obs_mean": mean, "obs_std": std, "obs_clip": np.float32(clip), "squash": SQUASH}
    for i, layer in enumerate(jax.device_get(state.actor.params["params"]).values()):
        arrays |= {f"{name}_{i}": x for name, x in layer.items()}
    return arrays | {"low": env.low, "high": env.high}


def greedy_action(policy: dict[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """The action [A] in [-1, 1] of policy.npz for obs [O], without noise."""
    x = (obs - policy["obs_mean"]) / policy["obs_std"]
    x = np.clip(x, -policy["obs_clip"], policy["obs_clip"])
    x = np.maximum(x @ policy["kernel_0"] + policy["bias_0"], 0)
    x = np.maximum(x @ policy["kernel_1"] + policy["bias_1"], 0)
    x = (x @ policy["kernel_2"] + policy["bias_2"])[: policy["low"].size]  # of a Gaussian the mean
    return np.tanh(x) if policy["squash"] == "tanh" else np.clip(x, -1, 1)


# --- learning -------------------------------------------------------------------------------------


def sampled_values(critic: Params, obs, actions, args: Args):
    """Both critics [2, N, B] of obs [B, O] at actions [N, B, A], which are clipped first."""
    net = MLP(args, 1, args.layer_norm)
    actions = jnp.moveaxis(jnp.clip(actions, -1, 1), 0, 1)
    # On a CPU few states at a time, about 320 rows, whose activations stay in the cache.
    at_once = max(320 // args.action_samples, 1) if jax.default_backend() == "cpu" else len(obs)

    def values(critic):  # of one of the two, [B, N]
        layer = critic["params"]["Dense_0"]
        from_obs, from_action = jnp.split(layer["kernel"], [obs.shape[-1]])

        def of_state(state):
            obs, actions = state
            # What obs adds to the first layer is the same for all N: a bias of this state.
            layer_of_state = {"kernel": from_action, "bias": obs @ from_obs + layer["bias"]}
            params = critic["params"] | {"Dense_0": layer_of_state}
            return net.apply({"params": params}, actions).squeeze(-1)

        return jax.lax.map(of_state, (obs, actions), batch_size=at_once)

    return jnp.moveaxis(jax.lax.map(values, critic), -1, 1)


def td_target(batch: Batch, next_q, args: Args):
    """The critics' mean value expected under the target policy, [B]; next_q [2, N, B]."""
    next_v = next_q.mean(axis=(0, 1))
    return batch.reward + args.gamma * batch.discount * next_v


def critic_loss(critic: Params, batch: Batch, target, args: Args):
    """Mean squared Bellman error, summed over the two critics."""
    q = q_values(critic, batch.obs, batch.action, args)
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"qf_loss": loss, "qf1_values": q[0].mean(), "qf2_values": q[1].mean()}


def temperature_loss(temperature, q, epsilon: float):
    """Dual of the E-step, [], for q [N, B]: convex, and least where the mean KL is epsilon."""
    log_mean_exp = jax.nn.logsumexp(q / temperature, axis=0) - jnp.log(len(q))
    return temperature * (epsilon + log_mean_exp.mean())


def newton_temperature(q, epsilon: float):
    """The minimiser of `temperature_loss`, [], to float32 precision at every scale of q [N, B].

    Newton's method on log KL as a function of x = -log(temperature), which is a line of slope 2
    while the weights are nearly uniform. A step that leaves the bracket or fails to halve is
    replaced by bisection, which ends at nearly greedy weights if even these have a smaller KL.
    """
    q = q - q.max(axis=0, keepdims=True)
    scale = jnp.maximum(-q.min(), 1e-20)
    q = q / scale

    def kl_and_slope(x):
        log_ratio = jnp.exp(x) * q  # of the weights to uniform ones
        log_ratio -= jnp.log(jnp.exp(log_ratio).mean(axis=0, keepdims=True))
        excess = jnp.expm1(log_ratio)
        # The excess has mean 0; subtracted here, it takes rounding of the mean above with it.
        kl = ((1 + excess) * log_ratio - excess).mean(axis=0, keepdims=True)
        return kl.mean(), ((1 + excess) * jnp.square(log_ratio - kl)).mean()

    def iterate(_, carry):
        x, low, high, move = carry
        kl, slope = kl_and_slope(x)
        gap = jnp.log(kl / epsilon)
        low, high = jnp.where(gap <= 0, x, low), jnp.where(gap >= 0, x, high)
        step = gap * kl / slope
        # The bracket is closed and small steps pass, or rounding would bisect a solution away.
        inside = (low <= x - step) & (x - step <= high)
        shrinks = jnp.abs(step) <= jnp.maximum(move / 2, 1e-2)
        new_x = jnp.where(inside & shrinks, x - step, (low + high) / 2)
        return new_x, low, high, jnp.abs(new_x - x)

    low = jnp.log(8 * epsilon / jnp.square(q.min(axis=0)).mean()) / 2  # KL'' <= range^2 / 4
    high = jnp.log(1e10)
    x = jnp.clip(jnp.log(jnp.sqrt(2 * epsilon) / q.std(axis=0).mean()), low, high)
    x, *_ = jax.lax.fori_loop(0, 12, iterate, (x, low, high, high - low))
    return scale * jnp.exp(-x)


def slsqp_temperature(q, epsilon: float):
    """The minimiser of `temperature_loss`, [], by SciPy's SLSQP on the host; q [N, B]."""
    # Scaled so that the answer is 1 if values are Gaussian: SLSQP's tolerance is absolute.
    q = q - q.max(axis=0, keepdims=True)
    scale = jnp.maximum(q.std(axis=0).mean() / jnp.sqrt(2 * epsilon), 1e-20)
    dual_and_slope = jax.jit(jax.value_and_grad(temperature_loss))

    def minimise(q):
        def objective(temperature):
            value, slope = dual_and_slope(np.float32(temperature[0]), q, epsilon)
            return np.float64(value), np.float64([slope])

        result = optimize.minimize(
            objective, [1.0], jac=True, method="SLSQP", bounds=[(1e-10, None)], tol=1e-10
        )
        return np.float32(result.x[0])

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return scale * jax.pure_callback(minimise, shape, q / scale, vmap_method="sequential")


def multiplier(dual):
    """A dual variable made positive: a temperature or the multiplier of a constraint."""
    return jax.nn.softplus(dual) + 1e-8


def dual(multiplier: float, shape=()):
    """The dual variable of a multiplier."""
    return jnp.full(shape, multiplier + jnp.log(-jnp.expm1(-multiplier)), jnp.float32)


def solve_temperature(q, epsilon: float, dual, args: Args):
    """The temperature [] for q [N, B], by the solver that the flags ask for."""
    if args.temperature_solver == "newton":
        return newton_temperature(q, epsilon)
    if args.temperature_solver == "slsqp":
        return slsqp_temperature(q, epsilon)
    return multiplier(dual)


def e_step_weights(q, temperature):
    """Weights [N, B], in proportion to exp(q / temperature), that sum to 1 in every state."""
    return jax.nn.softmax((q - q.max(axis=0, keepdims=True)) / temperature, axis=0)


def kl_uniform(weights):
    """KL of weights [N, B] to uniform ones, the mean [] over states."""
    return jax.scipy.special.rel_entr(weights, 1 / len(weights)).sum(axis=0).mean()


def penalty(actions):
    """Minus the distance of actions [N, B, A] to the box [-1, 1]^A, [N, B]."""
    return -jnp.linalg.norm(actions - jnp.clip(actions, -1, 1), axis=-1)


def e_step(actions, q, duals: Params, args: Args):
    """The improved policy as weights [N, B] of actions [N, B, A] with values q [N, B].

    The penalty is a second objective with a temperature of its own; the weights add up.
    """
    temperature = solve_temperature(q, args.epsilon, duals.get("temperature"), args)
    weights = e_step_weights(q, temperature)
    kl = kl_uniform(weights)
    metrics = {"temperature": temperature, "kl_weights_rel": kl / args.epsilon}
    metrics["effective_samples"] = len(q) * jnp.exp(-kl)
    if args.action_penalty:
        cost, dual = penalty(actions), duals.get("penalty_temperature")
        temperature = solve_temperature(cost, args.epsilon_penalty, dual, args)
        penalty_weights = e_step_weights(cost, temperature)
        weights += penalty_weights
        metrics["penalty_temperature"] = temperature
        metrics["kl_penalty_rel"] = kl_uniform(penalty_weights) / args.epsilon_penalty
    return weights, metrics


def log_prob(actions, mean, stddev):
    """Log density [N, B] of actions [N, B, A] under Gaussians [B, A]."""
    noise = (actions - mean[None]) / stddev[None]
    normaliser = (jnp.log(stddev) + jnp.log(2 * jnp.pi) / 2).sum(axis=-1)
    return -jnp.square(noise).sum(axis=-1) / 2 - normaliser[None]


def kl_normal(mean, stddev, new_mean, new_stddev):
    """KL of Gaussians to new ones, [B, A] as all arguments: in every dimension."""
    # The change of log stddev, whose square is the KL when small: exact to bound it by 1e-6.
    change = jnp.log1p((new_stddev - stddev) / stddev)
    move = (new_mean - mean) / new_stddev
    return change + jnp.expm1(-2 * change) / 2 + jnp.square(move) / 2


def actor_loss(actor: Params, state: State, obs, actions, weights, args: Args):
    """Weighted maximum likelihood near the target policy (M-step); besides, how far it went.

    Decoupled: the mean is fitted under the old deviation, the deviation about the old mean.
    """
    mean, stddev = policy(actor, obs, args)
    old_mean, old_stddev = policy(state.target_actor, obs, args)
    fit = log_prob(actions, mean, old_stddev) + log_prob(actions, old_mean, stddev)
    kl_mean = kl_normal(old_mean, old_stddev, mean, old_stddev).mean(axis=0)
    kl_stddev = kl_normal(old_mean, old_stddev, old_mean, stddev).mean(axis=0)
    if not args.per_dim_constraining:
        kl_mean, kl_stddev = kl_mean.sum(keepdims=True), kl_stddev.sum(keepdims=True)
    loss = -(weights * fit).sum(axis=0).mean()
    loss += (multiplier(state.duals.params["alpha_mean"]) * kl_mean).sum()
    loss += (multiplier(state.duals.params["alpha_stddev"]) * kl_stddev).sum()
    return loss, ((kl_mean, kl_stddev), {"actor_loss": loss, "policy_stddev": stddev.mean()})


def dual_loss(duals: Params, actions, q, kls, args: Args):
    """Moves each multiplier up while its KL is above the bound, and down while it is below."""
    kl_mean, kl_stddev = kls
    alpha_mean, alpha_stddev = multiplier(duals["alpha_mean"]), multiplier(duals["alpha_stddev"])
    loss = (alpha_mean * (args.epsilon_mean - kl_mean)).sum()
    loss += (alpha_stddev * (args.epsilon_stddev - kl_stddev)).sum()
    if "temperature" in duals:
        loss += temperature_loss(multiplier(duals["temperature"]), q, args.epsilon)
        temperature, cost = multiplier(duals["penalty_temperature"]), penalty(actions)
        loss += temperature_loss(temperature, cost, args.epsilon_penalty)
    return loss, {
        "dual_loss": loss,
        "alpha_mean": alpha_mean.mean(),
        "alpha_stddev": alpha_stddev.mean(),
        "kl_mean_rel": kl_mean.mean() / args.epsilon_mean,
        "kl_mean_rel_max": kl_mean.max() / args.epsilon_mean,
        "kl_stddev_rel": kl_stddev.mean() / args.epsilon_stddev,
        "kl_stddev_rel_max": kl_stddev.max() / args.epsilon_stddev,
    }


def gradient_step(train_state: TrainState, loss, *inputs):
    """One step of the optimiser on `loss(params, *inputs) -> (scalar, metrics)`."""
    grads, metrics = jax.grad(loss, has_aux=True)(train_state.params, *inputs)
    return train_state.apply_gradients(grads=grads), metrics


def update(state: State, batch: Batch, key, args: Args) -> tuple[State, dict]:
    """Policy evaluation, E-step and M-step."""
    # Sampled once, where the critics' target needs them; the E-step takes place there, too.
    actions = sample_actions(state.target_actor, batch.next_obs, key, args)
    next_q = sampled_values(state.target_critic, batch.next_obs, actions, args)
    target = td_target(batch, next_q, args)
    critic, critic_metrics = gradient_step(state.critic, critic_loss, batch, target, args)
    q = next_q.mean(axis=0)
    weights, weights_metrics = e_step(actions, q, state.duals.params, args)
    inputs = state, batch.next_obs, actions, weights, args
    actor, (kls, actor_metrics) = gradient_step(state.actor, actor_loss, *inputs)
    duals, dual_metrics = gradient_step(state.duals, dual_loss, actions, q, kls, args)
    # From further below, where multipliers are 0 in effect, they could not come back.
    duals = duals.replace(params=jax.tree.map(lambda x: jnp.maximum(x, -18), duals.params))
    target_actor, target_critic = optax.periodic_update(
        new_tensors=(actor.params, critic.params),
        old_tensors=(state.target_actor, state.target_critic),
        steps=critic.step,
        update_period=args.target_network_frequency,
    )
    state = State(actor, critic, target_actor, target_critic, duals)
    return state, critic_metrics | weights_metrics | actor_metrics | dual_metrics


@partial(jax.jit, static_argnames="args")
def learn(state: State, buffer: Buffer, key, args: Args) -> tuple[State, dict]:
    """`updates_per_step` updates, each on its own minibatch; `key` is the run's."""
    warn("Compiling the update.")  # Python runs while JAX traces, and never again

    def learn_once(state, _):
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, state.critic.step))
        return update(state, sample(buffer, sample_key, args), update_key, args)

    state, metrics = jax.lax.scan(learn_once, state, length=args.updates_per_step)
    return state, jax.tree.map(partial(jnp.nanmean, axis=0), metrics)


# --- running --------------------------------------------------------------------------------------


def parse_args() -> Args:
    """The flags; where --run-dir holds a run, its own are the defaults."""
    os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"
    args = tyro.cli(Args)
    if args.run_dir and (path := Path(args.run_dir, "config.json")).exists():
        saved = json.loads(path.read_text())["args"]
        if saved.keys() != Args.model_fields.keys():
            fail(f"--run-dir {args.run_dir} holds a run of another script.")
        args = tyro.cli(Args, default=Args(**saved))
        for name in ("env_id", "seed", "action_repeat", "buffer_size"):
            if getattr(args, name) != saved[name]:
                fail(f"--{name.replace('_', '-')} in --run-dir {args.run_dir} stays {saved[name]}.")
    return args


def begin_log(run_dir: Path, step: int, args: Args) -> SummaryWriter:
    """Writes config.json: the flags, and those of every step at which the run began or went on."""
    path, new = run_dir / "config.json", {"id": os.urandom(8).hex(), "history": {}}
    config = json.loads(path.read_text()) if path.exists() else new
    config["args"] = config["history"][str(step)] = flags = args.model_dump()
    path.with_suffix(".part").write_text(json.dumps(config, indent=2))
    path.with_suffix(".part").replace(path)
    if args.track:
        options = dict(sync_tensorboard=True, monitor_gym=True, save_code=True, resume="allow")
        options |= dict(project=args.wandb_project_name, entity=args.wandb_entity)
        options |= dict(id=config["id"], name=run_dir.name, config=flags)
        importlib.import_module("wandb").init(**options)
    writer = SummaryWriter(str(run_dir), purge_step=step + 1, max_queue=0)
    writer.add_text("flags", json.dumps(flags, indent=2), step)
    return writer


def log_losses(writer: SummaryWriter, step: int, recent: list[dict]):
    """Logs the mean of each metric over recent updates, without those that skipped it (nan)."""
    for name in recent[-1]:
        writer.add_scalar(f"losses/{name}", np.nanmean([x[name] for x in recent]), step)
    if np.isnan(recent[-1]["qf_loss"]):
        fail(f"NaN at step {step}: go on with --run-dir {writer.logdir} and smaller step sizes.", 1)


def save(run_dir: Path, env: Interface, args: Args, buffer: Buffer, state: State, results):
    """Writes a checkpoint and policy.npz, whole or not at all, and keeps the checkpoint before."""
    part, step = run_dir / "part.npz", int(buffer.count) * args.action_repeat
    stored = jax.tree.map(lambda x: np.asarray(x)[: int(buffer.count)], buffer.data)
    try:
        np.savez(part, *jax.tree.leaves((buffer._replace(data=stored), state, results)))
        part.replace(run_dir / f"checkpoint/{step:012}.npz")
        np.savez(part, **export(state, buffer, env, args))
        part.replace(run_dir / "policy.npz")
    except OSError as error:
        warn(f"Step {step} is not saved: {error}")
    for old in sorted((run_dir / "checkpoint").glob("*.npz"))[:-2]:
        old.unlink()


def load(run_dir: Path, *run):
    """The buffer, state and results of the newest whole checkpoint; without one what is given."""
    like, tree = jax.tree.flatten(run)
    for path in sorted((run_dir / "checkpoint").glob("*.npz"), reverse=True):
        try:
            leaves = [*np.load(path).values()]  # no pickles; the format holds checksums
        except Exception as error:  # a damaged file can fail in any way
            warn(f"{path} is damaged and passed over: {error}")
            path.rename(path.with_suffix(".damaged"))
            continue
        n = len(Batch._fields)  # arrays of which only the rows filled so far are saved
        leaves[:n] = [np.resize(x, y.shape) for x, y in zip(leaves[:n], like)]
        if [x.shape for x in leaves[:-1]] != [x.shape for x in like[:-1]]:
            fail(f"{path} holds networks of other sizes than the flags make.")
        return jax.tree.unflatten(tree, [*map(jnp.asarray, leaves[:-1]), leaves[-1]])
    return run


def resume(env: Interface, buffer: Buffer, args: Args) -> tuple[np.ndarray, Buffer]:
    """Obs [O] after the actions of the episode under way are repeated.

    If that leads elsewhere, or they are no longer in the buffer, a new episode begins.
    """
    obs = env.reset(args.seed, 0, int(buffer.episode))
    index = np.arange(buffer.began, buffer.count)[-args.buffer_size :] % args.buffer_size
    for action in np.asarray(buffer.data.action)[index]:
        obs, *_ = env.step(action)
    if len(index) == 0 or np.array_equal(obs, buffer.data.next_obs[index[-1]]):
        return obs, buffer
    warn(f"{args.env_id} does not repeat its episode; a new one begins.")
    return resume(env, next_episode(buffer), args)


def evaluate(run_dir: Path, step: int, policy: dict, results: np.ndarray, args: Args) -> np.ndarray:
    """Adds to the rows of eval.csv [n, 5] those of episodes that begin the same way each time."""
    env = Interface(args, run_dir / f"videos/{step}" if args.capture_video else None)
    for k in range(args.eval_episodes):
        obs, info = env.reset(args.seed, 1, k), {}
        while "episode" not in info:
            obs, *_, info = env.step(greedy_action(policy, obs))
        row = step, args.seed, k, info["episode"]["r"], info["episode"]["l"]
        results = np.vstack([results, row])
    env.close()
    columns, formats = "global_step,seed,episode,return,length", "%d,%d,%d,%.9g,%d"
    np.savetxt(run_dir / "eval.csv", results, formats, header=columns, comments="")
    return results


def due(step: int, frequency: int, args: Args) -> bool:
    """Whether what happens every so many environment steps, 0 for never, happens at this one."""
    return frequency > 0 and step % frequency < args.action_repeat


def main(args: Args):
    """MPO; `step` counts environment steps."""
    stop = []  # signals received; the second one ends at once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda n, _: stop.append(n) or signal.signal(n, signal.SIG_DFL))
    if args.temperature_solver == "slsqp":  # a host callback must not wait for its own thread
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    env, name = Interface(args), f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or f"runs/{name.replace('/', '_').replace(':', '_')}")
    while run_dir.exists() and not args.run_dir:
        run_dir = run_dir.with_name(run_dir.name + "_")
    (run_dir / "checkpoint").mkdir(parents=True, exist_ok=True)
    key, explore_key, learn_key = jax.random.split(jax.random.key(args.seed), 3)
    dims = env.obs_dim, env.low.size, args
    buffer, state, results = load(run_dir, make_buffer(*dims), init(key, *dims), np.zeros((0, 5)))
    step, recent = int(buffer.count) * args.action_repeat, []
    writer = begin_log(run_dir, step, args)
    go_on = f"Go on with: python {shlex.join([sys.argv[0], '--run-dir', str(run_dir)])}"
    console = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(total=args.total_timesteps, initial=step, desc=str(run_dir), **console)
    try:
        obs, buffer = resume(env, buffer, args)
        while step < args.total_timesteps and not stop:
            step, learned = step + args.action_repeat, state
            action = explore(state.actor.params, buffer, obs, explore_key, np.int32(step), args)
            if step > args.learning_starts:
                learned, metrics = learn(state, buffer, learn_key, args)  # while the env steps
                recent = [*recent[-99:], metrics]
            action = np.asarray(action)
            next_obs, reward, terminated, truncated, info = env.step(action)
            new = Batch(obs, action, np.float32(reward), np.float32(not terminated), next_obs)
            buffer, state, obs = insert(buffer, new, args), learned, next_obs
            if terminated or truncated:
                writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
                writer.add_scalar("charts/episodic_length", info["episode"]["l"], step)
                buffer = next_episode(buffer)
                obs = env.reset(args.seed, 0, int(buffer.episode))
            bar.update(args.action_repeat)
            if due(step, args.log_frequency, args) and recent:
                log_losses(writer, step, jax.device_get(recent))
                seconds = bar.format_dict["elapsed"]
                writer.add_scalar("charts/SPS", (bar.n - bar.initial) / seconds, step)
            if due(step, args.eval_frequency, args):
                results = evaluate(run_dir, step, export(state, buffer, env, args), results, args)
                mean = results[-args.eval_episodes :, 3].mean()
                writer.add_scalar("eval/episodic_return", mean, step)
                bar.set_postfix_str(f"return {mean:.1f}")
            if due(step, args.checkpoint_frequency, args):
                writer.flush()
                save(run_dir, env, args, buffer, state, results)
        save(run_dir, env, args, buffer, state, results)
    except (gym.error.Error, OSError) as error:
        save(run_dir, env, args, next_episode(buffer), state, results)
        fail(f"{str(error).rstrip('.')}. {go_on}", code=1)
    finally:
        bar.close()
    if stop:
        fail(f"Stopped at step {step}. {go_on}", code=128 + stop[0])


if __name__ == "__main__":
    try:
        main(parse_args())
    except (gym.error.Error, OSError, ImportError) as error:  # --env-id, --run-dir or --track
        fail(str(error))
