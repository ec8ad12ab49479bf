"""The report: tables that come out byte for byte, statistics against rliable and by hand."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

missing = [x for x in ("rliable", "matplotlib", "pandas") if not importlib.util.find_spec(x)]
if missing:
    pytest.skip(f"the report needs {', '.join(missing)}", allow_module_level=True)
sys.path.append(str(REPOSITORY / "benchmark"))
import pandas as pd  # noqa: E402
import report  # noqa: E402
from rliable import metrics  # noqa: E402

DATA = REPOSITORY / "tests" / "data" / "report"
RESULTS = REPOSITORY / "benchmark" / "results"


def args(out_dir: Path, *results: Path, **changes) -> report.Args:
    few = {"steps": (20, 50, 100), "reps": 200, "published": DATA / "published.csv"}
    return report.Args(results, out_dir=out_dir, **(few | changes))


def copy_of_data(tmp_path: Path) -> Path:
    return shutil.copytree(DATA / "curves", tmp_path / "curves")


# --- whole reports --------------------------------------------------------------------------------


def test_tables_byte_for_byte(tmp_path):
    """Two seeds in a file, one compressed, one still running, one alone: as committed.

    If a change of the report is meant: python benchmark/report.py tests/data/report/curves
    --out-dir tests/data/report --published tests/data/report/published.csv --steps 20 50 100
    --reps 200 --no-figures
    """
    for attempt in ("a", "b"):
        report.main(args(tmp_path / attempt, DATA / "curves"))
        for name in ("report.md", "report.csv"):
            assert (tmp_path / attempt / name).read_bytes() == (DATA / name).read_bytes()
    for name in ("curves.svg", "comparison.svg"):
        first, second = (tmp_path / x / "figures" / name for x in "ab")
        assert first.read_bytes() == second.read_bytes()
        assert first.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(not (RESULTS / "report.md").exists(), reason="no committed report yet")
def test_committed_report(tmp_path):
    """The default command makes the tables in benchmark/results again."""
    report.main(report.Args(out_dir=tmp_path, figures=False))
    for name in ("report.md", "report.csv"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()


def test_order_of_runs_does_not_matter(tmp_path):
    """Runs given one by one, the last first."""
    runs = sorted((DATA / "curves").iterdir(), reverse=True)
    report.main(args(tmp_path, *runs, figures=False))
    assert (tmp_path / "report.csv").read_bytes() == (DATA / "report.csv").read_bytes()


def test_published_numbers_are_numbers_of_known_kinds():
    """The committed file has what the report looks for, and a source for every number."""
    published = pd.read_csv(REPOSITORY / "benchmark" / "published.csv")
    assert set(published.series) == {"best", "earlier", "any"}
    assert (published["return"] > 0).all() and (published.step >= 100_000).all()
    assert published.source.notna().all() and published.method.notna().all()
    key = ["env_id", "algorithm", "series", "step", "seeds"]
    assert not published.duplicated(key).any()


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 9))
def test_center_is_rliables(tmp_path, n):
    scores = np.random.default_rng(n).normal(size=(n, 3))
    for name, function in (("iqm", metrics.aggregate_iqm), ("mean", metrics.aggregate_mean)):
        ours = report.center(scores, args(tmp_path, center=name))
        np.testing.assert_allclose(ours, [function(x[:, None]).item() for x in scores.T])


def test_improvement_is_rliables():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (5, 2)), rng.integers(0, 4, (3, 2))  # ties, and other numbers of runs
    ours = report.improvement(x[:, :1], y[:, :1], x[:, 1:], y[:, 1:])
    np.testing.assert_allclose(ours, metrics.probability_of_improvement(x, y))


def test_profile():
    """Tasks count alike, whatever their numbers of runs."""
    shares = report.profile(
        np.array([[0.2], [0.6]]), np.array([[0.9]]), thresholds=np.array([0.1, 0.5, 0.8, 1])
    )
    np.testing.assert_allclose(shares, [1, 0.75, 0.5, 0])


def test_interval(tmp_path):
    """None for one seed, the range for two, and about the textbook's for many."""
    for scores, interval in (([[3.0]], [np.nan] * 2), ([[3.0], [7.0]], [3, 7])):
        value, *ends = report.over_seeds(np.array(scores), args(tmp_path))[:, 0]
        assert value == np.mean(scores)
        np.testing.assert_array_equal(ends, interval)
    scores = np.random.default_rng(0).normal(size=(100, 1))
    mean, low, high = report.over_seeds(scores, args(tmp_path, center="mean", reps=2000))[:, 0]
    half = 1.96 * scores.std() / 10
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.03)


def test_missing_seeds(tmp_path):
    """Each column has the seeds that came so far."""
    scores = np.array([[1.0, 10.0], [2.0, np.nan], [3.0, 30.0]])
    value, low, high = report.over_seeds(scores, args(tmp_path, center="mean"))
    assert value.tolist() == [2, 20] and low[1] == 10 and high[1] == 30


@pytest.mark.parametrize(
    "returns, step", [([0, 50, 89, 90, 100], 40), ([-900, -112, -111, -105, -100], 30)]
)
def test_steps_to_ninety_percent(returns, step):
    assert report.reaches(pd.Series(returns, index=[10, 20, 30, 40, 50])) == step


def test_area():
    """The mean height of a curve, also where evaluations lie unevenly."""
    assert report.area(pd.Series([0.0, 10.0, 10.0], index=[0, 10, 40])) == (50 + 300) / 40


# --- files ----------------------------------------------------------------------------------------


def test_minutes_without_pauses(tmp_path):
    """Two TensorBoard files of a run that was resumed an hour later at an earlier step."""
    from tensorboardX import SummaryWriter

    for start, steps in ((1_000_000.0, (10, 20, 30)), (1_003_600.0, (20, 30, 40))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.time", lambda: start)  # noqa: B023
            writer = SummaryWriter(str(tmp_path), filename_suffix=str(start))
            for i, step in enumerate(steps):
                writer.add_scalar("losses/qf_loss", 1.0, step - 5, walltime=start + 60 * i + 30)
                writer.add_scalar("eval/episodic_return", 1.0, step, walltime=start + 60 * (i + 1))
            writer.close()
    (tmp_path / "events.out.tfevents.9").write_bytes(b"\x09" + bytes(20))  # cut off
    expected = {10: 1, 20: 2, 30: 3, 40: 4}  # the second began at 10
    assert report.read_minutes(tmp_path).to_dict() == expected
    for file in tmp_path.glob("events*"):
        file.unlink()
    assert report.read_minutes(tmp_path).to_dict() == expected  # from wall.csv


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sac_dmc__cartpole-swingup__0/config.json": None}, "config.json is needed"),
        ({"sac_dmc__cartpole-swingup__0/config.json": "{"}, "config.json is needed"),
        ({"sac_dmc__cartpole-swingup__0/eval.csv": "step,return\n1,2\n"}, "the columns"),
        ({"sac_dmc__cartpole-swingup__0/eval.csv": ""}, "cannot be read"),
        ({"sac_dmc__cartpole-swingup__0/eval.csv": ",".join(report.COLUMNS) + "\n1,0,0,x,1\n"},
         "cannot be read"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, capsys, changes, message):
    """A sentence that names the file, and exit code 2."""
    curves = copy_of_data(tmp_path)
    for name, text in changes.items():
        (curves / name).unlink() if text is None else (curves / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main(args(tmp_path / "out", curves, figures=False))
    error = capsys.readouterr().err
    assert message in error and str(curves / next(iter(changes)).split("/")[0]) in error


def test_bad_results(tmp_path, capsys):
    """No such folder, none with runs, and a seed that is there twice."""
    (tmp_path / "empty").mkdir()
    for folder, message in (("nowhere", "not a directory"), ("empty", "no eval.csv below")):
        with pytest.raises(SystemExit, match="2"):
            report.main(args(tmp_path, tmp_path / folder))
        assert message in capsys.readouterr().err
    curves = copy_of_data(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report.main(args(tmp_path, curves, DATA / "curves"))
    assert "tell variants apart with --by" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        report.main(args(tmp_path, curves, by=("n_stepp",)))
    assert "--by n_stepp is not in config.json" in capsys.readouterr().err


def test_what_does_not_count(tmp_path):
    """Runs that the sweep set aside, and runs without an evaluation yet."""
    curves = copy_of_data(tmp_path)
    shutil.copytree(DATA / "curves", curves / "set_aside")
    new = shutil.copytree(curves / "sac_dmc__cartpole-swingup__0", curves / "sac_dmc__x__9")
    config = json.loads((new / "config.json").read_text())
    config["args"]["env_id"] = "dm_control/x-v0"
    (new / "config.json").write_text(json.dumps(config))
    (new / "eval.csv").write_text(",".join(report.COLUMNS) + "\n")
    report.main(args(tmp_path / "out", curves, figures=False))
    assert (tmp_path / "out" / "report.csv").read_bytes() == (DATA / "report.csv").read_bytes()


def test_names():
    """Scripts by their algorithm, variants by their experiment; the suite by its short ids."""
    names = {("sac_dmc", "dm_control/walker-walk-v0"): ("walker-walk", "SAC")}
    names |= {("td3_gym", "Hopper-v5"): ("Hopper-v5", "TD3")}
    names |= {("sac_dmc_n3", "walker-walk"): ("walker-walk", "sac_dmc_n3")}
    for (exp_name, env_id), expected in names.items():
        config = {"exp_name": exp_name, "env_id": env_id, "n_step": 3, "gamma": 0.9}
        assert report.name_of(config, by=()) == expected
        variant = (expected[0], f"{expected[1]}, n_step 3, gamma 0.9")
        assert report.name_of(config, by=("n_step", "gamma")) == variant
