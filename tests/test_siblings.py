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
ROLES = {
    "Args", "State", "policy", "init", "SQUASH", "explore", "td_target", "actor_loss", "update",
    "main",
}  # fmt: skip
BACKEND = {"make_env"}
DMC_IMPORTS = ("contextlib", "ctypes.util", "warnings")
ALGORITHM = ["networks", "state", "replay buffer", "acting", "learning"]
SECTIONS = ["environment", *ALGORITHM, "running"]
RULED_LINE = re.compile(r"# --- ([a-z ]+) -+")

# Code lines and lines of each script: lower them with the script, never raise them.
CEILINGS = {
    "sac_dmc": (428, 627),
    "sac_gym": (421, 615),
    "td3_dmc": (414, 607),
    "td3_gym": (407, 595),
    "mpo_dmc": (560, 825),
    "mpo_gym": (553, 815),
}

# Flags whose defaults are not the same in all scripts that have them.
DEFAULTS = """
                      sac_dmc  sac_gym  td3_dmc  td3_gym  mpo_dmc  mpo_gym
learning_starts       5000     10000    5000     10000    5000     10000
n_step                3        1        3        1        1        1
layer_norm            False    False    False    False    True     True
normalize_obs         True     False    True     False    True     True
policy_lr             3e-4     3e-4     -        -        3e-4     3e-4
q_lr                  3e-4     1e-3     -        -        3e-4     3e-4
learning_rate         -        -        3e-4     1e-3     -        -
exploration_noise     -        -        0.2      0.1      -        -
alpha                 0.1      1.0      -        -        -        -
target_entropy_scale  0.5      1.0      -        -        -        -
"""
SAME_DEFAULTS = dict(
    seed=0, action_repeat=1, total_timesteps=1_000_000, eval_frequency=5_000, eval_episodes=10,
    log_frequency=1_000, checkpoint_frequency=25_000, buffer_size=1_000_000, updates_per_step=1,
    batch_size=256, gamma=0.99, hidden_width=256, tau=0.005,
    autotune=True, log_std_min=-5.0, log_std_max=2.0,
    policy_frequency=2, policy_noise=0.2, noise_clip=0.5,
    target_network_frequency=100, action_samples=20, dual_lr=1e-2, temperature_solver="newton",
    temperature=1.0, alpha_mean=1.0, alpha_stddev=10.0, epsilon=0.1, epsilon_penalty=1e-3,
    epsilon_mean=2.5e-3, epsilon_stddev=1e-6, per_dim_constraining=True, action_penalty=True,
    initial_stddev=0.5,
)  # fmt: skip


# --- reading a script -----------------------------------------------------------------------------


def name_of(node: ast.stmt) -> str | None:
    """What a top-level statement defines; the main block is called __main__, imports nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return node.targets[0].id
    return "__main__" if isinstance(node, ast.If) else None


@functools.cache
def blocks(path: Path) -> dict[str, str]:
    """The text of each named top-level block, in order, with decorators and comments inside."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno] + [x.lineno for x in decorators])
        if name := name_of(node):
            found[name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


def imports(path: Path) -> set[str]:
    """The modules that a script imports; which names it takes from them is its own matter."""
    nodes = ast.parse(path.read_text()).body
    modules = {f"from {node.module}" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {ast.unparse(node) for node in nodes if isinstance(node, ast.Import)}


def ruled_lines(path: Path) -> list[tuple[int, str]]:
    """Number and noun of the lines that begin a section."""
    lines = enumerate(path.read_text().splitlines(), start=1)
    matches = [(number, RULED_LINE.fullmatch(line)) for number, line in lines]
    return [(number, match[1]) for number, match in matches if match]


def sections(path: Path) -> dict[str, list[str]]:
    """The names defined under each ruled line, and those above the first."""
    found = {"": []} | {noun: [] for _, noun in ruled_lines(path)}
    for node in ast.parse(path.read_text()).body:
        above = [noun for number, noun in ruled_lines(path) if number < node.lineno]
        if name := name_of(node):
            found[["", *above][-1]].append(name)
    return found


def fields(text: str) -> dict[str, tuple[str, str, str]]:
    """Annotation, default and comment of each field of the class `Args`."""
    pattern = re.compile(r" {4}(\w+): (.+?) = (.+?)  # (.+)")
    matches = [pattern.fullmatch(line) for line in text.splitlines()]
    return {match[1]: match.groups()[1:] for match in matches if match}


def metadata(path: Path) -> dict:
    """The script's inline metadata (PEP 723)."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())[1]
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


@functools.cache
def code(path: Path) -> dict[int, str]:
    """Number and text of the lines that hold code: no blanks, comments or docstrings."""
    text, found = path.read_text(), {}
    lines, docstrings = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif token.string.strip():
            rows = range(token.start[0], token.end[0] + 1)
            found |= {row: lines[row - 1] for row in rows if row not in docstrings}
    return {row: lines[row - 1] for row in sorted(found)}


# --- the family -----------------------------------------------------------------------------------


@pytest.fixture
def agents(request) -> list[Path]:
    """All scripts."""
    return sorted(request.config.getoption("--agents").glob("*_*.py"))


def difference(name: str, a: Path, b: Path) -> str:
    """A unified diff of a block in two scripts, empty if there is none."""
    texts = [blocks(path).get(name, "").splitlines() for path in (a, b)]
    return "\n".join(difflib.unified_diff(*texts, f"{a.name}: {name}", f"{b.name}: {name}", "", ""))


def shared(name: str, a: Path, b: Path) -> bool:
    """Whether the block `name` must have the same text in both scripts."""
    (algorithm, backend), (other_algorithm, other_backend) = parts(a), parts(b)
    if name in BACKEND:
        return backend == other_backend
    if name in ROLES:
        return algorithm == other_algorithm and name != "Args"
    return True


def test_same_name_same_text(agents):
    differences = [
        difference(name, a, b)
        for a, b in itertools.combinations(agents, 2)
        for name in blocks(a)
        if name in blocks(b) and shared(name, a, b)
    ]
    assert not any(differences), "\n\n".join(filter(None, differences))


def test_sections_names_and_imports(agents):
    """The same in the same order, as far as two scripts have them in common; backends have all."""
    for path in agents:
        assert list(sections(path)) == ["", *SECTIONS], path.name
        assert ROLES | BACKEND <= set(blocks(path)), path.name
    for a, b in itertools.combinations(agents, 2):
        for section, names in sections(a).items():
            others = sections(b)[section]
            ours = [name for name in names if name in others]
            assert ours == [name for name in others if name in names], (a.name, b.name, section)
        if parts(a)[0] == parts(b)[0]:
            assert list(blocks(a)) == list(blocks(b)), (a.name, b.name)
            assert imports(a) ^ imports(b) <= {f"import {name}" for name in DMC_IMPORTS}, a.name


def test_args(agents):
    """Two backends differ in defaults and in what an environment is called; a flag that two
    algorithms have in common has the same type in both."""
    for a, b in itertools.combinations(agents, 2):
        ours, theirs = (fields(blocks(path)["Args"]) for path in (a, b))
        common = ours.keys() & theirs.keys()
        if parts(a)[0] == parts(b)[0]:
            assert list(ours) == list(theirs), (a.name, b.name)
            comments = {name for name in common if ours[name][2] != theirs[name][2]}
            assert comments <= {"env_id"}, (a.name, b.name)
        assert not [name for name in common if ours[name][0] != theirs[name][0]], (a.name, b.name)


def test_backends_differ_little(agents):
    """In at most 36 lines, counted on the side that has more of them."""
    for a, b in itertools.combinations(agents, 2):
        if parts(a)[0] == parts(b)[0]:
            lines = list(difflib.ndiff(*(path.read_text().splitlines() for path in (a, b))))
            changed = [sum(line.startswith(sign) for line in lines) for sign in ("- ", "+ ")]
            assert max(changed) <= 36, (a.name, b.name, changed)


def test_dependencies(agents):
    """The inline metadata asks for what requirements.txt lists, in the same words."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    required = {line.partition("#")[0].strip() for line in lines}
    for path in agents:
        assert set(metadata(path)["dependencies"]) <= required, path.name
        assert metadata(path)["requires-python"] == metadata(agents[0])["requires-python"]


# --- size -----------------------------------------------------------------------------------------


def test_scripts_stay_small(script):
    """And are not crammed for it: at most 53 characters in a code line, with its indentation."""
    path = Path(script.__file__)
    counted, ceilings = (len(code(path)), len(path.read_text().splitlines())), CEILINGS[path.stem]
    assert all(x <= y for x, y in zip(counted, ceilings)), f"{counted} lines, not {ceilings}"
    average = sum(map(len, code(path).values())) / counted[0]
    assert average <= 53.1, f"{average:.2f} characters"


def test_functions_are_short_and_shallow(script):
    """At most 60 lines, and four levels of indentation."""
    text, depth = Path(script.__file__).read_text(), 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        assert depth <= 4, token.line


def test_nearly_half_of_a_script_is_its_algorithm(script):
    """Of the code after the flags; the aim is 45 % in all of them."""
    path = Path(script.__file__)
    end_of_args = next(
        node.end_lineno for node in ast.parse(path.read_text()).body if name_of(node) == "Args"
    )
    after = [row for row in code(path) if row > end_of_args]
    nouns = [[noun for row, noun in ruled_lines(path) if row < line][-1:] for line in after]
    share = sum(noun[0] in ALGORITHM for noun in nouns if noun) / len(after)
    assert share >= {"td3": 0.42, "sac": 0.43, "mpo": 0.57}[script.algorithm], f"{share:.1%}"


# --- flags ----------------------------------------------------------------------------------------


def test_every_flag_is_read(script):
    """As `args.name`, or `getattr(args, name)` with its name in the same function."""

    def is_args(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", "")) == "args"

    nodes = list(ast.walk(ast.parse(Path(script.__file__).read_text())))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_args(n.value)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and "getattr(args, " in ast.unparse(node):
            strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            read |= {value for value in strings if isinstance(value, str)}
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
    """Those of the tables above, of the types of their fields."""
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
