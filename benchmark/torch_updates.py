"""SAC, TD3 and MPO in plain PyTorch: the updates of our scripts, as one would write them there.

The other side of `speed.py --measure updates`: the same networks, losses and optimisers (`args` are
the flags of a script in agents/), and minibatches from a buffer on the device. The tests hold their
losses and gradients against those of the scripts.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Batch(NamedTuple):
    """A minibatch, as in the scripts."""

    obs: torch.Tensor  # [B, O]
    action: torch.Tensor  # [B, A] in [-1, 1]
    reward: torch.Tensor  # [B]
    discount: torch.Tensor  # [B] 0 where the episode terminated, else gamma^(k - 1) after k steps
    next_obs: torch.Tensor  # [B, O]


class Buffer:
    """Transitions on the device, as in the scripts."""

    def __init__(self, obs_dim: int, action_dim: int, args, device="cpu"):
        widths = (obs_dim,), (action_dim,), (), (), (obs_dim,)
        self.args = args
        self.data = Batch(*(torch.zeros(args.buffer_size, *x, device=device) for x in widths))
        self.mean, self.std = (
            torch.zeros(obs_dim, device=device),
            torch.ones(obs_dim, device=device),
        )

    def normalize(self, obs):
        """Observations [B, O] with mean 0 and variance 1, clipped to [-10, 10]."""
        if not self.args.normalize_obs:
            return obs
        return ((obs - self.mean) / (self.std + 1e-6)).clamp(-10, 10)

    def sample(self, count: int) -> Batch:
        """A minibatch drawn uniformly, with replacement, from the first `count` transitions."""
        index = torch.randint(count, (self.args.batch_size,), device=self.mean.device)
        obs, *columns, next_obs = (x[index] for x in self.data)
        return Batch(self.normalize(obs), *columns, self.normalize(next_obs))


def mlp(inputs: int, outputs: int, args, layer_norm: bool = False) -> nn.Sequential:
    """Two hidden layers with ReLU, and a linear one; LayerNorm, if asked for, before each ReLU."""
    layers, width = [], args.hidden_width
    for i in range(2):
        layers.append(nn.Linear(width if i else inputs, width))
        if layer_norm:
            layers.append(nn.LayerNorm(width, eps=1e-6))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Critics(nn.Module):
    """Two critics, [2, ...]."""

    def __init__(self, obs_dim: int, action_dim: int, args):
        super().__init__()
        nets = [mlp(obs_dim + action_dim, 1, args, args.layer_norm) for _ in range(2)]
        self.nets = nn.ModuleList(nets)

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


def standard_normal(shape, like):
    """Noise of this shape on the device of the other tensor."""
    return torch.randn(shape, device=like.device)


def target_of(network: nn.Module) -> nn.Module:
    """A copy that no gradient reaches."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def polyak(network: nn.Module, target: nn.Module, tau: float):
    """Moves the target by the share tau towards the network."""
    for new, old in zip(network.parameters(), target.parameters()):
        old.lerp_(new, tau)


def critic_loss(critic: Critics, batch: Batch, target):
    """Mean squared Bellman error, summed over the two critics."""
    return (critic(batch.obs, batch.action) - target).square().mean(dim=1).sum()


def adam(parameters, learning_rate: float) -> torch.optim.Adam:
    """Adam in one kernel, the fastest of PyTorch's."""
    return torch.optim.Adam(parameters, learning_rate, fused=True)


def descend(loss, optimizer: torch.optim.Optimizer):
    """One step of the optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def value(q, args):
    """The smaller of two critics [2, B], or their mean, as the flag has it."""
    return q.amin(dim=0) if args.clipped_double_q else q.mean(dim=0)


class SAC:
    """Soft Actor-Critic; Haarnoja et al., arXiv:1812.05905v2."""

    def __init__(self, obs_dim: int, action_dim: int, args, device="cpu"):
        self.args, self.updates = args, 0
        self.actor = mlp(obs_dim, 2 * action_dim, args).to(device)
        self.critic = Critics(obs_dim, action_dim, args).to(device)
        self.target_critic = target_of(self.critic)
        self.log_alpha = torch.tensor(math.log(args.alpha), device=device, requires_grad=True)
        self.target_entropy = -args.target_entropy_scale * action_dim
        self.actor_opt = adam(self.actor.parameters(), args.policy_lr)
        self.critic_opt = adam(self.critic.parameters(), args.q_lr)
        self.alpha_opt = adam([self.log_alpha], args.policy_lr)

    def sample_action(self, obs, noise):
        """Actions [B, A] and their log-probabilities [B], from standard normal noise [B, A]."""
        mean, spread = self.actor(obs).chunk(2, dim=-1)
        width = self.args.log_std_max - self.args.log_std_min
        log_std = self.args.log_std_min + width * (1 + torch.tanh(spread)) / 2
        u = mean + log_std.exp() * noise
        log_normal = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(dim=-1)

    @torch.no_grad()
    def td_target(self, batch: Batch, noise):
        """Soft Bellman target, [B]."""
        next_action, log_prob = self.sample_action(batch.next_obs, noise)
        next_q = value(self.target_critic(batch.next_obs, next_action), self.args)
        next_v = next_q - self.log_alpha.exp() * log_prob
        return batch.reward + self.args.gamma * batch.discount * next_v

    def critic_loss(self, batch: Batch, noise):
        """The critics' loss at the soft Bellman target."""
        return critic_loss(self.critic, batch, self.td_target(batch, noise))

    def actor_loss(self, batch: Batch, noise):
        """Expected alpha log pi - Q, and the entropy."""
        action, log_prob = self.sample_action(batch.obs, noise)
        q = value(self.critic(batch.obs, action), self.args)
        loss = (self.log_alpha.detach().exp() * log_prob - q).mean()
        return loss, -log_prob.detach().mean()

    def update(self, batch: Batch) -> dict:
        """One step of the critics, the actor and alpha; metrics that nobody has waited for."""
        loss = self.critic_loss(batch, standard_normal(batch.action.shape, batch.action))
        descend(loss, self.critic_opt)
        self.critic.requires_grad_(False)  # spares the critics' gradients of the actor's loss
        actor_loss, entropy = self.actor_loss(
            batch, standard_normal(batch.action.shape, batch.action)
        )
        descend(actor_loss, self.actor_opt)
        self.critic.requires_grad_(True)
        metrics = {"qf_loss": loss.detach(), "actor_loss": actor_loss.detach(), "entropy": entropy}
        if self.args.autotune:
            alpha_loss = self.log_alpha * (entropy - self.target_entropy)
            descend(alpha_loss, self.alpha_opt)
            metrics["alpha_loss"] = alpha_loss.detach()
        polyak(self.critic, self.target_critic, self.args.tau)
        return metrics


class TD3:
    """Twin Delayed DDPG; Fujimoto et al., arXiv:1802.09477v3."""

    def __init__(self, obs_dim: int, action_dim: int, args, device="cpu"):
        self.args, self.updates = args, 0
        self.actor = mlp(obs_dim, action_dim, args).append(nn.Tanh()).to(device)
        self.critic = Critics(obs_dim, action_dim, args).to(device)
        self.target_actor, self.target_critic = target_of(self.actor), target_of(self.critic)
        self.actor_opt = adam(self.actor.parameters(), args.learning_rate)
        self.critic_opt = adam(self.critic.parameters(), args.learning_rate)

    @torch.no_grad()
    def td_target(self, batch: Batch, noise):
        """Target with target policy smoothing, [B]."""
        clip = self.args.noise_clip
        noise = (self.args.policy_noise * noise).clamp(-clip, clip)
        next_action = (self.target_actor(batch.next_obs) + noise).clamp(-1, 1)
        next_q = value(self.target_critic(batch.next_obs, next_action), self.args)
        return batch.reward + self.args.gamma * batch.discount * next_q

    def critic_loss(self, batch: Batch, noise):
        """The critics' loss at the smoothed target."""
        return critic_loss(self.critic, batch, self.td_target(batch, noise))

    def actor_loss(self, batch: Batch):
        """Deterministic policy gradient through the first critic."""
        x = torch.cat([batch.obs, self.actor(batch.obs)], dim=-1)
        return -self.critic.nets[0](x).mean()

    def update(self, batch: Batch) -> dict:
        """One step of the critics and, at every policy_frequency-th call, of everything else."""
        self.updates += 1
        loss = self.critic_loss(batch, standard_normal(batch.action.shape, batch.action))
        descend(loss, self.critic_opt)
        metrics = {"qf_loss": loss.detach()}
        if self.updates % self.args.policy_frequency == 0:
            self.critic.requires_grad_(False)  # spares the critics' gradients of the actor's loss
            actor_loss = self.actor_loss(batch)
            descend(actor_loss, self.actor_opt)
            self.critic.requires_grad_(True)
            metrics["actor_loss"] = actor_loss.detach()
            polyak(self.actor, self.target_actor, self.args.tau)
            polyak(self.critic, self.target_critic, self.args.tau)
        return metrics


def newton_temperature(q, epsilon: float):
    """The temperature [] at which the weights of q [N, B] have the mean KL epsilon.

    Newton's method in log space with a bracket; agents/mpo_dmc.py says why each line is there.
    """
    q = q - q.amax(dim=0)
    scale = (-q.min()).clamp(min=1e-20)
    q = q / scale
    high = q.new_tensor(math.log(1e10))
    low = (8 * epsilon / q.amin(dim=0).square().mean()).log() / 2
    x = (math.sqrt(2 * epsilon) / q.std(dim=0, correction=0).mean()).log().clamp(low, high)
    move = high - low
    for _ in range(12):
        log_ratio = x.exp() * q
        log_ratio = log_ratio - log_ratio.exp().mean(dim=0).log()
        excess = log_ratio.expm1()
        kls = ((1 + excess) * log_ratio - excess).mean(dim=0)
        kl, slope = kls.mean(), ((1 + excess) * (log_ratio - kls).square()).mean()
        gap = (kl / epsilon).log()
        low, high = torch.where(gap <= 0, x, low), torch.where(gap >= 0, x, high)
        step = gap * kl / slope
        good = (low <= x - step) & (x - step <= high) & (step.abs() <= (move / 2).clamp(min=1e-2))
        new_x = torch.where(good, x - step, (low + high) / 2)
        x, move = new_x, (new_x - x).abs()
    return scale * (-x).exp()


def kl_normal(mean, stddev, new_mean, new_stddev):
    """KL of Gaussians to new ones, [A]: in every dimension, the mean over states."""
    change = torch.log1p((new_stddev - stddev) / stddev)
    move = (new_mean - mean) / new_stddev
    return (change + torch.expm1(-2 * change) / 2 + move.square() / 2).mean(dim=0)


def log_prob(actions, mean, stddev):
    """Log density [N, B] of actions [N, B, A] under Gaussians [B, A]."""
    log_density = -((actions - mean) / stddev).square() / 2 - stddev.log()
    return (log_density - math.log(2 * math.pi) / 2).sum(dim=-1)


class MPO:
    """Maximum a posteriori Policy Optimisation, with the flags that are our default.

    Exact temperatures, a bound on the KL in every dimension, and the action penalty.
    """

    def __init__(self, obs_dim: int, action_dim: int, args, device="cpu"):
        assert args.temperature_solver == "newton" and args.per_dim_constraining
        assert args.action_penalty
        self.args, self.updates = args, 0
        self.actor = mlp(obs_dim, 2 * action_dim, args).to(device)
        for x in self.actor[-1].parameters():
            x.data.mul_(0.01)
        self.critic = Critics(obs_dim, action_dim, args).to(device)
        self.target_actor, self.target_critic = target_of(self.actor), target_of(self.critic)
        starts = [math.log(math.expm1(alpha)) for alpha in (args.alpha_mean, args.alpha_stddev)]
        self.duals = torch.tensor(starts, device=device)[:, None].repeat(1, action_dim)
        self.duals.requires_grad_(True)  # [2, A] of the mean and of the standard deviation
        self.epsilons = torch.tensor([args.epsilon_mean, args.epsilon_stddev], device=device)
        self.actor_opt = adam(self.actor.parameters(), args.policy_lr)
        self.critic_opt = adam(self.critic.parameters(), args.q_lr)
        self.duals_opt = adam([self.duals], args.dual_lr)

    def policy(self, actor: nn.Module, obs):
        """Mean and standard deviation, [B, A] each."""
        mean, spread = actor(obs).chunk(2, dim=-1)
        return mean, self.args.initial_stddev / math.log(2) * F.softplus(spread) + 1e-6

    @torch.no_grad()
    def sample(self, batch: Batch, noise):
        """Actions [N, B, A] in the next observations, and both target critics' values [2, N, B]."""
        mean, stddev = self.policy(self.target_actor, batch.next_obs)
        actions = mean + stddev * noise
        obs = batch.next_obs.expand(len(actions), -1, -1)
        return actions, self.target_critic(obs, actions.clamp(-1, 1))

    def critic_loss(self, batch: Batch, next_q):
        """The critics' loss at their mean value expected under the target policy."""
        next_v = next_q.mean(dim=(0, 1))
        target = batch.reward + self.args.gamma * batch.discount * next_v
        return critic_loss(self.critic, batch, target)

    @torch.no_grad()
    def e_step(self, actions, q):
        """The improved policy as weights [N, B], a sum over the two objectives."""
        cost = -(actions - actions.clamp(-1, 1)).norm(dim=-1)
        weights = torch.softmax(q / newton_temperature(q, self.args.epsilon), dim=0)
        temperature = newton_temperature(cost, self.args.epsilon_penalty)
        return weights + torch.softmax(cost / temperature, dim=0)

    def actor_loss(self, batch: Batch, actions, weights):
        """Weighted maximum likelihood within trust regions; besides, both KLs, [2, A]."""
        mean, stddev = self.policy(self.actor, batch.next_obs)
        with torch.no_grad():
            old_mean, old_stddev = self.policy(self.target_actor, batch.next_obs)
        fit = log_prob(actions, mean, old_stddev) + log_prob(actions, old_mean, stddev)
        kl_mean = kl_normal(old_mean, old_stddev, mean, old_stddev)
        kl_stddev = kl_normal(old_mean, old_stddev, old_mean, stddev)
        kls = torch.stack([kl_mean, kl_stddev])
        multipliers = F.softplus(self.duals.detach()) + 1e-8
        loss = -(weights * fit).sum(dim=0).mean() + (multipliers * kls).sum()
        return loss, kls.detach()

    def dual_loss(self, kls):
        """Moves each multiplier up while its KL is above the bound, and down while it is below."""
        return ((F.softplus(self.duals) + 1e-8) * (self.epsilons[:, None] - kls)).sum()

    def update(self, batch: Batch) -> dict:
        """One step of the critics, the E-step, and one step of the actor and the multipliers."""
        self.updates += 1
        shape = (self.args.action_samples, *batch.action.shape)
        actions, next_q = self.sample(batch, standard_normal(shape, batch.action))
        loss = self.critic_loss(batch, next_q)
        descend(loss, self.critic_opt)
        weights = self.e_step(actions, next_q.mean(dim=0))
        actor_loss, kls = self.actor_loss(batch, actions, weights)
        descend(actor_loss, self.actor_opt)
        dual_loss = self.dual_loss(kls)
        descend(dual_loss, self.duals_opt)
        with torch.no_grad():
            self.duals.clamp_(min=-18)
        if self.updates % self.args.target_network_frequency == 0:
            polyak(self.actor, self.target_actor, 1.0)
            polyak(self.critic, self.target_critic, 1.0)
        losses = {"qf_loss": loss, "actor_loss": actor_loss, "dual_loss": dual_loss}
        return {name: loss.detach() for name, loss in losses.items()}
