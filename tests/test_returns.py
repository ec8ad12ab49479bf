"""Whole runs on a real small task, long enough to solve it.

Pendulum-v1 costs about -1200 under a random policy and -150 at best. The backends share their
learning (a test compares the text), so the Gymnasium scripts stand for all.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from running import evaluations

RATES = {
    "sac": "--policy-lr 1e-3 --q-lr 1e-3",
    "td3": "--learning-rate 1e-3",
    "mpo": "--policy-lr 1e-3 --q-lr 1e-3",
}


@pytest.mark.slow
@pytest.mark.backends("gym")
def test_solves_the_pendulum(script, tmp_path):
    flags = "--env-id Pendulum-v1 --total-timesteps 12500 --learning-starts 1000 --hidden-width 64"
    flags += f" --batch-size 64 --eval-frequency 2500 {RATES[script.algorithm]}"
    # A process of its own: the checks that conftest.py turns on would slow every step down.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, script.__file__, *flags.split(), "--run-dir", tmp_path / "run"]
    subprocess.run(command, env=plain, check=True)
    returns = [float(row["return"]) for row in evaluations(tmp_path / "run")]
    assert np.mean(returns[-20:]) > -400  # of the last two evaluations
