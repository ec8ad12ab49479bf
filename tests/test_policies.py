"""The policies that come with the repository play as their runs did."""

import sys

import pandas as pd
import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "agents"))
import play  # noqa: E402

POLICIES = REPOSITORY / "benchmark" / "results" / "policies"


def test_every_policy_has_its_evaluation():
    runs = {path.stem for path in POLICIES.glob("*.npz")}
    assert runs and runs == set(pd.read_csv(POLICIES / "eval.csv")["policy"])
    assert all(path.stat().st_size < 400_000 for path in POLICIES.glob("*.npz"))


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.npz")), ids=lambda path: path.stem)
def test_a_policy_plays_as_in_its_last_evaluation(path):
    """Within what sums in another order do to an episode."""
    rows = pd.read_csv(POLICIES / "eval.csv").set_index(["policy", "episode"])
    expected = rows.loc[(path.stem, 0), "return"]
    assert play.main(play.Flags(path, episodes=1)) == [pytest.approx(expected, rel=0.05)]
