"""Sweeps finish what they began: after failures, Ctrl-C and the loss of a node, with equal results.

Where no learning is needed the script is fake_agent.py, whose returns depend on every step before.
"""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

if sys.platform != "linux" or not importlib.util.find_spec("ray"):
    pytest.skip("sweeps need Linux and Ray (pip install ray)", allow_module_level=True)
sys.path.append(str(REPOSITORY / "benchmark"))
import sweep  # noqa: E402

SWEEP, FAKE = REPOSITORY / "benchmark" / "sweep.py", REPOSITORY / "tests" / "fake_agent.py"


@pytest.fixture(autouse=True, scope="module")
def compilations(tmp_path_factory):
    """What one script has compiled serves the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def cluster():
    """A node of one core, to which tests may add others."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


def start(results: Path, agent, env_ids, seeds, steps, *flags) -> subprocess.Popen:
    """The sweep's command in a process of its own; `flags` after -- go to the scripts."""
    command = [sys.executable, SWEEP, "--agents", agent, "--env-ids", *env_ids, "--seeds", *seeds]
    command += ["--total-timesteps", steps, "--results-dir", results, *flags]
    command = [str(x) for x in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Locks of cores go to TMPDIR: another sweep on this machine must not hold them.
    (results.parent / "locks").mkdir(exist_ok=True)
    variables = {"TMPDIR": str(results.parent / "locks"), "RAY_TMPDIR": "/tmp"}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def wait_for(condition, seconds: float = 200):
    """Returns once `condition()` is true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it took too long"
        time.sleep(0.1)


def undisturbed(directory: Path, seed: int, steps: int) -> bytes:
    """The eval.csv of the fake agent, run without a sweep."""
    command = [sys.executable, FAKE, "--env-id", "well", "--seed", str(seed)]
    subprocess.run([*command, "--total-timesteps", str(steps), "--run-dir", directory], check=True)
    return (directory / "eval.csv").read_bytes()


def is_running(directory: Path) -> bool:
    """Whether some process has the run directory among its arguments."""
    arguments = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    return any(str(directory).encode() in x.split(b"\0") for x in arguments)


# --- what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, period, repeat, last",
    [(100, 10, 1, 100), (109, 10, 1, 100), (100, 10, 4, 100), (99, 10, 4, 92), (101, 10, 8, 96)],
)
def test_last_evaluation(total, period, repeat, last):
    """Against the script's own condition at every step."""
    config = {"eval_frequency": period, "action_repeat": repeat}
    evaluations = [s for s in range(repeat, total + 1, repeat) if s % period < repeat]
    assert sweep.last_evaluation(total, config) == evaluations[-1] == last


@pytest.mark.parametrize(
    "rows, step",
    [
        ("", 0),
        ("10,0,0,1.5,9\n10,0,1,1.5,9\n", 10),
        ("10,0,0,1.5,9\n10,0,1,1.5,9\n20,0,0,1.5,9\n", 10),
        ("10,0,0,1.5,9\n10,0,1,1.5,9\n20,0,0,1.5,9\n20,0,1,1", 10),  # cut off in the last number
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_evaluated(tmp_path, rows, step, compressed):
    """Only evaluations with all their episodes count."""
    name, open_ = ("eval.csv.gz", gzip.open) if compressed else ("eval.csv", open)
    with open_(tmp_path / name, "wt") as file:
        file.write("global_step,seed,episode,return,length\n" + rows)
    assert sweep.evaluated(tmp_path, {"num_seeds": 1, "eval_episodes": 2}) == step


def test_dry_run(tmp_path):
    """The commands, to be pasted in the repository's folder; nothing is run."""
    output, _ = start(
        tmp_path / "x", "sac_dmc", ["walker-walk"], [3], "2.5e2", "--dry-run", "--", "--tau", 0.01
    ).communicate()
    assert output == (
        "# start sac_dmc__walker-walk__3\npython agents/sac_dmc.py --env-id walker-walk --seed 3 "
        f"--tau 0.01 --total-timesteps 250 --run-dir {tmp_path}/x/sac_dmc__walker-walk__3\n"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({"agents": ("sac_dcm",)}, [], "near are sac_dmc"),
        ({"seeds": (1, 1)}, [], "sac_dmc__well__1 twice"),
        ({}, ["--run-dir", "x"], "itself sets --run-dir"),
        ({}, ["--n-step", "3"], "made with n_step 1, not 3; give another --results-dir"),
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
    config |= {"eval_frequency": 5, "action_repeat": 1, "num_seeds": 1, "eval_episodes": 1}
    (there / "config.json").write_text(json.dumps({"args": config}))
    args = sweep.Args(**(args | {"results_dir": tmp_path} | changes))
    if message is None:
        return sweep.main(args, flags)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(args, flags)
    assert message in capsys.readouterr().err


def test_no_cluster(tmp_path, capsys):
    """Nobody listens at the address."""
    args = sweep.Args(("sac_dmc",), ("x",), (0,), 10, tmp_path, address="127.0.0.1:1")
    with pytest.raises(SystemExit, match="2"):
        sweep.main(args, [])
    assert "--address 127.0.0.1:1: " in capsys.readouterr().err


# --- sweeps ---------------------------------------------------------------------------------------


def test_failures_and_leftovers(tmp_path):
    """Retries what may get better, reports what does not, goes on where a run stopped."""
    results = tmp_path / "results"
    expected = {seed: undisturbed(tmp_path / str(seed), seed, 100) for seed in range(3)}
    undisturbed(results / "fake_agent__well__1", 1, 60)  # began with fewer steps
    undisturbed(results / "fake_agent__well__2", 2, 60)
    (results / "fake_agent__well__2" / "checkpoint" / "state.json").write_text("{")
    process = start(results, FAKE, ["well", "breaks-once", "breaks", "refuses"], [0, 1, 2], 100)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    assert "\n6 of 12 runs failed.\n" in output
    assert output.count("exit code 1.") == output.count("exit code 2.") == 3
    assert "--env-id refuses is not a task.\n" in output
    for seed in range(3):
        for env_id in ("well", "breaks-once"):
            run = results / f"fake_agent__{env_id}__{seed}"
            assert (run / "eval.csv").read_bytes() == expected[seed]
            assert len(json.loads((run / "config.json").read_text())["args"]["cores"]) == 1 or (
                run.name == "fake_agent__well__1"  # began without the sweep
            )
        logs = {x: results / "logs" / f"fake_agent__{x}__{seed}.log" for x in ("breaks", "refuses")}
        assert logs["breaks"].read_text().count("$ ") == 1 + 3
        assert logs["refuses"].read_text().count("$ ") == 1
    (aside,) = (results / "set_aside").iterdir()
    assert aside.name.startswith("fake_agent__well__2") and (aside / "eval.csv").exists()

    again = start(results, FAKE, ["well"], [0, 1, 2], 100)
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and "3 runs" in output and "0 to do" in output


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(cluster, tmp_path, number, code):
    """Ctrl-C lets the scripts write their checkpoints; the same command goes on from them."""
    options = (["well"], [0, 1], 200, "--address", cluster.address, "--", "--step-seconds", 0.02)
    run = tmp_path / "fake_agent__well__0"
    process = start(tmp_path, FAKE, *options)
    wait_for(lambda: any(tmp_path.glob("*/eval.csv")) and not time.sleep(1))
    process.send_signal(number)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code and "goes on from the checkpoints" in output, output
    states = list(tmp_path.glob("*/checkpoint/state.json"))
    assert len(states) == 1 and not is_running(run)  # the node has one core
    assert 0 < json.loads(states[0].read_text())["step"] < 200
    if number == signal.SIGINT:
        process = start(tmp_path, FAKE, *options)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        for seed in (0, 1):
            expected = undisturbed(tmp_path / str(seed), seed, 200)
            assert (tmp_path / f"fake_agent__well__{seed}/eval.csv").read_bytes() == expected


def test_lost_node(cluster, tmp_path):
    """A node is removed in the middle of its run: the other one finishes it, with equal results."""
    script, task = REPOSITORY / "agents" / "sac_dmc.py", "cartpole-swingup"
    small = "--hidden-width 16 --batch-size 8 --learning-starts 100 --checkpoint-frequency 300"
    small += " --eval-frequency 1000 --eval-episodes 2 --eval-max-steps 50"
    steps, results = 6_000, tmp_path / "results"
    undisturbed = [
        subprocess.Popen(
            [sys.executable, script, "--env-id", task, "--seed", str(seed), *small.split()]
            + ["--total-timesteps", str(steps), "--run-dir", tmp_path / str(seed)]
        )
        for seed in (0, 1)
    ]
    assert [process.wait(400) for process in undisturbed] == [0, 0]

    node = cluster.add_node(num_cpus=1)
    options = ("--address", cluster.address, "--", *small.split())
    process = start(results, "sac_dmc", [task], [0, 1], steps, *options)
    wait_for(lambda: len({path.parent for path in results.glob("*/checkpoint/*.npz")}) == 2, 400)
    cluster.remove_node(node, allow_graceful=False)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    for seed in (0, 1):
        expected = (tmp_path / str(seed) / "eval.csv").read_bytes()
        assert expected.count(b"\n") == 1 + 6 * 2
        assert (results / f"sac_dmc__{task}__{seed}" / "eval.csv").read_bytes() == expected
    logs = "".join(path.read_text() for path in (results / "logs").iterdir())
    assert logs.count("$ ") == 3 and logs.count("--resume") == logs.count("Going on at step") == 1
