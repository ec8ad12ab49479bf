"""The PyTorch side of the speed benchmark does our work: losses, gradients, target networks."""

import sys

import jax
import numpy as np
import oracles
import pytest
from conftest import REPOSITORY, small_args
from oracles import ACT, OBS, assert_close, descended, perturbed, random_batch

torch = pytest.importorskip("torch")
sys.path.append(str(REPOSITORY / "benchmark"))
import torch_updates  # noqa: E402

pytestmark = pytest.mark.backends("gym")

SAMPLES = 5
NOISES = {"sac": 2, "td3": 1, "mpo": 1}  # times that an update draws noise


def layers(network) -> list:
    """Kernels [I, O], biases and scales of a network in JAX, from its input to its output."""
    params = network["params"]
    hidden = [f"{kind}_{i}" for i in range(len(params)) for kind in ("Dense", "LayerNorm")]
    names = [name for name in (*hidden, "head") if name in params]
    kinds = ("kernel", "scale", "bias")
    return [
        np.asarray(params[name][kind]) for name in names for kind in kinds if kind in params[name]
    ]


def both(critic) -> list:
    """The layers of one critic after the other."""
    return [x for i in range(2) for x in layers(jax.tree.map(lambda leaf: leaf[i], critic))]


LAYERS = {"actor": layers, "target_actor": layers, "critic": both, "target_critic": both}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_torch_updates_have_our_losses_and_gradients(script, layer_norm, monkeypatch):
    mpo = script.algorithm == "mpo"
    changes = dict(layer_norm=layer_norm) | (
        dict(action_samples=SAMPLES, target_network_frequency=1)
        if mpo
        else dict(policy_frequency=1)
    )
    args = small_args(script, **changes)
    state, batch = oracles.init(script, args), random_batch(script)
    state = state._replace(actor=perturbed(state.actor, 1), critic=perturbed(state.critic, 2))
    state = state._replace(target_critic=perturbed(state.critic, 3))
    if script.algorithm != "sac":
        state = state._replace(target_actor=perturbed(state.actor, 4))

    other = getattr(torch_updates, script.algorithm.upper())(OBS, ACT, args)
    for name in LAYERS.keys() & set(state._fields):
        values = LAYERS[name](getattr(state, name))
        for parameter, value in zip(getattr(other, name).parameters(), values, strict=True):
            parameter.data = torch.from_numpy(value.T.copy())

    with jax.debug_key_reuse(False):  # the noise is drawn here as in the update
        keys = jax.random.split(state.key, NOISES[script.algorithm] + 1)[1:]
        shape = (SAMPLES, *batch.action.shape) if mpo else batch.action.shape
        noises = [torch.from_numpy(np.array(jax.random.normal(key, shape))) for key in keys]
        new, metrics = oracles.compiled(script.update)(state, batch, args=args)
    monkeypatch.setattr(torch_updates, "standard_normal", lambda *_: noises.pop(0))
    other_metrics = other.update(torch_updates.Batch(*map(torch.from_numpy, batch)))
    assert not noises

    for name, value in other_metrics.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-4, err_msg=name)
    for name in ("actor", "critic"):
        expected = LAYERS[name](descended(getattr(new, f"{name}_opt")))
        gradients = [x.grad.numpy().T for x in getattr(other, name).parameters()]
        assert_close(gradients, expected, rtol=1e-4)
    if mpo:
        gradient = descended(new.duals_opt)
        expected = np.stack([gradient.alpha_mean, gradient.alpha_stddev])
        assert_close(other.duals.grad.numpy(), expected, rtol=1e-4)
    if script.algorithm == "sac":
        expected = descended(new.alpha_opt)
        np.testing.assert_allclose(other.log_alpha.grad, expected, rtol=1e-4)
    targets = [x.numpy().T for x in other.target_critic.parameters()]
    assert_close(targets, both(new.target_critic), rtol=1e-4)
