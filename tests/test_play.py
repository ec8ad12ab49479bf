"""agents/play.py repeats the evaluations of a run; and the documents name flags that exist."""

import csv
import re
import shutil
import sys

import numpy as np
import pytest
import running
from conftest import REPOSITORY, load, small_args
from moviepy import VideoFileClip

AGENTS = REPOSITORY / "agents"
sys.path.append(str(AGENTS))
import play  # noqa: E402

RUNS = {  # actions that tanh squashes, and clipped ones
    "sac_dmc": dict(env_id="cartpole-swingup", env_kwargs='{"task_kwargs": {"time_limit": 1}}'),
    "mpo_gym": dict(env_id="Pendulum-v1", action_repeat=2),
}
OTHERS = set("array help logdir no-deps override requeue wrap".split())  # of pip, sbatch, ...


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of short runs that end with an evaluation, by the name of the script."""
    flags = dict(total_timesteps=60, learning_starts=100, eval_frequency=60, seed=3)
    directories = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    for name, directory in directories.items():
        script = load(AGENTS / f"{name}.py")
        running.run(script, small_args(script, **RUNS[name], **flags, run_dir=str(directory)))
    return directories


@pytest.mark.parametrize("name", RUNS)
def test_plays_the_episodes_of_the_evaluation(name, runs, capsys):
    mean = np.mean(play.main(play.Flags(runs[name], episodes=2)))
    *episodes, last = capsys.readouterr().out.splitlines()
    rows = [f"{row['return']} in {row['length']}" for row in running.evaluations(runs[name])]
    assert episodes == [f"episode {k}: return {row} steps" for k, row in enumerate(rows)]
    assert last.startswith(f"mean {mean:.1f} ± ") and len(set(rows)) == 2


def test_plays_a_policy_that_lies_alone(runs, tmp_path):
    returns = play.main(play.Flags(runs["sac_dmc"], episodes=2, seed=5))
    policy = tmp_path / shutil.copy(runs["sac_dmc"] / "policy.npz", tmp_path)
    alone = dict(agent="sac_dmc", env_id="cartpole-swingup")  # episodes have their 10 seconds
    assert play.main(play.Flags(policy, episodes=2, seed=5, **alone)) > returns > [0, 0]


def test_plays_the_policies_that_come_with_the_repository():
    """As in their last evaluations, within what sums in another order do to an episode."""
    folder = REPOSITORY / "benchmark/results/policies"
    table = csv.DictReader((folder / "eval.csv").read_text().splitlines())
    returns = {row["policy"]: float(row["return"]) for row in table if row["episode"] == "0"}
    assert returns and returns.keys() == {path.stem for path in folder.glob("*.npz")}
    for name, expected in returns.items():
        assert (path := folder / f"{name}.npz").stat().st_size < 400_000
        assert play.main(play.Flags(path, episodes=1)) == [pytest.approx(expected, rel=0.05)]


def test_films_the_first_episode(runs, tmp_path, monkeypatch):
    script, film, modes = load(AGENTS / "mpo_gym.py"), tmp_path / "film.mp4", []

    def make_env_that_draws(args, make_env=script.make_env, **options):
        modes.append(options["render_mode"])
        env = make_env(args)
        env.unwrapped.render = lambda: np.zeros((64, 64, 3), np.uint8)
        return env

    monkeypatch.setattr(script, "make_env", make_env_that_draws)
    play.main(play.Flags(runs["mpo_gym"], episodes=2, render=str(film)))
    assert modes == ["rgb_array"]
    assert VideoFileClip(str(film)).duration == pytest.approx(200 / 30, abs=0.1)


MISTAKES = {
    "nothing": dict(policy=play.Path("nothing")),
    "--agent": dict(policy=play.Path("alone.npz")),
    "sac_nowhere": dict(agent="sac_nowhere"),
    "other sizes": dict(env_id="MountainCarContinuous-v0"),
    ".mp4": dict(render="film.gif"),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_says_what_cannot_be_played(said, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(runs["mpo_gym"] / "policy.npz", "alone.npz")
    flags = play.Flags(**{"policy": runs["mpo_gym"]} | MISTAKES[said])
    code, message = running.exits(capsys, play.main, flags)
    assert code == 2 and said in message


def test_documents_name_flags_and_files_that_exist():
    text = "\n".join((REPOSITORY / page).read_text() for page in ("README.md", "agents/README.md"))
    sources = "\n".join(path.read_text() for path in REPOSITORY.glob("*/*.py"))
    fields = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", sources, re.M)}
    flags = set(re.findall(r"(?<![\w=-])--([a-z][a-z-]*)", text)) - OTHERS
    assert {flag.removeprefix("no-") for flag in flags} <= fields
    paths = set(re.findall(r"\b(?:agents|benchmark|tests|common)/[\w./-]*\w", text))
    assert {path for path in paths if not (REPOSITORY / path).exists()} == {"agents/sac3_dmc.py"}
