"""Several updates in one call are as many single updates; for MPO, whose siblings share a test."""

import jax
import numpy as np
import pytest
from conftest import small_args
from oracles import ACT, OBS, assert_close, without_key

pytestmark = pytest.mark.algorithms("mpo")


def learn(script, calls: int, updates_per_step: int):
    """The state after this many calls, and the metrics of the last one."""
    args = small_args(script, updates_per_step=updates_per_step, target_network_frequency=3)
    state, buffer = script.init(np.array([0]), OBS, ACT, args), script.make_buffer(OBS, ACT, args)
    rows = np.random.default_rng(0).normal(size=buffer.rows.shape).astype(np.float32)
    rows[..., -OBS - 2 : -OBS] = [1, 0]  # neither terminated nor ended
    buffer = buffer._replace(rows=rows, count=np.int32(len(rows[0])))
    for _ in range(calls):
        state, metrics = script.learn(state, buffer, args)
    return without_key(state), metrics


def test_k_updates_per_step_are_k_single_updates(script):
    together, metrics = learn(script, calls=1, updates_per_step=4)
    single, _ = learn(script, calls=4, updates_per_step=1)
    assert_close(together, single)
    assert {x.shape for x in jax.tree.leaves(metrics)} == {(1,)}
