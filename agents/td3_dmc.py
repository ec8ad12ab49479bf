# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.6", "flax>=0.10.6", "optax>=0.2.4", "numpy>=2.2", "gymnasium>=1.3", "shimmy>=2.0.1",
#   "dm_control>=1.0.30", "mujoco>=3.3.2,<4", "pydantic>=2.10", "tyro>=0.9.20",
#   "tensorboardX>=2.6.2", "tqdm>=4.66", "moviepy>=2.1",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""TD3 on the DeepMind Control Suite, in one file.

Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods",
arXiv:1802.09477v3.

    python td3_dmc.py --env-id cartpole-swingup --total-timesteps 250000

Where a default may depart from the authors' code, its flag has theirs in brackets.
"""

import ctypes.util
import importlib
import json
import os
import shlex
import signal
import sys
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tensorboardX import SummaryWriter
from tqdm import tqdm

Params = Any  # a tree of Flax parameters
Fraction = Annotated[float, Field(gt=0, le=1)]


class Args(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Flags of the run, from --env-id its environment's, from --buffer-size TD3's."""

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

    env_id: str = "cartpole-swingup"  # task of the suite, domain-task
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    action_repeat: PositiveInt = 1  # environment steps for which an action is held

    buffer_size: PositiveInt = 1_000_000  # transitions kept for replay
    learning_starts: PositiveInt = 5_000  # random environment steps at first (authors: 25000)
    updates_per_step: PositiveInt = 1  # gradient updates for each action
    batch_size: PositiveInt = 256  # transitions in the minibatch of an update
    gamma: Fraction = 0.99  # discount factor
    n_step: PositiveInt = 3  # rewards in a target before it bootstraps (authors: 1)
    tau: Fraction = 0.005  # share of the online networks in a step of the target networks
    policy_frequency: PositiveInt = 2  # updates between steps of the actor and of all targets
    hidden_width: PositiveInt = 256  # units of each of the two hidden layers
    layer_norm: bool = True  # LayerNorm before each activation of the critics (authors: off)
    normalize_obs: bool = True  # normalise observations by their running moments (authors: off)

    learning_rate: PositiveFloat = 3e-4  # Adam's step size for actor and critics (authors: 3e-4)
    exploration_noise: NonNegativeFloat = 0.2  # standard deviation of action noise (authors: 0.1)
    clipped_double_q: bool = False  # learn from the smaller critic, else their mean (authors: on)
    policy_noise: NonNegativeFloat = 0.2  # that of the noise on the target policy's actions
    noise_clip: NonNegativeFloat = 0.5  # bound of the noise on the target policy's actions


def warn(message: str):
    """Prints a sentence on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    warn(message)
    sys.exit(code)


# --- environment ----------------------------------------------------------------------------------


def make_env(args: Args, **options) -> gym.Env:
    """A task of the suite; lqr draws its plant when it is made, here one for all of a run."""
    renderer = "egl" if args.capture_video and ctypes.util.find_library("EGL") else "disable"
    os.environ.setdefault("MUJOCO_GL", renderer)  # dm_control reads it when it is imported
    with redirect_stdout(None):  # it tells of environments without labmaze
        importlib.import_module("shimmy")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of dm_control, with NumPy 2.5
    env_id = f"dm_control/{args.env_id.removeprefix('dm_control/').removesuffix('-v0')}-v0"
    options |= {"task_kwargs": {"random": args.seed}, "max_episode_steps": 10_000}  # ends lqr's
    env = gym.make(env_id, disable_env_checker=True, **options | json.loads(args.env_kwargs))
    env.metadata["render_fps"] = round(1 / env.unwrapped.dt)
    if os.environ["MUJOCO_GL"] == "disable":
        type(env.unwrapped._env.physics).contexts = None  # quadruped-escape would draw its terrain
    return env


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
    """The deterministic action [..., A]."""
    return jnp.tanh(MLP(args, actor["params"]["Dense_2"]["bias"].size).apply(actor, obs))


# --- state ----------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that learning changes."""

    actor: TrainState  # phi
    critic: TrainState  # theta_1 and theta_2, on a leading axis of 2
    target_actor: Params
    target_critic: Params


@partial(jax.jit, static_argnames=("obs_dim", "action_dim", "args"))
def init(key, obs_dim: int, action_dim: int, args: Args) -> State:
    """The state before the first update."""
    actor_key, critic_key = jax.random.split(key)
    actor = MLP(args, action_dim).init(actor_key, jnp.zeros(obs_dim))
    init_critic = jax.vmap(MLP(args, 1, args.layer_norm).init, in_axes=(0, None))
    critic = init_critic(jax.random.split(critic_key), jnp.zeros(obs_dim + action_dim))
    return State(
        actor=trained(actor, args.learning_rate),
        critic=trained(critic, args.learning_rate),
        target_actor=actor,
        target_critic=critic,
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

SQUASH = "tanh"  # what brings the greedy action to [-1, 1]


def normalize(obs, buffer: Buffer, args: Args):
    """Observations [..., O] with mean 0 and variance 1, clipped to [-10, 10]."""
    mean, std = (jnp.broadcast_to(x, obs.shape) for x in (buffer.mean, jnp.sqrt(buffer.var)))
    return jnp.clip((obs - mean) / (std + 1e-6), -10, 10) if args.normalize_obs else obs


@partial(jax.jit, static_argnames="args")
def explore(actor: Params, buffer: Buffer, obs, key, step, args: Args):
    """The noisy action [A] for obs [O], or at first a uniformly random one; `key` is the run's."""
    key, uniform_key = jax.random.split(jax.random.fold_in(key, step))
    action = policy(actor, normalize(obs, buffer, args), args)
    action += args.exploration_noise * jax.random.normal(key, action.shape)
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


def td_target(state: State, batch: Batch, key, args: Args):
    """Target with target policy smoothing, [B]; Alg. 1 takes the smaller critic."""
    noise = args.policy_noise * jax.random.normal(key, batch.action.shape)
    noise = jnp.clip(noise, -args.noise_clip, args.noise_clip)
    next_action = jnp.clip(policy(state.target_actor, batch.next_obs, args) + noise, -1, 1)
    q = q_values(state.target_critic, batch.next_obs, next_action, args)
    q = (q.min if args.clipped_double_q else q.mean)(axis=0)
    return batch.reward + args.gamma * batch.discount * q


def critic_loss(critic: Params, batch: Batch, target, args: Args):
    """Mean squared Bellman error, summed over the two critics."""
    q = q_values(critic, batch.obs, batch.action, args)
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"qf_loss": loss, "qf1_values": q[0].mean(), "qf2_values": q[1].mean()}


def actor_loss(actor: Params, state: State, batch: Batch, args: Args):
    """Deterministic policy gradient through the first critic (Alg. 1)."""
    first = jax.tree.map(lambda x: x[:1], state.critic.params)  # spares the other's gradient
    loss = -q_values(first, batch.obs, policy(actor, batch.obs, args), args).mean()
    return loss, {"actor_loss": loss}


def gradient_step(train_state: TrainState, loss, *inputs):
    """One step of the optimiser on `loss(params, *inputs) -> (scalar, metrics)`."""
    grads, metrics = jax.grad(loss, has_aux=True)(train_state.params, *inputs)
    return train_state.apply_gradients(grads=grads), metrics


def update(state: State, batch: Batch, key, args: Args) -> tuple[State, dict]:
    """The learning part of Alg. 1."""
    target = td_target(state, batch, key, args)
    critic, critic_metrics = gradient_step(state.critic, critic_loss, batch, target, args)

    def delayed(state: State):
        actor, metrics = gradient_step(state.actor, actor_loss, state, batch, args)
        online = actor.params, critic.params
        targets = state.target_actor, state.target_critic
        targets = optax.incremental_update(online, targets, step_size=args.tau)
        return State(actor, critic, *targets), metrics

    def skipped(state: State):
        return state, {"actor_loss": jnp.float32(jnp.nan)}

    due = critic.step % args.policy_frequency == 0
    state, metrics = jax.lax.cond(due, delayed, skipped, state._replace(critic=critic))
    return state, critic_metrics | metrics


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
    """Alg. 1; `step` counts environment steps."""
    stop = []  # signals received; the second one ends at once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda n, _: stop.append(n) or signal.signal(n, signal.SIG_DFL))
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
