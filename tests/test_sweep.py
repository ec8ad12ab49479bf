"""Sweeps finish what they began: after failures, Ctrl-C and the loss of a node, with equal results.

Where no learning is needed the script is fake_agent.py, whose returns depend on every step before.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

if sys.platform != "linux":
    pytest.skip("sweeps need Linux", allow_module_level=True)
sys.path.append(str(REPOSITORY / "benchmark"))
import sweep  # noqa: E402

SWEEP, FAKE = REPOSITORY / "benchmark" / "sweep.py", REPOSITORY / "tests" / "fake_agent.py"
needs_ray = pytest.mark.skipif(not sweep.ray, reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose first node has no core for runs; tests add others."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    yield cluster
    cluster.shutdown()


def start(results: Path, agent, env_ids, seeds, steps, *flags, **variables) -> subprocess.Popen:
    """The sweep's command in a process of its own; `flags` after -- go to the scripts."""
    command = [sys.executable, SWEEP, "--agents", agent, "--env-ids", *env_ids, "--seeds", *seeds]
    command += ["--total-timesteps", steps, "--results-dir", results, *flags]
    command = [str(x) for x in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Locks of cores go to TMPDIR: another sweep on this machine must not hold them.
    (results.parent / "locks").mkdir(exist_ok=True)
    variables |= {"TMPDIR": str(results.parent / "locks"), "RAY_TMPDIR": "/tmp"}
    return subprocess.Popen(command, env=os.environ | variables, cwd=results.parent, **pipes)


def wait_for(condition):
    """Returns once `condition()` is true."""
    end = time.time() + 400
    while not condition():
        assert time.time() < end, "it took too long"
        time.sleep(0.1)


def undisturbed(directory: Path, seed: int, steps: int) -> bytes:
    """The eval.csv of the fake agent, run without a sweep."""
    command = [sys.executable, FAKE, "--env-id", "well", "--seed", str(seed)]
    subprocess.run([*command, "--total-timesteps", str(steps), "--run-dir", directory], check=True)
    return (directory / "eval.csv").read_bytes()


def table(path: Path, run: str) -> list[dict]:
    """The lines of a run in runs.csv or wall.csv."""
    return [row for row in csv.DictReader(path.open()) if row["run"] == run]


# --- what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, period, repeat",
    [(100, 10, 1), (109, 10, 1), (100, 10, 4), (99, 10, 4), (101, 10, 8), (100, 0, 1), (5, 10, 1)],
)
def test_last_evaluation(total, period, repeat):
    """Against the loop and the condition of the scripts."""
    step, last = 0, 0
    while step < total:
        step += repeat
        last = step if period > 0 and step % period < repeat else last
    assert sweep.last_evaluation(total, {"eval_frequency": period, "action_repeat": repeat}) == last


def test_evaluated(tmp_path):
    """Only evaluations with all their episodes count; the last line may be cut off."""
    (tmp_path / "config.json").write_text('{"args": {"eval_episodes": 2}}')
    run, rows = sweep.Run(FAKE, tmp_path, 100, [], tmp_path, tmp_path), "step,seed,...\n"
    for more, step in (("", 0), ("10,0,0,1\n", 0), ("10,0,1,1\n", 10), ("20,0,0,1\n20,0,1,1", 10)):
        rows += more
        (tmp_path / "eval.csv").write_text(rows)
        assert sweep.evaluated(run) == step


def test_dry_run(tmp_path, monkeypatch, capsys):
    """The commands, to be pasted where the sweep was asked; nothing is run."""
    monkeypatch.chdir(Path(shutil.copy(FAKE, tmp_path)).parent)
    args = sweep.Args(("fake_agent.py",), ("well",), (3,), 250, Path("x"), dry_run=True)
    sweep.main(args, ["--x=1"])
    assert capsys.readouterr().out.strip() == (
        "python fake_agent.py --env-id well --seed 3 --x=1 --total-timesteps 250 "
        "--run-dir x/fake_agent__well__3"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({"agents": ("sac_dcm",)}, [], "neither a file nor one of mpo_dmc"),
        ({"seeds": (1, 1)}, [], "sac_dmc__well__1 twice"),
        ({}, ["--run-dir", "x"], "itself sets --run-dir"),
        ({"agents": ("sac_dmc", "td3_dmc")}, ["--exp-name=x"], "could not tell these agents apart"),
        ({}, ["--n-step", "3"], "made with n_step 1.0, not 3.0; give another --results-dir"),
        ({}, ["--no-layer-norm"], "made with layer_norm True, not False"),
        ({"dry_run": True}, ["--n-step=1", "--layer-norm", "--tau", "5e-3"], None),
    ],
)
def test_bad_usage(tmp_path, capsys, changes, flags, message):
    """One sentence before anything starts."""
    args = {"agents": ("sac_dmc",), "env_ids": ("well",), "seeds": (0,), "total_timesteps": 10}
    config = {"env_id": "well", "n_step": 1, "layer_norm": True, "tau": 0.005}
    there = tmp_path / "sac_dmc__well__0"
    there.mkdir()
    config |= {"eval_frequency": 5, "action_repeat": 1, "eval_episodes": 1}
    (there / "config.json").write_text(json.dumps({"args": config}))
    args = sweep.Args(**(args | {"results_dir": tmp_path} | changes))
    if message is None:
        return sweep.main(args, flags)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(args, flags)
    assert message in capsys.readouterr().err


@needs_ray
def test_no_cluster_and_no_ray(tmp_path, capsys, monkeypatch):
    """Nobody listens at the address; what to install."""
    args = sweep.Args(("sac_dmc",), ("x",), (0,), 10, tmp_path, address="127.0.0.1:1")
    for message in ("--address 127.0.0.1:1: ", "pip install -r benchmark/requirements.txt"):
        with pytest.raises(SystemExit, match="2"):
            sweep.main(args, [])
        assert message in capsys.readouterr().err
        monkeypatch.setattr(sweep, "ray", None)


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_real_script_goes_on(tmp_path, monkeypatch):
    """One command begins a run and goes on with it; the tables beside it say what made it."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    flags = "--hidden-width 16 --batch-size 8 --buffer-size 1000 --learning-starts 100"
    flags = [*flags.split(), "--eval-frequency", "200", "--eval-episodes", "1"]
    for steps, before in ((200, 0), (400, 200)):
        args = sweep.Args(("td3_dmc",), ("pendulum-swingup",), (0,), steps, tmp_path / "results")
        (run,) = sweep.make_runs(args, flags)
        assert sweep.evaluated(run) == before and not sweep.is_finished(run)
        assert sweep.run_script(run, {}, 0) is None
        assert sweep.is_finished(run)
    attempts = table(tmp_path / "results" / "runs.csv", run.directory.name)
    wall = table(tmp_path / "results" / "wall.csv", run.directory.name)
    assert [int(row["global_step"]) for row in wall] == [200, 400] and len(attempts) == 2
    digest = hashlib.sha256((REPOSITORY / "agents" / "td3_dmc.py").read_bytes()).hexdigest()
    assert {row["sha256"] for row in attempts} == {digest}
    assert "jax " in attempts[0]["versions"] and "cores" in attempts[0]["machine"]
    assert len(attempts[0]["commit"].removesuffix("-dirty")) == 40


@needs_ray
def test_failures_and_leftovers(tmp_path):
    """Retries what may get better, reports what does not, goes on where a run stopped."""
    results = tmp_path / "results"
    expected = [undisturbed(tmp_path / str(seed), seed, 100) for seed in range(2)]
    undisturbed(results / "fake_agent__well__1", 1, 60)  # began with fewer steps
    tasks = ["well", "breaks-once", "breaks", "refuses"]
    process = start(results, FAKE, tasks, [0, 1], 100, PYTHONPATH="relative/path")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    assert "\n4 of 8 runs failed.\n" in output
    assert output.count("exit code 1.") == output.count("exit code 2.") == 2
    assert "--env-id refuses is not a task.\n" in output
    for seed in range(2):
        for env_id, attempts in (("well", 1), ("breaks-once", 2), ("breaks", 4), ("refuses", 1)):
            run = results / f"fake_agent__{env_id}__{seed}"
            log = (results / "logs" / f"{run.name}.log").read_text()
            assert log.count("$ ") == len(table(results / "runs.csv", run.name)) == attempts
            if env_id in ("well", "breaks-once"):
                assert (run / "eval.csv").read_bytes() == expected[seed]
                config = json.loads((run / "config.json").read_text())["args"]
                assert len(config["cores"]) == 1 and config["pythonpath"] == "relative/path"
                assert config["run_dir"] == f"results/{run.name}"
                assert table(results / "wall.csv", run.name)[-1]["global_step"] == "100"

    again = start(results, FAKE, ["well"], [0, 1], 100)
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and "2 runs" in output and "0 to do" in output


@needs_ray
def test_interrupted(cluster, tmp_path):
    """Ctrl-C lets the scripts write their checkpoints; the same command goes on from them."""
    node = cluster.add_node(num_cpus=1)
    results = tmp_path / "results"
    options = (["well"], [0, 1], 200, "--address", cluster.address, "--", "--step-seconds", 0.02)
    process = start(results, FAKE, *options)
    wait_for(lambda: any(results.glob("*/eval.csv")) and not time.sleep(1))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130 and "goes on from the checkpoints" in output, output
    states = list(results.glob("*/checkpoint/state.json"))
    assert len(states) == 1  # the node has one core
    assert 0 < json.loads(states[0].read_text())["step"] < 200
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(b"fake_agent__well__0" in x for x in processes)
    process = start(results, FAKE, *options)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    for seed in (0, 1):
        expected = undisturbed(tmp_path / str(seed), seed, 200)
        assert (results / f"fake_agent__well__{seed}" / "eval.csv").read_bytes() == expected
    cluster.remove_node(node)


@needs_ray
def test_lost_node(cluster, tmp_path):
    """A node is removed in the middle of its run: another finishes it, with equal results."""
    node, results = cluster.add_node(num_cpus=1), tmp_path / "results"
    options = ("--address", cluster.address, "--", "--step-seconds", 0.05)
    process = start(results, FAKE, ["well"], [0], 200, *options)
    wait_for(lambda: any(results.glob("*/checkpoint/state.json")))
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    run = results / "fake_agent__well__0"
    assert (run / "eval.csv").read_bytes() == undisturbed(tmp_path / "0", 0, 200)
    assert len(table(results / "runs.csv", run.name)) == 2
