"""A run that is stopped in any way goes on as if nothing had happened, to the last bit."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import pytest
from conftest import REPOSITORY, small_args
from dm_control import suite
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Contacts, early terminations and physics whose derived quantities lag behind; seeds and task.
HARD = {
    "dmc": [("humanoid-walk", 1), ("quadruped-walk", 2)],
    "gym": [("Hopper-v5", 2), ("Humanoid-v5", 1)],
}
EASY = {"dmc": "cartpole-swingup", "gym": "Pendulum-v1"}
SUITE_TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
GYM_IDS = [
    env_id
    for env_id, spec in gym.registry.items()
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco") and env_id.endswith("-v5")
]


@pytest.fixture(autouse=True)
def without_key_checks():
    """Thousands of steps take twice the time with them; test_runs.py has them on."""
    jax.config.update("jax_debug_key_reuse", False)
    yield
    jax.config.update("jax_debug_key_reuse", True)


def flags(script, run_dir: Path, **changes):
    """3,000 steps of which the first 500 are random, with small networks."""
    return small_args(script, **dict(
        env_id=EASY[script.backend], run_dir=str(run_dir), total_timesteps=3000, hidden_width=16,
        buffer_size=2000, learning_starts=500, log_frequency=300, eval_frequency=1000,
        eval_max_steps=50, checkpoint_frequency=400,
    ) | changes)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script sees it."""


def kill_at(script, step: int, patch):
    """Lets the training's environments raise Killed at a step; evaluations have other ones."""
    original, calls = script.insert, iter(range(1, step + 1))

    def insert(*args):
        if next(calls) == step:
            raise Killed
        return original(*args)

    patch.setattr(script, "insert", insert)


def run(script, args, killed_at: int | None = None):
    with pytest.MonkeyPatch.context() as patch:
        if killed_at is None:
            return script.main(args)
        kill_at(script, killed_at, patch)
        with pytest.raises(Killed):
            script.main(args)


def resume(script, run_dir: Path, *more: str):
    """`python SCRIPT --resume RUN_DIR`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir), *more])
        script.main(script.flags())


def newest(run_dir: Path) -> dict[str, np.ndarray]:
    paths = sorted((run_dir / "checkpoint").glob("*.npz"), key=lambda path: int(path.stem))
    with np.load(paths[-1]) as file:
        return {name: file[name] for name in file.files if not name.startswith("sizes/")}


def scalars(run_dir: Path) -> dict[str, list]:
    """Steps and values of every tag, but for the speed."""
    found = {}
    for folder in {path.parent for path in run_dir.rglob("events.*")}:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag != "charts/SPS":
                name = f"{folder.relative_to(run_dir)}/{tag}"
                found[name] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def assert_same_run(a: Path, b: Path):
    """Networks, moments, optimisers, keys, buffers, metrics, evaluations, TensorBoard, policy."""
    ours, theirs = newest(a), newest(b)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)
    assert (a / "eval.csv").read_bytes() == (b / "eval.csv").read_bytes()
    assert scalars(a) == scalars(b) != {}
    with np.load(a / "policy.npz") as ours, np.load(b / "policy.npz") as theirs:
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


# --- to the last bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [0, 1])
def test_killed_run_goes_on_exactly(script, hard, tmp_path):
    """Killed twice, the second time before a new checkpoint; files have what was logged once."""
    env_id, num_seeds = HARD[script.backend][hard]
    changes = dict(env_id=env_id, num_seeds=num_seeds)
    run(script, flags(script, tmp_path / "whole", **changes))
    run(script, flags(script, tmp_path / "killed", **changes), killed_at=1700)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(script, 150, patch)  # steps after the checkpoint at 1600
        with pytest.raises(Killed):
            resume(script, tmp_path / "killed")
    resume(script, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_raised_total(script, tmp_path):
    """A run made longer is the longer run, though its buffer has to grow."""
    changes = dict(buffer_size=5000, learning_starts=250)
    run(script, flags(script, tmp_path / "long", total_timesteps=700, **changes))
    run(script, flags(script, tmp_path / "short", total_timesteps=450, **changes))
    resume(script, tmp_path / "short", "--total-timesteps", "0.7e3")
    assert_same_run(tmp_path / "long", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["args"]["total_timesteps"] == 700 and len(config["resumed"]) == 1


def test_checkpoints_change_nothing(script, tmp_path):
    """However often they are written; without any there is still a policy."""
    run(script, flags(script, tmp_path / "often", total_timesteps=800, checkpoint_frequency=50))
    run(script, flags(script, tmp_path / "never", total_timesteps=800, checkpoint_frequency=0))
    assert not (tmp_path / "never" / "checkpoint").exists()
    assert scalars(tmp_path / "often") == scalars(tmp_path / "never")
    with np.load(tmp_path / "often/policy.npz") as a, np.load(tmp_path / "never/policy.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def check_replay(script, env_id: str):
    """In the middle of a second episode; where the first one ended must not matter."""
    args, rng = small_args(script, env_id=env_id), np.random.default_rng(0)
    envs, again = script.Environments(args, [3, 4]), script.Environments(args, [3, 4])
    envs.reset_all()
    actions = rng.uniform(-1, 1, (3, 15, 2, envs.action_dim)).astype(np.float32)
    for action in actions[0]:
        envs.step(action)
    envs.reset(1)
    for action in actions[1]:
        obs, _, terminated, truncated = envs.step(action)
        for i in np.flatnonzero(terminated | truncated):
            obs[i] = envs.reset(i)
    performed = [np.reshape(x, (-1, envs.action_dim)) for x in envs.actions]
    np.testing.assert_array_equal(again.replay(envs.episodes.copy(), performed), obs)
    for action in actions[2]:
        for x, y in zip(envs.step(action), again.step(action)):
            np.testing.assert_array_equal(x, y)


@pytest.mark.algorithms("sac")
@pytest.mark.backends("dmc")
@pytest.mark.parametrize("task", SUITE_TASKS)
def test_replay_on_the_suite(script, task):
    check_replay(script, task)


@pytest.mark.algorithms("sac")
@pytest.mark.backends("gym")
@pytest.mark.parametrize("env_id", [*GYM_IDS, "Pendulum-v1", "MountainCarContinuous-v0"])
def test_replay_on_gymnasium(script, env_id):
    check_replay(script, env_id)


class Forgetful(gym.Env):
    """Random in a way that no seed determines."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return np.random.default_rng().uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


@pytest.mark.algorithms("td3")
@pytest.mark.backends("gym")
def test_environment_that_does_not_repeat(script, tmp_path, monkeypatch, capsys):
    """Goes on with a new episode, and says so."""
    spec = gym.envs.registration.EnvSpec("Forgetful-v0", Forgetful, max_episode_steps=70)
    monkeypatch.setitem(gym.registry, "Forgetful-v0", spec)
    changes = dict(env_id="Forgetful-v0", total_timesteps=100, learning_starts=80, eval_frequency=0)
    run(script, flags(script, tmp_path / "a", **changes))
    resume(script, tmp_path / "a", "--total-timesteps", "200")
    assert "Forgetful-v0 does not repeat an episode: seed 0 begins" in capsys.readouterr().out


# --- signals --------------------------------------------------------------------------------------


def command(script, run_dir: Path, *more: str) -> list[str]:
    """The shell's words for a run that takes a while, with small networks."""
    words = f"--env-id {EASY[script.backend]} --run-dir {run_dir} --learning-starts 100"
    words += " --hidden-width 16 --batch-size 8 --eval-frequency 200 --eval-episodes 1"
    words += " --eval-max-steps 20 --checkpoint-frequency 250 --total-timesteps 1500"
    return [sys.executable, script.__file__, *words.split(), *more]


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.algorithms("sac")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal(script, number, tmp_path):
    """The run saves itself, prints the command that resumes it, and that command completes it."""
    process = start(command(script, tmp_path / "stopped"))
    assert process.stdout.readline().startswith("step 200:")
    assert process.stdout.readline().startswith("step 400:")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    words = [sys.executable, script.__file__, "--resume", str(tmp_path / "stopped")]
    if number == signal.SIGKILL:
        assert process.returncode == -number and errors == ""
    else:
        assert process.returncode == 128 + number and errors.count("\n") == 1
        assert errors.startswith("Stopped at step ") and " ".join(words[1:]) in errors
    resumed = start(words)
    output, errors = resumed.communicate(timeout=300)
    assert (resumed.returncode, errors) == (0, "")
    assert output.startswith("Going on at step ") and "step 1400" in output
    whole = start(command(script, tmp_path / "whole"))
    whole.communicate(timeout=300)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.algorithms("td3")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once(script, number):
    before = signal.getsignal(number)
    with script.signals() as received:
        signal.raise_signal(number)
        assert received == [number] and signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


# --- damaged and refused --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory):
    """`stopped_runs(script)` is the directory of a run of 800 steps, saved at 400 and 800."""
    made = {}

    def stopped(script) -> Path:
        if script.__name__ not in made:
            made[script.__name__] = tmp_path_factory.mktemp("stopped") / "run"
            args = flags(script, made[script.__name__], total_timesteps=800, eval_frequency=400)
            run(script, args)
        return made[script.__name__]

    return stopped


@pytest.fixture
def stopped(script, stopped_runs, tmp_path) -> Path:
    """A copy of such a run."""
    return Path(shutil.copytree(stopped_runs(script), tmp_path / "run"))


def flip_bit(path: Path, place: float):
    """Turns a bit over, at this part of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious-code-was-run",)


def rewrite(path: Path, **changes):
    """Replaces arrays of a checkpoint; in names, __ stands for /."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= {name.replace("__", "/"): x for name, x in changes.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "bit 10 %": lambda path: flip_bit(path, 0.1),
    "bit 50 %": lambda path: flip_bit(path, 0.5),
    "bit 90 %": lambda path: flip_bit(path, 0.9),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "object": lambda path: rewrite(path, state__step=np.array([Malicious()], object)),
    "shape": lambda path: rewrite(path, state__step=np.zeros((2, 1), np.int32)),
    "dtype": lambda path: rewrite(path, state__step=np.zeros(1)),
    "rows": lambda path: rewrite(path, buffer__rows=np.zeros((1, 3, 4), np.float32)),
    "other": lambda path: path.write_text("something else"),
}


@pytest.mark.algorithms("td3")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(script, damage, stopped, tmp_path, monkeypatch, capsys):
    """A sentence about it, and the one before leads to the same end; nothing in it is executed."""
    monkeypatch.chdir(tmp_path)
    run(script, flags(script, tmp_path / "whole", total_timesteps=900, eval_frequency=400))
    DAMAGES[damage](stopped / "checkpoint" / "800.npz")
    resume(script, stopped, "--total-timesteps", "900")
    output, errors = capsys.readouterr()
    assert "Going on at step 400 of 900" in output
    assert "800.npz is damaged and passed over" in errors and errors.count("\n") == 1
    assert not Path("malicious-code-was-run").exists()
    assert (stopped / "checkpoint" / "800.damaged").exists(), "it would count as one of the two"
    assert_same_run(tmp_path / "whole", stopped)


def refused(script, capsys, *words: str, **more):
    """`python SCRIPT WORDS` ends with one sentence, which is returned, and code 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script.__file__, *words])
        script.main(script.flags())
    message = capsys.readouterr().err
    assert end.value.code == 2
    return message


@pytest.mark.algorithms("td3")
def test_no_checkpoint(script, stopped, tmp_path, capsys):
    for path in (stopped / "checkpoint").iterdir():
        DAMAGES["cut"](path)
    message = refused(script, capsys, "--resume", str(stopped), "--total-timesteps", "900")
    assert message.count("is damaged and passed over") == 2
    assert "has no checkpoint to go on from" in message
    log = (stopped / "eval.csv").read_bytes()
    assert log.count(b"\n") == 1 + 2 * 2, "what was logged is still there"


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_flags_that_disagree(script, flag, stopped, capsys):
    """Both values are named; the value that the run has may be given again."""
    for words, values in {
        "--gamma 0.9": "--gamma 0.9 disagrees with the run, which has 0.99",
        "--seed 3": "--seed 3 disagrees with the run, which has 0",
        "--hidden-width 16 --no-layer-norm": "--layer-norm False disagrees",
        "--env-id walker-walk": f"the run, which has {EASY[script.backend]}",
        "--total-timesteps 799": "--total-timesteps 799",
    }.items():
        message = refused(script, capsys, f"--{flag}", str(stopped), *words.split())
        assert values in message and message.count("\n") == 1


@pytest.mark.algorithms("td3", "mpo")
def test_not_a_run(script, stopped, tmp_path, capsys):
    for content in (None, "", "[]", '{"args": {"no_such_flag": 1}}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        message = refused(script, capsys, "--resume", str(tmp_path))
        assert str(tmp_path) in message and message.count("\n") == 1
    assert "one of" in refused(script, capsys, "--resume", "a", "--evaluate", "b")


# --- nothing else may be lost ---------------------------------------------------------------------


@pytest.mark.algorithms("td3")
def test_killed_while_writing(script, tmp_path, monkeypatch):
    """Half a file never takes the place of a checkpoint."""
    run_dir, savez, done = tmp_path / "killed", np.savez, []

    def half(file, **arrays):
        savez(file, **arrays)
        done.append(None)
        if len(done) == 6:  # a policy and a checkpoint each time
            file.truncate(file.tell() // 2)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(Killed):
            script.main(flags(script, run_dir))
    assert {x.name for x in (run_dir / "checkpoint").iterdir()} == {
        "400.npz",
        "800.npz",
        "1200.part",
    }
    resume(script, run_dir)
    run(script, flags(script, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", run_dir)
    assert {x.name for x in (run_dir / "checkpoint").iterdir()} == {"2800.npz", "3000.npz"}


@pytest.mark.algorithms("td3")
def test_full_disk(script, tmp_path):
    """On a file system of 600 kB: checkpoints stop with a sentence, and an earlier one resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        process = start(command(script, disk / "run", "--hidden-width", "64"))
        _, errors = process.communicate(timeout=300)
        assert process.returncode in (0, 1) and "Traceback" not in errors
        assert "No space left on device" in errors
        saved = tmp_path / "run"
        shutil.copytree(disk / "run", saved)
        assert list((saved / "checkpoint").glob("*.npz")), "one that fitted"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    resume(script, saved)
    process = start(command(script, tmp_path / "whole", "--hidden-width", "64"))
    process.communicate(timeout=300)
    assert_same_run(tmp_path / "whole", saved)


# --- what one takes along -------------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [2, 3])
def test_evaluate(script, episodes, stopped, capsys):
    """The episodes that eval.csv has for the step of the checkpoint, and more if asked for.

    With more of them products have other shapes, so that they may differ in the last digits.
    """
    capsys.readouterr()
    words = ["--evaluate", str(stopped), "--eval-episodes", str(episodes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *words])
        script.main(script.flags())
    rows = capsys.readouterr().out.splitlines()
    header, *logged = (stopped / "eval.csv").read_text().splitlines()
    logged = [row for row in logged if row.startswith("800,")]
    assert rows[0] == header and len(rows) == 1 + episodes
    if episodes == 2:
        assert rows[1:] == logged
    numbers = [[[float(x) for x in row.split(",")] for row in part] for part in (rows[1:3], logged)]
    np.testing.assert_allclose(*numbers, rtol=1e-4)


def readme_function() -> str:
    """The block of README.md that reads policy.npz."""
    blocks = (REPOSITORY / "README.md").read_text().split("```")
    (block,) = [x for x in blocks if x.startswith("python") and "policy.npz" in x]
    return block.removeprefix("python\n")


def test_policy_with_numpy_alone(script, stopped, tmp_path):
    """The README's function, without JAX, does what `act` does, in the environment's units."""
    args = script.Args(**json.loads((stopped / "config.json").read_text())["args"])
    envs = script.Environments(args, [0])
    state = script.init(np.array([0]), envs.obs_dim, envs.action_dim, args)
    _, state, *_ = script.load(stopped, state)
    obs = np.random.default_rng(0).normal(0, 3, (100, envs.obs_dim)).astype(np.float32)
    action = np.asarray(script.act(state, obs[None], args))[0]
    native = envs.low + (action + 1) * (envs.high - envs.low) / 2
    assert np.ptp(native, axis=0).min() > 1e-3
    np.save(tmp_path / "obs.npy", obs)
    code = "import sys\nsys.modules['jax'] = None\n" + readme_function()
    code += "\nnp.save('action.npy', [greedy_action(policy, x) for x in np.load('obs.npy')])"
    assert len([x for x in readme_function().splitlines() if x.strip()]) <= 18
    shutil.copy(stopped / "policy.npz", tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "action.npy"), native, rtol=1e-5, atol=1e-5)


@pytest.mark.algorithms("mpo")
def test_policy_has_every_seed(script, tmp_path):
    run(script, flags(script, tmp_path / "run", total_timesteps=600, num_seeds=3))
    with np.load(tmp_path / "run" / "policy.npz") as policy:
        assert len(policy["kernel_0"]) == len(policy["obs_mean"]) == 3
