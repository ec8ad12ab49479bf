# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#   "jax>=0.6", "jaxlib>=0.6", "flax>=0.10.6", "optax>=0.2.4", "numpy>=2.2", "scipy>=1.14",
#   "dm_control>=1.0.30", "mujoco>=3.3.2,<4", "gymnasium>=1.3", "tyro>=0.9.20",
#   "tensorboardX>=2.6.2", "tqdm>=4.66", "moviepy>=2.1",
# ]
# ///
"""Soft Actor-Critic on the DeepMind Control Suite, in one file.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905v2.

    python sac_dmc.py --env-id cartpole-swingup --total-timesteps 250000

Departs: targets sum 3 rewards, without the entropy of the steps between, before they bootstrap
(--n-step 1), observations normalised by running moments (--no-normalize-obs), target entropy -A/2
instead of -A (--target-entropy-scale 1), alpha starts at 0.1 instead of the authors' 1 (--alpha 1).
LayerNorm in the critics is a flag (--layer-norm).
"""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from tqdm import tqdm

Params = Any  # a tree of Flax parameters


def whole_number(strings: list[str]) -> int:
    """`["1e6"]` -> 1000000; tyro reports the ValueError of a fraction together with its flag."""
    if not float(strings[0]).is_integer():
        raise ValueError(f"{strings[0]} is not a whole number")
    return int(float(strings[0]))


Int = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        1, "INT", whole_number, lambda value: isinstance(value, int), lambda value: [str(value)]
    ),
]


@dataclasses.dataclass(frozen=True)
class Args:
    """Soft Actor-Critic on the DeepMind Control Suite."""

    exp_name: str = "sac_dmc"  # name of the experiment, part of the run directory's name
    seed: Int = 0  # first seed; seed k of a group is this plus k
    num_seeds: Int = 1  # independent seeds trained side by side in this process
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "jax-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # film one episode of every evaluation into RUN_DIR/videos
    run_dir: str | None = None  # a new directory; default runs/{env_id}__{exp_name}__{seed}__{time}
    resume: str | None = None  # directory of a run to continue, with its flags
    evaluate: str | None = None  # directory of a run to evaluate, with its flags and no training

    env_id: str = "cartpole-swingup"  # task of the suite, domain-task
    total_timesteps: Int = 1_000_000  # environment steps of each seed
    action_repeat: Int = 1  # environment steps for which an action is held
    eval_frequency: Int = 5_000  # environment steps between evaluations, 0 for none
    eval_episodes: Int = 10  # episodes of the greedy policy in an evaluation
    eval_max_steps: Int = 10_000  # ends evaluation episodes of tasks that have no time limit
    log_frequency: Int = 1_000  # environment steps between logged losses
    checkpoint_frequency: Int = 25_000  # environment steps between checkpoints, 0 for none

    buffer_size: Int = 1_000_000  # transitions kept for replay
    learning_starts: Int = 5_000  # environment steps of uniformly random actions before learning
    updates_per_step: Int = 1  # gradient updates for each action
    batch_size: Int = 256  # transitions in the minibatch of an update
    gamma: float = 0.99  # discount factor
    n_step: Int = 3  # rewards in a target before it bootstraps
    tau: float = 0.005  # share of the online critics in a step of the target critics
    target_network_frequency: Int = 1  # updates between steps of the target critics
    policy_frequency: Int = 1  # updates between steps of the actor and of alpha
    hidden_width: Int = 256  # units of a hidden layer
    hidden_layers: Int = 2  # hidden layers of the actor and of each critic
    layer_norm: bool = False  # LayerNorm before each activation of the critics
    clipped_double_q: bool = True  # the smaller value of the two critics counts, not their mean
    bfloat16: bool = False  # round the factors of products between hidden layers to bfloat16
    normalize_obs: bool = True  # normalise observations by their running mean and variance

    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics
    alpha_lr: float = 3e-4  # Adam's step size for alpha
    alpha: float = 0.1  # entropy coefficient: its start, or with --no-autotune its value
    autotune: bool = True  # adapt alpha so that the policy keeps the target entropy
    target_entropy_scale: float = 0.5  # the target entropy is minus this times action dimensions
    log_std_min: float = -5.0  # lower bound of the policy's log standard deviation
    log_std_max: float = 2.0  # upper bound of the policy's log standard deviation


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    print(message, file=sys.stderr)
    sys.exit(code)


# --- environments ---------------------------------------------------------------------------------


def wrappers(flag: str):
    """The module common/dmc_wrappers.py, found beside this file or in the folder above."""
    for folder in Path(__file__).resolve().parents[:2]:
        if (path := folder / "common" / "dmc_wrappers.py").exists():
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    fail(f"{flag} needs the file common/dmc_wrappers.py of jax-rl beside this script; copy it too.")


def make_env(args: Args, seed: int, video_dir: Path | None):
    """One task of the suite as a `dm_env.Environment`, in the wrappers that the flags ask for."""
    os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
    logging.getLogger("absl").setLevel(logging.ERROR)  # MuJoCo's remarks on the suite's models
    try:
        from dm_control import suite
    except (ImportError, AttributeError):  # the renderer named by MUJOCO_GL does not work here
        os.environ["MUJOCO_GL"] = "disable"
        from dm_control import suite

    tasks = {f"{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    name = args.env_id.removeprefix("dm_control/").removesuffix("-v0")
    if name not in tasks:
        near = ", ".join(difflib.get_close_matches(name, tasks, n=3, cutoff=0.0))
        fail(f"--env-id {args.env_id} is not a task of the suite; the nearest are {near}.")
    env = suite.load(*tasks[name], task_kwargs={"random": seed})
    if os.environ["MUJOCO_GL"] == "disable":
        type(env.physics).contexts = None  # quadruped-escape would draw its terrain at each reset
    if args.action_repeat > 1:
        env = wrappers("--action-repeat").ActionRepeat(env, args.action_repeat)
    if video_dir:
        module = wrappers("--capture-video")
        try:
            env = module.RecordVideo(env, video_dir)
        except module.RenderingError as error:
            print(f"--capture-video is off: {error}", file=sys.stderr)
    return env


class Environments:
    """N independent environments, stepped in lockstep and reset by hand.

    Observations are float32 [N, O], the ravelled entries of each task's observation. Actions are in
    [-1, 1] and mapped to the bounds of each dimension here, nowhere else. With `video_dir` the
    episodes of the first environment are filmed. An episode is a function of its seed and its
    actions: repeating them brings an environment to where it was.
    """

    def __init__(self, args: Args, seeds, video_dir: Path | None = None):
        self.seeds = [int(seed) for seed in seeds]
        self.episodes = np.zeros(len(self.seeds), int)  # begun so far
        self.actions = [[] for _ in self.seeds]  # since the episode began, of [A] each
        self.envs = [make_env(args, s, None if i else video_dir) for i, s in enumerate(self.seeds)]
        spec = self.envs[0].action_spec()
        self.low, self.high = (np.broadcast_to(x, spec.shape) for x in (spec.minimum, spec.maximum))
        # Actuators without a limit (lqr says 1e10) are driven in [-1, 1].
        self.low, self.high = (np.where(abs(x) < 1e6, x, np.sign(x)) for x in (self.low, self.high))
        spec = self.envs[0].observation_spec().values()
        self.obs_dim, self.action_dim = sum(int(np.prod(x.shape)) for x in spec), self.low.size

    def reset(self, i: int) -> np.ndarray:
        """Begins the next episode of environment i; returns obs [O]."""
        seed, self.actions[i] = int(self.seeds[i] + self.episodes[i]) % 2**32, []
        self.episodes[i] += 1
        self.envs[i].task.random.seed(seed)
        return self.finite(self.ravel(self.envs[i].reset()))

    def reset_all(self) -> np.ndarray:
        """Begins the same first episodes as every time; returns obs [N, O]."""
        self.episodes[:] = 0
        return np.stack([self.reset(i) for i in range(len(self.envs))])

    def replay(self, episodes: np.ndarray, actions: list[np.ndarray]) -> np.ndarray:
        """Repeats the actions [T, A] of the last episode of every environment; returns [N, O]."""
        self.episodes, obs = episodes - 1, np.zeros((len(self.envs), self.obs_dim), np.float32)
        for i, performed in enumerate(actions):
            obs[i] = self.reset(i)
            for action in performed:
                everywhere = np.broadcast_to(action, (len(self.envs), self.action_dim))
                obs[i] = self.step(everywhere, np.arange(len(self.envs)) == i)[0][i]
        return obs

    def step(self, action: np.ndarray, active: np.ndarray | None = None):
        """Steps the active environments, by default all, with action [N, A].

        Returns next_obs [N, O], reward, terminated and truncated [N]; zeros where not active.
        A time limit has discount 1 and truncates; only a last step with discount 0 terminates.
        """
        n = len(self.envs)
        next_obs, reward = np.zeros((n, self.obs_dim), np.float32), np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        native = self.low + (action.astype(np.float64) + 1) * (self.high - self.low) / 2
        for i in range(n) if active is None else np.flatnonzero(active):
            self.actions[i].append(action[i])
            try:
                timestep = self.envs[i].step(native[i])
            except RuntimeError as error:  # dm_control's PhysicsError
                raise FloatingPointError(error) from None
            next_obs[i], reward[i] = self.ravel(timestep), timestep.reward
            terminated[i] = timestep.last() and timestep.discount == 0
            truncated[i] = timestep.last() and timestep.discount != 0
        return self.finite(next_obs), self.finite(reward), terminated, truncated

    def finite(self, values: np.ndarray) -> np.ndarray:
        """The values, if learning can go on with them."""
        if not np.isfinite(values).all():
            raise FloatingPointError("an observation or a reward is not finite")
        return values

    def close(self):
        """Finishes the film of an episode that was cut short."""
        for env in self.envs:
            env.close()

    def ravel(self, timestep) -> np.ndarray:
        """The entries of an observation, some of them 0-d, as one float32 [O]."""
        entries = [np.ravel(x) for x in timestep.observation.values()]
        return np.concatenate(entries, dtype=np.float32)


# --- networks -------------------------------------------------------------------------------------


def bfloat16_product(x, kernel, dims, **_):
    """jax.lax.dot_general of factors rounded to bfloat16, summed in float32."""
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)


class MLP(nn.Module):
    """Hidden layers with ReLU, then a linear head; LayerNorm, if asked for, before each ReLU."""

    args: Args
    out: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(self.args.hidden_layers):
            product = bfloat16_product if self.args.bfloat16 and i > 0 else jax.lax.dot_general
            x = nn.Dense(self.args.hidden_width, dot_general=product)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.out, name="head")(x)


def q_values(critic: Params, obs, action, args: Args):
    """Both critics, [2, B]."""
    net = MLP(args, 1, args.layer_norm)
    x = jnp.concatenate([obs, action], axis=-1)
    return jax.vmap(net.apply, in_axes=(0, None))(critic, x).squeeze(-1)


def reduced(q, args: Args):
    """The value [...] that counts of those of both critics [2, ...]."""
    return q.min(axis=0) if args.clipped_double_q else q.mean(axis=0)


def policy(actor: Params, obs, args: Args):
    """Mean and log standard deviation, [..., A] each, of the Gaussian that tanh squashes."""
    net = MLP(args, actor["params"]["head"]["bias"].shape[-1])
    mean, spread = jnp.split(net.apply(actor, obs), 2, axis=-1)
    width = args.log_std_max - args.log_std_min
    return mean, args.log_std_min + width * (1 + jnp.tanh(spread)) / 2


def sample_action(actor: Params, obs, key, args: Args):
    """A reparameterised action [..., A] and its log-probability [...] (app. C).

    The noise itself enters the density, and log(1 - tanh(u)^2) is 2 (log 2 - u - softplus(-2u)),
    which is exact where the squashed action rounds to 1.
    """
    mean, log_std = policy(actor, obs, args)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -jnp.square(noise) / 2 - log_std - jnp.log(2 * jnp.pi) / 2
    log_slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (log_normal - log_slope).sum(axis=-1)


# --- state ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A minibatch of one seed, with normalised observations."""

    obs: jax.Array  # [B, O]
    action: jax.Array  # [B, A] in [-1, 1]
    reward: jax.Array  # [B] discounted sum over k <= n_step steps
    discount: jax.Array  # [B] 0 where the episode terminated, else gamma^(k - 1) after k steps
    next_obs: jax.Array  # [B, O] what the steps led to, never the observation after a reset


class Moments(NamedTuple):
    """Running mean and variance of every observation collected."""

    mean: jax.Array  # [O]
    var: jax.Array  # [O]


class State(NamedTuple):
    """All that learning changes; with several seeds every leaf has a leading axis [S]."""

    actor: Params  # phi
    critic: Params  # theta_1 and theta_2, on a leading axis of 2
    target_critic: Params
    log_alpha: jax.Array  # []
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    moments: Moments  # of the observations
    key: jax.Array
    step: jax.Array  # [] updates so far


@partial(jax.jit, static_argnames=("obs_dim", "action_dim", "args"))
def init(seeds, obs_dim: int, action_dim: int, args: Args) -> State:
    """The state before the first update, for seeds [S]."""

    def init_seed(seed):
        key, actor_key, critic_key = jax.random.split(jax.random.key(seed), 3)
        actor = MLP(args, 2 * action_dim).init(actor_key, jnp.zeros(obs_dim))
        critic = jax.vmap(MLP(args, 1, args.layer_norm).init, in_axes=(0, None))(
            jax.random.split(critic_key), jnp.zeros(obs_dim + action_dim)
        )
        log_alpha = jnp.log(jnp.float32(args.alpha))
        return State(
            actor=actor,
            critic=critic,
            target_critic=critic,
            log_alpha=log_alpha,
            actor_opt=optax.adam(args.policy_lr).init(actor),
            critic_opt=optax.adam(args.q_lr).init(critic),
            alpha_opt=optax.adam(args.alpha_lr).init(log_alpha),
            moments=Moments(mean=jnp.zeros(obs_dim), var=jnp.ones(obs_dim)),
            key=key,
            step=jnp.zeros((), jnp.int32),
        )

    return jax.vmap(init_seed)(seeds)


# --- acting ---------------------------------------------------------------------------------------


def normalize(obs, moments: Moments, args: Args):
    """Observations [..., O] with mean 0 and variance 1, clipped to [-10, 10]."""
    mean, std = (jnp.broadcast_to(x, obs.shape) for x in (moments.mean, jnp.sqrt(moments.var)))
    return jnp.clip((obs - mean) / (std + 1e-6), -10, 10) if args.normalize_obs else obs


SQUASH = "tanh"  # what brings the mean of the policy to [-1, 1], for readers of policy.npz


@partial(jax.jit, static_argnames="args")
def act(state: State, obs, args: Args):
    """Greedy actions [S, E, A] for obs [S, E, O]: the squashed mean."""

    def act_seed(state, obs):
        return jnp.tanh(policy(state.actor, normalize(obs, state.moments, args), args)[0])

    return jax.vmap(act_seed)(state, obs)


@partial(jax.jit, static_argnames="args")
def explore(state: State, obs, args: Args):
    """Actions [S, A] drawn from the policy for obs [S, O], and fresh keys [S]."""

    def explore_seed(state, obs):
        key, action_key = jax.random.split(state.key)
        obs = normalize(obs, state.moments, args)
        return sample_action(state.actor, obs, action_key, args)[0], key

    return jax.vmap(explore_seed)(state, obs)


# --- learning -------------------------------------------------------------------------------------


def td_target(state: State, batch: Batch, key, args: Args):
    """Soft Bellman target, [B] (J_Q of Alg. 1)."""
    next_action, log_prob = sample_action(state.actor, batch.next_obs, key, args)
    next_q = reduced(q_values(state.target_critic, batch.next_obs, next_action, args), args)
    next_v = next_q - jnp.exp(state.log_alpha) * log_prob
    return batch.reward + args.gamma * batch.discount * next_v


def critic_loss(critic: Params, batch: Batch, target, args: Args):
    """Mean squared Bellman error, summed over the two critics."""
    q = q_values(critic, batch.obs, batch.action, args)
    loss = jnp.square(q - target[None]).mean(axis=1)
    return loss.sum(), {
        "qf_loss": loss.sum(),
        "qf1_loss": loss[0],
        "qf2_loss": loss[1],
        "qf1_values": q[0].mean(),
        "qf2_values": q[1].mean(),
    }


def actor_loss(actor: Params, state: State, batch: Batch, key, args: Args):
    """Expected alpha log pi - Q under reparameterised actions (J_pi of Alg. 1)."""
    action, log_prob = sample_action(actor, batch.obs, key, args)
    q = reduced(q_values(state.critic, batch.obs, action, args), args)
    loss = (jnp.exp(state.log_alpha) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def alpha_loss(log_alpha, entropy, target_entropy):
    """Moves alpha up while the entropy is below its target (J(alpha) of Alg. 1, in log alpha)."""
    loss = log_alpha * (entropy - target_entropy)
    return loss, {"alpha_loss": loss, "alpha": jnp.exp(log_alpha)}


def gradient_step(loss, params, opt_state, learning_rate: float):
    """One step of Adam on `loss(params) -> (scalar, metrics)`."""
    grads, metrics = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optax.adam(learning_rate).update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


def every(period: int, change, state: State):
    """`change(state) -> (state, metrics)` at every period-th update; else its metrics are nan."""
    if period == 1:
        return change(state)
    skipped = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), jax.eval_shape(change, state)[1])
    return jax.lax.cond(state.step % period == 0, change, lambda state: (state, skipped), state)


def update(state: State, batch: Batch, args: Args) -> tuple[State, dict]:
    """One update of one seed (the gradient steps of Alg. 1)."""
    key, target_key, actor_key = jax.random.split(state.key, 3)
    target = td_target(state, batch, target_key, args)
    critic, critic_opt, critic_metrics = gradient_step(
        lambda p: critic_loss(p, batch, target, args), state.critic, state.critic_opt, args.q_lr
    )
    state = state._replace(critic=critic, critic_opt=critic_opt, key=key, step=state.step + 1)

    def improve_policy(state: State):
        actor, actor_opt, metrics = gradient_step(
            lambda p: actor_loss(p, state, batch, actor_key, args),
            state.actor, state.actor_opt, args.policy_lr,
        )  # fmt: skip
        state = state._replace(actor=actor, actor_opt=actor_opt)
        if args.autotune:
            target_entropy = -args.target_entropy_scale * batch.action.shape[-1]
            log_alpha, alpha_opt, alpha_metrics = gradient_step(
                lambda p: alpha_loss(p, metrics["entropy"], target_entropy),
                state.log_alpha, state.alpha_opt, args.alpha_lr,
            )  # fmt: skip
            state = state._replace(log_alpha=log_alpha, alpha_opt=alpha_opt)
            metrics = metrics | alpha_metrics
        return state, metrics

    def move_target(state: State):
        target_critic = optax.incremental_update(
            new_tensors=state.critic, old_tensors=state.target_critic, step_size=args.tau
        )
        return state._replace(target_critic=target_critic), {}

    state, actor_metrics = every(args.policy_frequency, improve_policy, state)
    state, _ = every(args.target_network_frequency, move_target, state)
    return state, critic_metrics | actor_metrics


# --- replay buffer --------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A ring of transitions on the device for each seed; all seeds are at the same place."""

    rows: jax.Array  # [S, capacity, O + A + 3 + O] obs, action, reward, discount, ended, next_obs
    count: jax.Array  # [] transitions inserted so far


def make_buffer(obs_dim: int, action_dim: int, args: Args) -> Buffer:
    """An empty buffer, no larger than the run needs."""
    capacity = min(args.buffer_size, args.total_timesteps // args.action_repeat)
    rows = jnp.zeros((args.num_seeds, capacity, 2 * obs_dim + action_dim + 3))
    return Buffer(rows, count=jnp.zeros((), jnp.int32))


@partial(jax.jit, donate_argnames="buffer")
def insert(buffer: Buffer, moments: Moments, row):
    """Adds a transition [S, 2 O + A + 3] of each seed, and its observation to the moments."""
    index, count = buffer.count % buffer.rows.shape[1], buffer.count + 1
    # A call of its own with the buffer donated: sampling in the same call would copy all of it.
    rows = jax.lax.dynamic_update_slice_in_dim(buffer.rows, row[:, None], index, axis=1)
    delta = row[:, : moments.mean.shape[-1]] - moments.mean
    mean = moments.mean + delta / count
    # Welford's update, as a running mean; it forgets the initial variance at the first row.
    var = moments.var + (jnp.square(delta) * (1 - 1 / count) - moments.var) / count
    return Buffer(rows, count), Moments(mean, var)


def sample(rows, count, moments: Moments, key, args: Args) -> Batch:
    """A minibatch drawn uniformly, with replacement, from the rows of one seed.

    Each sample is a window of `n_step` transitions, cut short at the end of the episode and at the
    newest transition.
    """
    capacity, obs_dim = len(rows), len(moments.mean)
    start = jax.random.randint(key, (args.batch_size, 1), 0, jnp.minimum(count, capacity))
    offset = jnp.arange(args.n_step)[None]  # [1, n]
    window = rows[(start + offset) % capacity]  # [B, n, row]
    reward, _, ended = jnp.moveaxis(window[..., -obs_dim - 3 : -obs_dim], -1, 0)  # [B, n]
    # Counted from the oldest transition; past the newest one the ring begins again.
    stored = (start - count) % capacity + offset < capacity
    goes_on = jnp.cumprod(1 - ended[:, :-1], axis=1)
    valid = stored * jnp.concatenate([jnp.ones_like(reward[:, :1]), goes_on], axis=1)
    length = valid.sum(axis=1)
    last = window[jnp.arange(args.batch_size), length.astype(int) - 1]  # [B, row]
    first, powers = window[:, 0], args.gamma ** jnp.arange(args.n_step)[None]
    return Batch(
        obs=normalize(first[:, :obs_dim], moments, args),
        action=first[:, obs_dim : -obs_dim - 3],
        reward=(valid * powers * reward).sum(axis=1),
        discount=args.gamma ** (length - 1) * last[:, -obs_dim - 2],
        next_obs=normalize(last[:, -obs_dim:], moments, args),
    )


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def learn(state: State, buffer: Buffer, args: Args) -> tuple[State, dict]:
    """`updates_per_step` updates of every seed, each on a minibatch of its own; metrics [S]."""

    def learn_once(state, _):
        key, sample_key = jax.vmap(lambda key: tuple(jax.random.split(key)))(state.key)
        batch = jax.vmap(partial(sample, args=args), in_axes=(0, None, 0, 0))(
            buffer.rows, buffer.count, state.moments, sample_key
        )
        inputs = (state._replace(key=key), batch)
        # One seed after the other is faster on CPUs: they gain nothing from batched products.
        if len(key) == 1 or jax.default_backend() == "cpu":
            return jax.lax.map(lambda x: update(*x, args), inputs)
        return jax.vmap(partial(update, args=args))(*inputs)

    state, metrics = jax.lax.scan(learn_once, state, length=args.updates_per_step)
    return state, jax.tree.map(lambda x: jnp.nanmean(x, axis=0), metrics)


# --- running --------------------------------------------------------------------------------------


def check(args: Args):
    """Refuses values and combinations that cannot work, before anything compiles."""
    may_be_zero = ("seed", "eval_frequency", "checkpoint_frequency", "target_entropy_scale")
    may_be_zero += ("exploration_noise", "policy_noise", "noise_clip")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if type(value) in (int, float) and "log_std" not in name:
            if not (0 < value < float("inf") or value == 0 and name in may_be_zero):
                bound = "at least" if name in may_be_zero else "greater than"
                fail(f"{flag} is out of range: it must be {bound} 0.")
            if name in ("gamma", "tau") and value > 1:
                fail(f"{flag} is out of range: it must be at most 1.")
    if args.batch_size > args.buffer_size:
        fail(f"--batch-size {args.batch_size} must not exceed --buffer-size {args.buffer_size}.")
    last = args.total_timesteps // args.action_repeat * args.action_repeat
    if not args.action_repeat <= args.learning_starts < last:
        fail(
            f"--learning-starts {args.learning_starts} cannot work: it must be at least "
            f"--action-repeat {args.action_repeat} and below the last step {last}."
        )
    if "log_std_min" in vars(args) and args.log_std_min >= args.log_std_max:
        fail(f"--log-std-min {args.log_std_min} must be below --log-std-max {args.log_std_max}.")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases; install it with: pip install wandb")


def flags() -> Args:
    """The flags; with --resume or --evaluate those of the run, and the few that may differ."""
    for flag, value in zip(sys.argv, sys.argv[1:]):
        if value in ("True", "False"):
            fail(f"{flag} takes no value: write {flag}, or --no-{flag.removeprefix('--')}.")
    args = tyro.cli(Args)
    if args.resume and args.evaluate:
        fail("A run can only be given to one of --resume and --evaluate.")
    if not (run_dir := args.resume or args.evaluate):
        return args
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())["args"]
        saved = Args(**saved | {"resume": args.resume, "evaluate": args.evaluate})
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir} is not the directory of a run of {Path(__file__).name} ({error}).")
    args = tyro.cli(Args, default=saved)
    may_differ = ("eval_episodes", "capture_video") if args.evaluate else ("total_timesteps",)
    for name, value in vars(saved).items():
        if (new := getattr(args, name)) != value and name not in may_differ:
            fail(f"--{name.replace('_', '-')} {new} disagrees with the run, which has {value}.")
    if args.total_timesteps < saved.total_timesteps:
        fail(
            f"--total-timesteps {args.total_timesteps} is below the run's {saved.total_timesteps}."
        )
    return args


def commit() -> str:
    """The commit of this file's repository, with -dirty after changes; "" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    if not shutil.which("git"):
        return ""
    here = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()


def start_run(args: Args) -> Path:
    """Makes the run directory with config.json, what it takes to make the same run again.

    In a directory that is resumed, config.json remembers under what the run went on.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    name = name.replace("/", "_").replace(":", "_")
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    packages = "jax jaxlib flax optax numpy dm_control mujoco gymnasium".split()
    machine = {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.platform()}, {platform.processor()}, {os.cpu_count()} cores",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    config = {"args": vars(args) | {"resume": None}, **machine, "resumed": []}
    try:
        if args.resume:
            first = json.loads((run_dir / "config.json").read_text())
            config = first | {"args": config["args"], "resumed": [*first["resumed"], machine]}
            if other := [name for name in machine if machine[name] != first[name]]:
                print(f"Other {' and '.join(other)} than before: numbers may differ, too.")
        else:
            run_dir.mkdir(parents=True)
        (run_dir / "config.part").write_text(json.dumps(config, indent=2))
        (run_dir / "config.part").replace(run_dir / "config.json")
    except OSError as error:
        fail(f"--run-dir {run_dir} must be new and writable: {error.strerror}.")
    if args.track:
        importlib.import_module("wandb").init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args),
            id=run_dir.name, resume="allow", dir=run_dir,
        )  # fmt: skip
    return run_dir


def how_to_go_on(run_dir: Path) -> str:
    """The command that resumes the run, if it left a checkpoint."""
    if checkpoints(run_dir):
        return f"Continue with: python {sys.argv[0]} --resume {run_dir}"
    return f"The log is in {run_dir}."


def seeds(args: Args) -> range:
    """The seeds trained side by side."""
    return range(args.seed, args.seed + args.num_seeds)


def log_files(run_dir: Path) -> dict[str, Path]:
    """The files that only grow, by their names inside the run directory."""
    files = [*run_dir.glob("eval.csv"), *run_dir.rglob("events.out.tfevents.*")]
    return {str(path.relative_to(run_dir)): path for path in files}


class Log:
    """One run's eval.csv, its TensorBoard files and its progress on the console."""

    def __init__(self, args: Args, run_dir: Path, step: int):
        self.args, self.run_dir, self.start, self.first_step = args, run_dir, time.time(), step
        # TensorBoard shows a folder as a run: the run directory, or one for each of several seeds.
        folders = [run_dir / (f"seed_{x}" if args.num_seeds > 1 else "") for x in seeds(args)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        self.writers = [EventsWriter(str(folder / "events"), f".{step}") for folder in folders]
        self.csv = (run_dir / "eval.csv").open("a")
        if not self.csv.tell():
            self.csv.write("global_step,seed,episode,return,length\n")
        self.bar = tqdm(
            total=args.total_timesteps, initial=step, unit=" steps", dynamic_ncols=True,
            disable=None,
        )  # fmt: skip

    def rate(self, step: int) -> float:
        """Environment steps per second of each seed since the run was started or resumed."""
        return (step - self.first_step) / (time.time() - self.start)

    def scalars(self, step: int, i: int, values: dict):
        """Adds the value under each tag for the i-th seed."""
        for tag, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(tag, value))
            self.writers[i].write_event(event)
        if self.args.track:
            prefix = f"seed_{seeds(self.args)[i]}/" if self.args.num_seeds > 1 else ""
            tagged = {prefix + tag: value for tag, value in values.items()}
            importlib.import_module("wandb").log(tagged, step=step)

    def losses(self, step: int, recent: deque):
        """Adds the mean of each metric over recent updates, without those that skipped it (nan)."""
        recent, means = jax.device_get(list(recent)), {}
        for name in recent[0]:
            values = np.array([metrics[name] for metrics in recent])  # [updates, S]
            if len(values := values[~np.isnan(values).any(axis=1)]):
                means[f"losses/{name}"] = values.mean(axis=0)
        for i in range(self.args.num_seeds):
            self.scalars(step, i, {tag: mean[i] for tag, mean in means.items()})
        self.flush()

    def episode(self, step: int, i: int, episode_return: float, length: int):
        """Adds an episode of training of the i-th seed."""
        values = {"episodic_return": episode_return, "episodic_length": length}
        values["SPS"] = self.rate(step)
        self.scalars(step, i, {f"charts/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, returns: np.ndarray, lengths: np.ndarray):
        """Stores every evaluation episode, [S, E], and shows the mean return of each seed."""
        print(*csv_rows(step, self.args, returns, lengths), sep="\n", file=self.csv, flush=True)
        for i, mean in enumerate(returns.mean(axis=1)):
            self.scalars(step, i, {"eval/episodic_return": mean})
        text = "return " + " ".join(f"{x:.1f}" for x in returns.mean(axis=1))
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            seconds = (self.args.total_timesteps - step) / self.rate(step)
            left = datetime.timedelta(seconds=round(seconds))
            print(f"step {step}: {text}, {self.rate(step):.0f} steps/s, {left} left", flush=True)

    def flush(self):
        """Puts on the disk what was logged so far."""
        for file in (*self.writers, self.csv):
            file.flush()
        os.fsync(self.csv.fileno())

    def close(self):
        """Puts everything on disk, or what still fits there."""
        for file in (*self.writers, self.csv, self.bar):
            with contextlib.suppress(OSError):
                file.close()


def csv_rows(step: int, args: Args, returns: np.ndarray, lengths: np.ndarray) -> list[str]:
    """The rows of eval.csv for evaluation episodes [S, E]."""
    pairs = np.ndindex(returns.shape)
    return [f"{step},{args.seed + i},{k},{returns[i, k]},{lengths[i, k]}" for i, k in pairs]


def eval_environments(args: Args, run_dir: Path) -> Environments:
    """The environments of all evaluation episodes, seed after seed."""
    streams = [np.random.SeedSequence(seed).spawn(3)[2] for seed in seeds(args)]
    env_seeds = np.concatenate([stream.generate_state(args.eval_episodes) for stream in streams])
    return Environments(args, env_seeds, run_dir / "videos" if args.capture_video else None)


def evaluate(state: State, envs: Environments, args: Args):
    """Returns and lengths of fixed episodes under the greedy policy, [S, E] each."""
    obs = envs.reset_all()
    returns, lengths = np.zeros(len(obs)), np.zeros(len(obs), int)
    running, groups = np.ones(len(obs), bool), (args.num_seeds, args.eval_episodes)
    while running.any() and lengths.max() < args.eval_max_steps:
        action = np.asarray(act(state, obs.reshape(*groups, -1), args)).reshape(len(obs), -1)
        obs, reward, terminated, truncated = envs.step(action, running)
        returns += reward
        lengths += running * args.action_repeat
        running &= ~(terminated | truncated)
    return returns.reshape(groups), lengths.reshape(groups)


def write_npz(path: Path, arrays: dict):
    """Writes named arrays whole or not at all; the zip format holds a checksum of each."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def named(tree) -> dict:
    """The leaves of a tree by their names, such as state/log_alpha."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def readable(state: State) -> State:
    """The state with the data of its keys, which a file can hold."""
    return state._replace(key=jax.random.key_data(state.key))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    paths = (run_dir / "checkpoint").glob("[0-9]*.npz")
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def save(log, step: int, state: State, buffer: Buffer, envs: Environments, recent, **loop):
    """Writes policy.npz and checkpoint/{step}.npz, and removes all but the checkpoint before.

    `loop` is what else the loop carries along. Environments are saved as the actions to repeat, and
    of the log files their sizes.
    """
    log.flush()
    actions = [np.reshape(performed, (-1, envs.action_dim)) for performed in envs.actions]
    tree = {
        "state": readable(state),
        "buffer": buffer._replace(rows=np.asarray(buffer.rows)[:, : int(buffer.count)]),
        "loop": loop | {"episodes": envs.episodes},
        "recent": jax.tree.map(lambda *x: np.stack(x), *recent) if recent else {},
        "actions": dict(enumerate(actions)),
        "sizes": {name: path.stat().st_size for name, path in log_files(log.run_dir).items()},
    }
    try:
        save_policy(log.run_dir, state, envs, log.args)
        if log.args.checkpoint_frequency:
            (log.run_dir / "checkpoint").mkdir(exist_ok=True)
            write_npz(log.run_dir / "checkpoint" / f"{step}.npz", named(tree))
    except OSError as error:
        print(f"Nothing saved at step {step}: {error.strerror}.", file=sys.stderr)
    for old in checkpoints(log.run_dir)[2:]:
        old.unlink()


def load(run_dir: Path, state: State, **others) -> tuple[int, State, dict, dict]:
    """The newest checkpoint that is whole: its step, its state, the others, and what is left over.

    All that is asked for must have the names, shapes and types of what is given; only the buffer
    may have fewer rows.
    """
    template = {"state": readable(state)} | others
    for path in checkpoints(run_dir):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if "buffer" in others:
                spare = others["buffer"].rows.shape[1] - arrays["buffer/rows"].shape[1]
                arrays["buffer/rows"] = np.pad(arrays["buffer/rows"], ((0, 0), (0, spare), (0, 0)))
            for name, x in named(template).items():
                kind, wanted = (f"{y.dtype} {list(y.shape)}" for y in (arrays[name], x))
                if kind != wanted:
                    raise ValueError(f"{name} is {kind} instead of {wanted}")
            values = [arrays.pop(name) for name in named(template)]
        except Exception as error:  # a damaged file can fail in any way
            print(f"{path} is damaged and passed over: {error}", file=sys.stderr)
            continue
        tree = jax.tree.unflatten(jax.tree.structure(template), values)
        state = jax.tree.map(jnp.asarray, tree.pop("state"))
        state = state._replace(key=jax.random.wrap_key_data(state.key))
        return int(path.stem), state, tree, arrays
    fail(f"{run_dir} has no checkpoint to go on from; start the run again in a new directory.")


def resume(args: Args, state: State, buffer: Buffer, envs: Environments):
    """Step, state, buffer, obs, returns, lengths and recent metrics of the run as it was saved.

    The environments repeat their episodes, and what was logged since then is taken off the files.
    """
    run_dir, zeros = Path(args.resume), np.zeros(args.num_seeds)
    obs = np.zeros((args.num_seeds, envs.obs_dim), np.float32)
    loop = {"obs": obs, "returns": zeros, "lengths": zeros.astype(int), "episodes": envs.episodes}
    step, state, saved, rest = load(run_dir, state, buffer=buffer, loop=loop)
    for path in checkpoints(run_dir):
        if int(path.stem) > step:  # damaged, and not one of the two to keep
            path.rename(path.with_suffix(".damaged"))
    loop, buffer = saved["loop"], jax.tree.map(jnp.asarray, saved["buffer"])
    obs = envs.replay(loop["episodes"], [rest[f"actions/{i}"] for i in range(args.num_seeds)])
    for i in np.flatnonzero((obs != loop["obs"]).any(axis=1)):
        print(f"{args.env_id} does not repeat an episode: seed {args.seed + i} begins a new one.")
        obs[i], loop["returns"][i], loop["lengths"][i] = envs.reset(i), 0, 0
    metrics = {x.removeprefix("recent/"): rest[x] for x in rest if x.startswith("recent/")}
    recent = deque([dict(zip(metrics, x)) for x in zip(*metrics.values())], maxlen=100)
    for name, path in log_files(run_dir).items():
        if f"sizes/{name}" in rest:
            os.truncate(path, rest[f"sizes/{name}"])
        else:
            path.unlink()
    print(f"Going on at step {step} of {args.total_timesteps}.", flush=True)
    return step, state, buffer, obs, loop["returns"], loop["lengths"], recent


def save_policy(run_dir: Path, state: State, envs: Environments, args: Args):
    """Writes policy.npz, the greedy policies of all seeds for a function of NumPy (README.md)."""
    layers = [*(f"Dense_{i}" for i in range(args.hidden_layers)), "head"]
    mean, std = state.moments.mean, jnp.sqrt(state.moments.var) + 1e-6
    arrays = {
        "obs_mean": mean if args.normalize_obs else jnp.zeros_like(mean),
        "obs_std": std if args.normalize_obs else jnp.ones_like(std),
        "obs_clip": 10.0 if args.normalize_obs else np.inf,
        "squash": SQUASH,
        "low": envs.low,
        "high": envs.high,
    }
    for i, layer in enumerate(layers):
        for name, x in state.actor["params"][layer].items():  # the head's first half is the mean
            arrays[f"{name}_{i}"] = x[..., : envs.action_dim] if layer == "head" else x
    write_npz(run_dir / "policy.npz", arrays)


@contextlib.contextmanager
def signals():
    """Collects Ctrl-C and SIGTERM for the loop, which ends after its step; a second ends it now."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate_run(args: Args):
    """Prints the episodes of the newest checkpoint's greedy policy as rows of eval.csv."""
    run_dir = Path(args.evaluate)
    envs = eval_environments(args, run_dir)
    state = init(np.array(seeds(args)), envs.obs_dim, envs.action_dim, args)
    step, state, *_ = load(run_dir, state)
    rows = csv_rows(step, args, *evaluate(state, envs, args))
    envs.close()
    print("global_step,seed,episode,return,length", *rows, sep="\n")


def due(step: int, frequency: int, args: Args) -> bool:
    """Whether something that happens every `frequency` environment steps happens at this one."""
    return frequency > 0 and step % frequency < args.action_repeat


def main(args: Args):
    """Alg. 1 for every seed in lockstep; `step` counts the environment steps of one seed."""
    check(args)
    if args.evaluate:
        return evaluate_run(args)
    streams = [np.random.SeedSequence(seed).spawn(3) for seed in seeds(args)]
    envs = Environments(args, [train.generate_state(1)[0] for _, train, _ in streams])
    run_dir = start_run(args)
    shape = (args.learning_starts // args.action_repeat, envs.action_dim)
    warm_up = [np.random.default_rng(stream).uniform(-1, 1, shape) for stream, _, _ in streams]
    state = init(np.array(seeds(args)), envs.obs_dim, envs.action_dim, args)
    buffer = make_buffer(envs.obs_dim, envs.action_dim, args)
    step, returns, lengths = 0, np.zeros(args.num_seeds), np.zeros(args.num_seeds, int)
    recent = deque(maxlen=100)  # metrics of the last updates, still on the device
    if args.resume:
        step, state, buffer, obs, returns, lengths, recent = resume(args, state, buffer, envs)
    eval_envs, log = eval_environments(args, run_dir), Log(args, run_dir, step)
    cleanup = contextlib.ExitStack()
    received = cleanup.enter_context(signals())
    cleanup.callback(log.close)
    cleanup.callback(eval_envs.close)

    try:
        obs = obs if args.resume else envs.reset_all()
        for step in range(step + args.action_repeat, args.total_timesteps + 1, args.action_repeat):
            if step <= args.learning_starts:
                action = np.stack([actions[step // args.action_repeat - 1] for actions in warm_up])
            else:
                action, key = explore(state, obs, args)
                state, metrics = learn(state._replace(key=key), buffer, args)  # computes meanwhile
                recent.append(metrics)
            action = np.asarray(action, np.float32)
            next_obs, reward, terminated, truncated = envs.step(action)
            ended = terminated | truncated
            row = np.column_stack([obs, action, reward, ~terminated, ended, next_obs])
            buffer, moments = insert(buffer, state.moments, row)
            state = state._replace(moments=moments)
            obs, returns, lengths = next_obs, returns + reward, lengths + args.action_repeat
            for i in np.flatnonzero(ended):
                log.episode(step, i, returns[i], lengths[i])
                obs[i], returns[i], lengths[i] = envs.reset(i), 0, 0
            if step > args.learning_starts and due(step, args.log_frequency, args):
                log.losses(step, recent)
            if due(step, args.eval_frequency, args):
                log.evaluation(step, *evaluate(state, eval_envs, args))
            log.bar.update(args.action_repeat)
            last = received or step + args.action_repeat > args.total_timesteps
            if last or due(step, args.checkpoint_frequency, args):
                loop = {"obs": obs, "returns": returns, "lengths": lengths}
                save(log, step, state, buffer, envs, recent, **loop)
            if received:
                fail(f"Stopped at step {step}. {how_to_go_on(run_dir)}", code=128 + received[0])
    except FloatingPointError as error:
        fail(f"{args.env_id} broke down at step {step}: {error}. {how_to_go_on(run_dir)}", code=1)
    except OSError as error:
        fail(f"Writing failed at step {step}: {error}. {how_to_go_on(run_dir)}", code=1)
    finally:
        cleanup.close()


if __name__ == "__main__":
    try:
        main(flags())
    except KeyboardInterrupt:
        fail("Stopped before the first step.", code=130)
