"""The report: what its tables say of runs made here, statistics against SciPy and by hand."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

pytest.importorskip("matplotlib")
sys.path.append(str(REPOSITORY / "benchmark"))
import pandas as pd  # noqa: E402
import report  # noqa: E402
from running import exits  # noqa: E402
from scipy import stats  # noqa: E402

PUBLISHED = """env_id,algorithm,series,step,return,seeds,method,source
cartpole-swingup,SAC,best,50,700,1,wide,somebody's file
cartpole-swingup,any,any,100,880,,any,another file
Hopper,TD3,best,120,3500,,v4,a table
"""


def run(folder: Path, agent: str, env_id: str, seed: int, returns: dict, old=None, **flags) -> Path:
    """A run directory; `returns` are means of two episodes by step, `old` adds to its config."""
    directory = folder / f"{agent}__{env_id.replace('/', '_')}__{seed}"
    directory.mkdir(parents=True)
    flags = {"exp_name": agent, "env_id": env_id, "seed": seed, "eval_episodes": 2} | flags
    config = {"args": flags, **(old or {"history": {}})}
    (directory / "config.json").write_text(json.dumps(config))
    lines = [f"{s},{seed},{k},{x - 1 + 2 * k},9\n" for s, x in returns.items() for k in (0, 1)]
    (directory / "eval.csv").write_text(",".join(report.EPISODES) + "\n" + "".join(lines))
    return directory


def make(tmp_path: Path, *results: Path, **changes) -> str:
    (tmp_path / "published.csv").write_text(PUBLISHED)
    options = {"published": tmp_path / "published.csv", "steps": (50, 100)} | changes
    report.main(report.Args(results, out_dir=tmp_path / "out", **options))
    return (tmp_path / "out" / "report.md").read_text()


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("draw_curves", "draw_profile"):
        monkeypatch.setattr(report, name, lambda *_: None)


@pytest.fixture
def curves(tmp_path):
    """Five seeds, one of them still running; two seeds; a seed of the first scripts."""
    folder = tmp_path / "curves"
    for seed in range(5):
        returns = {25: 100, 50: 700 + seed, 75: 500, 100: 810 + 10 * seed}
        returns = {s: x for s, x in returns.items() if s < 100 or seed < 4}
        run(folder, "sac_dmc", "cartpole-swingup", seed, returns, n_step=1 if seed else 3)
    for seed in range(2):
        run(folder, "td3_gym", "Hopper-v5", seed, {50: 1000, 100: 3000 + 100 * seed})
    old = {"commit": "0123456789abcdef", "device": "cpu", "machine": "Linux"}
    run(folder, "mpo_dmc", "dm_control/cheetah-run-v0", 0, {25: 0, 50: 10, 75: 40, 100: 99.5}, old)
    (folder / "runs.csv").write_text(
        "run,commit,machine\nsac_dmc__cartpole-swingup__0,abcdefabcdefabcd-dirty,a CPU\n"
        "sac_dmc__cartpole-swingup__1,abcdefabcdefabcd,a CPU\n"
    )
    (folder / "wall.csv").write_text(  # the second attempt began at a checkpoint before 50
        "run,global_step,seconds\ntd3_gym__Hopper-v5__0,50,600\ntd3_gym__Hopper-v5__0,100,60\n"
    )
    return folder


def test_tables(tmp_path, curves, no_figures):
    """What is known of each seed, where it comes from, and whom it is beside."""
    text = make(tmp_path, curves)
    for line in """
        | SAC | 5 | 702 [701, 704] | 825 [810, 840] (4 of 5) | 676 [672, 679] (4 of 5) |
        | TD3 | 2 | 1000 [1000, 1000] | 3050 [3000, 3100] | 2025 [2000, 2050] | 100 [100, 100] |
        | 2025 [2000, 2050] | 100 [100, 100] | 11 (1 of 2) |
        | MPO | 1 | 10 | 99.5 | 49.8 | 100 | - |
        702 [701, 704] | 702 [701, 703] | 700 (1 seed) [1] | - | - |
        3500 (at 120) [3] | - | - |
        - [1] somebody's file: wide
        | cartpole-swingup | SAC | 0, 1, 2, 3, 4 | ?, abcdefabcd, abcdefabcd-dirty | ?, a CPU |
        | cheetah-run | MPO | 0 | 0123456789 | cpu |
        - The seeds of SAC on cartpole-swingup differ in n_step: 1, 3
    """.strip().split("\n"):
        assert line.strip() in text, line
    table = tmp_path / "studies" / "x.csv"  # says as much as the runs did, but for their flags
    report.main(report.Args((curves,), table=table))
    assert make(tmp_path, table) == re.sub(r"\n- The seeds of .*\n$", "", text)


def test_committed_report(tmp_path, no_figures):
    """The default command makes the tables in benchmark/results again."""
    committed = REPOSITORY / "benchmark" / "results" / "report.md"
    report.main(report.Args(out_dir=tmp_path))
    assert (tmp_path / "report.md").read_bytes() == committed.read_bytes()


def test_negative_returns(tmp_path, monkeypatch):
    """Such a task has no scale: it is left out of the profile, which says so."""
    drawn = {}
    monkeypatch.setattr(report, "draw_profile", lambda tasks, scale, args: drawn.update(scale))
    for agent, final in (("sac_gym", -100), ("td3_gym", -900)):
        run(tmp_path / "runs", agent, "Pendulum-v1", 0, {50: -1500, 100: final})
        run(tmp_path / "runs", agent, "Hopper-v5", 0, {50: 1000, 100: 2000})
    text = make(tmp_path, tmp_path / "runs")
    assert "Left out, as their returns are negative:\nPendulum-v1." in text
    assert drawn == {"Hopper-v5": 3500}


def test_published_numbers():
    published = pd.read_csv(REPOSITORY / "benchmark" / "published.csv")
    assert set(published.series) == {"best", "earlier", "any"}
    assert (published["return"] > 0).all() and (published.step >= 100_000).all()
    assert published[["source", "method"]].notna().all(axis=None)
    assert not published.duplicated(["env_id", "algorithm", "series", "step", "seeds"]).any()


def test_variants(tmp_path, no_figures, capsys):
    """A copied script is another algorithm; runs of one are told apart by their flags."""
    for agent in ("sac_dmc", "sac3_dmc", "sac_dmc_wide"):
        run(tmp_path / "a", agent, "walker-walk", 0, {50: 9, 100: 500}, n_step=1)
    run(tmp_path / "b", "sac_dmc", "walker-walk", 0, {50: 9, 100: 600}, n_step=3)
    text = make(tmp_path, tmp_path / "a")
    assert re.findall(r"^\| (\w+) \| 1 \|", text, re.M) == ["SAC", "SAC3", "sac_dmc_wide"]
    code, said = exits(capsys, make, tmp_path, tmp_path)
    assert code == 2 and "tell variants apart with --by" in said
    text = make(tmp_path, tmp_path, by=("n_step",))
    assert "| SAC, n_step 1 | 1 | 9 | 500 |" in text and "| SAC, n_step 3 | 1 | 9 | 600 |" in text


HEADER = ",".join(report.EPISODES) + "\n"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", "{", "config.json is not what is needed"),
        ("eval.csv", "step,return\n1,2\n", "does not have the columns"),
        ("eval.csv", HEADER + "1,0,0,x,1\n", "cannot be read"),
        ("eval.csv", HEADER + "9,0,0,1,1\n", "No run has a complete"),  # one of two episodes
        ("eval.csv", None, "There is no eval.csv below"),
    ],
)
def test_bad_files(tmp_path, capsys, name, text, message):
    file = run(tmp_path / "runs", "sac_dmc", "x", 0, {100: 500}) / name
    file.unlink() if text is None else file.write_text(text)
    code, said = exits(capsys, make, tmp_path, tmp_path / "runs")
    assert code == 2 and message in said


def test_iqm_and_profile():
    """Without the lowest and highest quarter; tasks count alike, whatever their numbers of runs."""
    for scores in (np.random.default_rng(n).normal(size=n) for n in range(1, 9)):
        cut = len(scores) // 4
        middle = np.sort(scores)[cut : len(scores) - cut].mean()
        np.testing.assert_allclose(report.iqm(scores), middle)
    scores, thresholds = (np.array([0.2, 0.6]), np.array([0.9])), np.array([0.1, 0.5, 0.8, 1])
    shares = report.profile(*scores, thresholds=thresholds)
    np.testing.assert_allclose(shares, [1, 0.75, 0.5, 0])


def test_intervals():
    """None for one seed, the range for two and three, about SciPy's bootstrap for more."""
    for scores, ends in (([3.0], [np.nan] * 2), ([7.0, 3.0], [3, 7]), ([1.0, 2.0, 9.0], [1, 9])):
        value, *found = report.estimate([np.array(scores)], report.iqm)
        assert value == np.mean(scores)
        np.testing.assert_array_equal(found, ends)
    scores = np.random.default_rng(0).normal(size=100)
    _, *found = report.estimate([scores], report.mean)
    expected = stats.bootstrap([scores], np.mean, method="percentile").confidence_interval
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_steps_to_ninety_percent():
    """Of a negative return, ten ninths of it."""
    for returns, step in (([0, 50, 89, 90, 100], 40), ([-900, -112, -111, -105, -100], 30)):
        assert report.reaches(pd.Series(returns, index=[10, 20, 30, 40, 50])) == step
