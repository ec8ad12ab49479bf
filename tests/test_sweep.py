"""Sweeps finish what they began: after failures, Ctrl-C and the loss of a node."""

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
from running import exits

if sys.platform != "linux":
    pytest.skip("sweeps need Linux", allow_module_level=True)
sys.path.append(str(REPOSITORY / "benchmark"))
import sweep  # noqa: E402

SWEEP, FAKE = REPOSITORY / "benchmark" / "sweep.py", REPOSITORY / "tests" / "fake_agent.py"
needs_ray = pytest.mark.skipif(not sweep.ray, reason="Ray is not installed")


def start(results: Path, env_ids, seeds, steps, *flags, **variables) -> subprocess.Popen:
    """The sweep's command in a process of its own; `flags` after -- go to the scripts."""
    command = [sys.executable, SWEEP, "--agents", FAKE, "--env-ids", *env_ids, "--seeds", *seeds]
    command += ["--total-timesteps", steps, "--results-dir", results, *flags]
    # Locks of cores go to TMPDIR: another sweep on this machine must not hold them.
    variables = os.environ | variables | {"TMPDIR": str(results.parent), "RAY_TMPDIR": "/tmp"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, command)], env=variables, cwd=results.parent, **pipes)


def undisturbed(directory: Path, seed: int, steps: int) -> bytes:
    command = f"--env-id well --seed {seed} --total-timesteps {steps} --run-dir".split()
    subprocess.run([sys.executable, FAKE, *command, directory], check=True)
    return (directory / "eval.csv").read_bytes()


def table(path: Path, run: str) -> list[dict]:
    return [row for row in csv.DictReader(path.open()) if row["run"] == run]


@pytest.mark.parametrize("total, period", [(100, 10), (109, 10), (101, 8), (100, 0), (5, 10)])
@pytest.mark.parametrize("repeat", [1, 4])
def test_last_evaluation(total, period, repeat):
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
    expected = "--env-id well --seed 3 --x=1 --total-timesteps 250 --run-dir x/fake_agent__well__3"
    assert capsys.readouterr().out.strip() == f"python fake_agent.py {expected}"
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
    ],
)
def test_bad_usage(tmp_path, capsys, changes, flags, message):
    args = {"agents": ("sac_dmc",), "env_ids": ("well",), "seeds": (0,), "total_timesteps": 10}
    config = {"env_id": "well", "n_step": 1, "layer_norm": True, "tau": 0.005}
    (tmp_path / "sac_dmc__well__0").mkdir()
    (tmp_path / "sac_dmc__well__0" / "config.json").write_text(json.dumps({"args": config}))
    args = sweep.Args(**args | {"results_dir": tmp_path} | changes)
    code, said = exits(capsys, sweep.make_runs, args, flags)
    assert code == 2 and message in said
    assert not sweep.contradiction(config, ["--n-step=1", "--layer-norm", "--tau", "5e-3"])


def test_no_ray(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "ray", None)
    args = sweep.Args(("sac_dmc",), ("x",), (0,), 10, tmp_path)
    code, said = exits(capsys, sweep.main, args, [])
    assert code == 2 and "pip install -r benchmark/requirements.txt" in said


def test_a_real_script_goes_on(tmp_path, monkeypatch):
    """A copy under another name: one command begins and goes on; what made it is written down."""
    script = shutil.copy(REPOSITORY / "agents" / "td3_dmc.py", tmp_path / "td3copy_dmc.py")
    monkeypatch.chdir(tmp_path)
    flags = "--hidden-width 16 --batch-size 8 --buffer-size 1000 --learning-starts 100"
    flags = [*flags.split(), "--eval-frequency", "200", "--eval-episodes", "1"]
    for steps, before in ((200, 0), (400, 200)):
        args = sweep.Args((str(script),), ("pendulum-swingup",), (0,), steps, Path("results"))
        (run,) = sweep.make_runs(args, flags)
        assert sweep.evaluated(run) == before and not sweep.is_finished(run)
        assert sweep.run_script(run, {}, 0) is None and sweep.is_finished(run)
    assert sweep.read_config(run.directory)["exp_name"] == "td3copy_dmc"
    files = (run.directory.parent / x for x in ("wall.csv", "runs.csv"))
    wall, attempts = (table(file, "td3copy_dmc__pendulum-swingup__0") for file in files)
    assert [row["global_step"] for row in wall] == ["200", "400"] and len(attempts) == 2
    assert {x["sha256"] for x in attempts} == {hashlib.sha256(script.read_bytes()).hexdigest()}
    assert "jax " in attempts[0]["versions"] and "cores" in attempts[0]["machine"]


@needs_ray
def test_failures_and_leftovers(tmp_path):
    """Retries what may get better, reports what does not, goes on where a run stopped."""
    results = tmp_path / "results"
    expected = [undisturbed(tmp_path / str(seed), seed, 100) for seed in range(2)]
    undisturbed(results / "fake_agent__well__1", 1, 60)  # began with fewer steps
    tasks = ["well", "breaks-once", "breaks", "refuses"]
    process = start(results, tasks, [0, 1], 100, PYTHONPATH="relative/path")
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

    again = start(results, ["well"], [0, 1], 100)
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and "2 runs" in output and "0 to do" in output


@needs_ray
def test_interrupted_and_lost(tmp_path):
    """Ctrl-C lets scripts write checkpoints, the same command goes on; then a node is lost."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 1024**2}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell script starts with &
    cluster, results = Cluster(initialize_head=True, head_node_args=options), tmp_path / "results"
    node = cluster.add_node(num_cpus=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = (["well"], [0, 1], 200, "--address", cluster.address, "--", "--step-seconds", 0.05)
    process = start(results, *options)
    while not any(results.glob("*/eval.csv")) and process.poll() is None:
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130 and "goes on from the checkpoints" in output, output
    (state,) = results.glob("*/checkpoint/state.json")  # of one run, as the node has one core
    assert 0 < json.loads(state.read_text())["step"] < 200
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(state.parents[1].name.encode() in x for x in processes)

    process = start(results, *options)
    while (results / "runs.csv").read_text().count("\n") < 3 and process.poll() is None:
        time.sleep(1)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    output, _ = process.communicate(timeout=400)
    cluster.shutdown()
    assert process.returncode == 0, output
    for seed in (0, 1):
        expected = undisturbed(tmp_path / str(seed), seed, 200)
        assert (results / f"fake_agent__well__{seed}" / "eval.csv").read_bytes() == expected
    assert (results / "runs.csv").read_text().count("\n") == 1 + 4
