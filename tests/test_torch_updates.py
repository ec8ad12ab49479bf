"""The PyTorch side of the speed benchmark does our work: losses, steps, target networks."""

import sys

import jax
import numpy as np
import oracles
import pytest
from conftest import REPOSITORY, SMALL, small_args
from oracles import ACT, OBS, SAMPLES, assert_close, params_of, random_batch

torch = pytest.importorskip("torch")
sys.path.append(str(REPOSITORY / "benchmark"))
import torch_updates  # noqa: E402

pytestmark = pytest.mark.backends("dmc")


def layers(network) -> list:
    """Kernels [I, O], biases and scales of a network in JAX, from its input to its output."""
    params = network["params"]
    names = [f"{kind}_{i}" for i in range(3) for kind in ("Dense", "LayerNorm")]
    kinds = ("kernel", "scale", "bias")
    found = [(params.get(name, {}), kind) for name in names for kind in kinds]
    return [np.asarray(layer[kind]) for layer, kind in found if kind in layer]


def both(critic) -> list:
    return [x for i in range(2) for x in layers(jax.tree.map(lambda leaf: leaf[i], critic))]


def noise_of(script, key) -> list:
    """The noise of an update, in the order in which it is drawn, with its keys."""
    shape = (SAMPLES, oracles.BATCH, ACT) if script.algorithm == "mpo" else (oracles.BATCH, ACT)
    keys = jax.random.split(key) if script.algorithm == "sac" else [key]
    return [torch.from_numpy(np.array(jax.random.normal(key, shape))) for key in keys]


LAYERS = {"actor": layers, "target_actor": layers, "critic": both, "target_critic": both}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_torch_updates_are_ours(script, layer_norm, monkeypatch):
    monkeypatch.setitem(SMALL, "clipped_double_q", layer_norm)
    args = small_args(script, layer_norm=layer_norm, **oracles.always(script))
    state = oracles.optimised(oracles.perturbed_state(script, args), oracles.DESCENT)
    batch = random_batch(script)

    other = getattr(torch_updates, script.algorithm.upper())(OBS, ACT, args)
    for name in LAYERS.keys() & set(state._fields):
        values = LAYERS[name](params_of(state, name))
        for parameter, value in zip(getattr(other, name).parameters(), values, strict=True):
            parameter.data = torch.from_numpy(value.T.copy())

    for name in [name for name in vars(other) if name.endswith("_opt")]:
        (group,) = getattr(other, name).param_groups
        setattr(other, name, torch.optim.SGD(group["params"], lr=1.0))  # as DESCENT

    noises = noise_of(script, jax.random.key(0))
    new, metrics = oracles.update(script, state, batch, args)
    monkeypatch.setattr(torch_updates, "standard_normal", lambda *_: noises.pop(0))
    other_metrics = other.update(torch_updates.Batch(*map(torch.from_numpy, batch)))
    assert not noises

    for name, value in other_metrics.items():
        np.testing.assert_allclose(value, metrics[name], rtol=2e-4, err_msg=name)
    for name in LAYERS.keys() & set(state._fields):
        networks = [x.detach().numpy().T for x in getattr(other, name).parameters()]
        assert_close(networks, LAYERS[name](params_of(new, name)), rtol=2e-4)
    if script.algorithm == "mpo":
        expected = np.stack([new.duals.params[name] for name in ("alpha_mean", "alpha_stddev")])
        assert_close(other.duals.detach().numpy(), expected, rtol=2e-4)
    if script.algorithm == "sac":
        expected = new.alpha.params["log_alpha"]
        np.testing.assert_allclose(other.log_alpha.detach(), expected, rtol=2e-4)
