"""The scripts are one family, and small: same name, same text; different text, different name."""

import ast
import difflib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import tyro
from conftest import REPOSITORY, parts

# The names whose text is the algorithm, and those that differ between two backends.
ROLES = {*"Args State policy init SQUASH explore td_target actor_loss update main".split()}
BACKEND = {"make_env"}
DMC_IMPORTS = ("import ctypes.util", "import warnings", "from contextlib")
ALGORITHM = ["networks", "state", "replay buffer", "acting", "learning"]
SECTIONS = ["environment", *ALGORITHM, "running"]
RULED_LINE = re.compile(r"# --- ([a-z ]+) -+")

# Code lines and lines of each script: lower them with the script, never raise them.
CEILINGS = {
    "sac_dmc": (425, 619),
    "sac_gym": (418, 611),
    "td3_dmc": (410, 598),
    "td3_gym": (403, 590),
    "mpo_dmc": (556, 817),
    "mpo_gym": (549, 809),
}

# Flags whose defaults are not the same in all scripts that have them.
DEFAULTS = """
                      sac_dmc  sac_gym  td3_dmc  td3_gym  mpo_dmc  mpo_gym
learning_starts       5000     10000    5000     10000    5000     10000
n_step                3        1        3        1        1        1
layer_norm            True     False    True     False    True     True
normalize_obs         True     False    True     False    True     True
policy_lr             3e-4     3e-4     -        -        3e-4     3e-4
q_lr                  3e-4     1e-3     -        -        3e-4     3e-4
learning_rate         -        -        3e-4     1e-3     -        -
exploration_noise     -        -        0.2      0.1      -        -
alpha                 0.1      1.0      -        -        -        -
clipped_double_q      False    True     False    True     -        -
target_entropy_scale  0.5      1.0      -        -        -        -
"""
SAME_DEFAULTS = dict(
    initial_stddev=0.5, seed=0, action_repeat=1, total_timesteps=1_000_000, eval_frequency=5_000,
    eval_episodes=10, log_frequency=1_000, checkpoint_frequency=25_000, buffer_size=1_000_000,
    updates_per_step=1, batch_size=256, gamma=0.99, hidden_width=256, tau=0.005, autotune=True,
    log_std_min=-5.0, log_std_max=2.0, policy_frequency=2, policy_noise=0.2, noise_clip=0.5,
    action_samples=20, target_network_frequency=100, dual_lr=1e-2, temperature_solver="newton",
    temperature=1.0, alpha_mean=1.0, alpha_stddev=10.0, epsilon=0.1, epsilon_penalty=1e-3,
    epsilon_mean=2.5e-3, epsilon_stddev=1e-6, per_dim_constraining=True, action_penalty=True,
)  # fmt: skip


def name_of(node: ast.stmt) -> str | None:
    """What a top-level statement defines; the main block is called __main__, imports nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return node.targets[0].id
    return "__main__" if isinstance(node, ast.If) else None


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def blocks(path: Path) -> dict[str, str]:
    """The text of each named top-level block, in order, with decorators and comments inside."""
    lines, found = path.read_text().splitlines(), {}
    for node in tree(path).body:
        start = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])])
        if name := name_of(node):
            found[name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


def imports(path: Path) -> set[str]:
    """The modules that a script imports; which names it takes from them is its own matter."""
    nodes = tree(path).body
    modules = {f"from {node.module}" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {ast.unparse(node) for node in nodes if isinstance(node, ast.Import)}


@functools.cache
def nouns(path: Path) -> list[str]:
    """The section in which each line is, empty above the first."""
    found = [""]
    for line in path.read_text().splitlines():
        match = RULED_LINE.fullmatch(line)
        found.append(match[1] if match else found[-1])
    return found


def sections(path: Path) -> dict[str, list[str]]:
    found = {noun: [] for noun in nouns(path)}
    for node in tree(path).body:
        if name := name_of(node):
            found[nouns(path)[node.lineno]].append(name)
    return found


def fields(text: str) -> dict[str, tuple[str, str, str]]:
    """Annotation, default and comment of each field of the class `Args`."""
    pattern = re.compile(r" {4}(\w+): (.+?) = (.+?)  # (.+)")
    matches = [pattern.fullmatch(line) for line in text.splitlines()]
    return {match[1]: match.groups()[1:] for match in matches if match}


@functools.cache
def code(path: Path) -> dict[int, str]:
    """Number and text of the lines that hold code: no blanks, comments or docstrings."""
    text, found = path.read_text(), {}
    lines, docstrings = ["", *text.splitlines()], set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row] = lines[row][:column].rstrip()
        elif token.string.strip():
            found |= dict.fromkeys(range(row, token.end[0] + 1))
    return {row: lines[row] for row in sorted(found.keys() - docstrings)}


@pytest.fixture
def pairs(request) -> list[tuple[Path, Path]]:
    return list(
        itertools.combinations(sorted(request.config.getoption("--agents").glob("*_*.py")), 2)
    )


def shared(name: str, a: Path, b: Path) -> bool:
    """Whether the block `name` must have the same text in both scripts."""
    (algorithm, backend), (other_algorithm, other_backend) = parts(a), parts(b)
    if name in BACKEND:
        return backend == other_backend
    return name not in ROLES or (algorithm == other_algorithm and name != "Args")


def test_same_name_same_text(pairs):
    """The same names in the same order, as far as two scripts have them in common."""
    for a, b in pairs:
        for section, names in sections(a).items():
            others = sections(b)[section]
            common = [name for name in names if name in others]
            assert common == [name for name in others if name in names], (a.name, b.name, section)
        for name in [name for name in blocks(a) if name in blocks(b) and shared(name, a, b)]:
            assert blocks(a)[name] == blocks(b)[name], (a.name, b.name)
        ours, theirs = (fields(blocks(path)["Args"]) for path in (a, b))
        types = {name: (ours[name][0], theirs[name][0]) for name in ours.keys() & theirs.keys()}
        assert all(x == y for x, y in types.values()), (a.name, b.name, types)


def test_backends_differ_little(pairs):
    """In defaults, in what an environment is called, and in at most 30 lines of the longer one."""
    for a, b in [(a, b) for a, b in pairs if parts(a)[0] == parts(b)[0]]:
        assert list(blocks(a)) == list(blocks(b)), (a.name, b.name)
        assert imports(a) ^ imports(b) <= set(DMC_IMPORTS), a.name
        ours, theirs = (fields(blocks(path)["Args"]) for path in (a, b))
        assert list(ours) == list(theirs), (a.name, b.name)
        assert {name for name in ours if ours[name][2] != theirs[name][2]} <= {"env_id"}, a.name
        lines = list(difflib.ndiff(*(path.read_text().splitlines() for path in (a, b))))
        changed = [sum(line.startswith(sign) for line in lines) for sign in ("- ", "+ ")]
        assert max(changed) <= 30, (a.name, b.name, changed)


def test_sections_and_dependencies(script):
    """The inline metadata (PEP 723) asks for what requirements.txt lists, in the same words."""
    path = Path(script.__file__)
    assert list(sections(path)) == ["", *SECTIONS] and ROLES | BACKEND <= set(blocks(path))
    block = path.read_text().removeprefix("# /// script\n").partition("# ///\n")[0]
    metadata = tomllib.loads(block.replace("# ", ""))
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert set(metadata["dependencies"]) <= {x.partition("#")[0].strip() for x in lines}
    assert metadata["requires-python"] == ">=3.11"


def test_scripts_stay_small(script):
    """And are not crammed for it; nearly half of the code after the flags is the algorithm."""
    path = Path(script.__file__)
    counted, ceilings = (len(code(path)), len(path.read_text().splitlines())), CEILINGS[path.stem]
    assert all(x <= y for x, y in zip(counted, ceilings)), f"{counted} lines, not {ceilings}"
    average = sum(map(len, code(path).values())) / counted[0]  # with the indentation
    assert average <= 53.1, f"{average:.2f} characters"
    (args,) = (node for node in tree(path).body if name_of(node) == "Args")
    after = [nouns(path)[row] for row in code(path) if row > args.end_lineno]
    share = sum(noun in ALGORITHM for noun in after) / len(after)  # the aim is 45 % in all
    assert share >= {"td3": 0.42, "sac": 0.43, "mpo": 0.57}[script.algorithm], f"{share:.1%}"


def test_functions_have_60_lines_and_four_levels_at_most(script):
    text, depth = Path(script.__file__).read_text(), 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        assert depth <= 4, token.line


def test_every_flag_is_read(script):
    """As `args.name`, or `getattr(args, name)` with its name in the same line."""
    lines = code(Path(script.__file__)).values()
    read = {name for line in lines for name in re.findall(r"\bargs\.(\w+)", line)}
    for line in [line for line in lines if "getattr(args, " in line]:
        read |= set(re.findall(r'"(\w+)"', line))
    assert set(script.Args.model_fields) - read == set()


def test_every_flag_has_help(script, capsys, monkeypatch):
    """The comment on a field is what --help says about its flag."""
    monkeypatch.setenv("COLUMNS", "200")
    documented = fields(blocks(Path(script.__file__))["Args"])
    assert set(documented) == set(script.Args.model_fields)
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--help"])
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, _, comment) in documented.items():
        assert f"--{name.replace('_', '-')} " in output.replace(",", " ")
        assert len(comment.split()) > 1 and comment in output, f"--{name}: {comment}"


def test_defaults(script):
    header, *rows = (line.split() for line in DEFAULTS.strip().splitlines())
    column = 1 + header.index(Path(script.__file__).stem)
    expected = {row[0]: ast.literal_eval(row[column]) for row in rows if row[column] != "-"}
    defaults = script.Args().model_dump()
    expected |= {name: x for name, x in SAME_DEFAULTS.items() if name in defaults}
    rest = {"exp_name", "run_dir", "env_id", "env_kwargs", "capture_video", "track"}
    rest |= {"wandb_project_name", "wandb_entity"}
    assert {name: x for name, x in defaults.items() if name not in rest} == expected
    assert script.Args.model_validate(defaults, strict=True) == script.Args()
    for name, field in script.Args.model_fields.items():
        assert field.annotation is not float or type(field.default) is float, name


@pytest.mark.algorithms("sac")
def test_import_does_nothing(script, tmp_path):
    """No flags parsed, no backend of JAX initialised, no file written, nothing printed."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-B", "-c", code, script.__file__, "--no-such-flag"]
    environment = os.environ | {"JAX_PLATFORMS": "none-such"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
