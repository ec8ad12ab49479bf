"""The scripts are one family: same name, same text; different text, different name."""

import ast
import difflib
import functools
import itertools
import json
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import tyro
from conftest import REPOSITORY, parts

# The names whose text is the algorithm.
ROLES = {
    "Args", "State", "policy", "init", "SQUASH", "act", "explore", "td_target", "actor_loss",
    "update", "main",
}  # fmt: skip
SECTIONS = [
    "environments", "networks", "state", "acting", "learning", "replay buffer", "running",
]  # fmt: skip
ENVIRONMENTS = {"wrappers", "make_env", "Environments"}  # where two backends differ
RULED_LINE = re.compile(r"# --- ([a-z ]+) -+")


# --- reading a script -----------------------------------------------------------------------------


def name_of(node: ast.stmt) -> str | None:
    """What a top-level statement defines; the main block is called __main__, imports nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return node.targets[0].id
    if isinstance(node, ast.If):
        return "__main__"
    return None


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


def sections(path: Path) -> dict[str, list[str]]:
    """The names defined under each ruled line."""
    found, current = {"": []}, ""
    starts = {text.splitlines()[0]: name for name, text in blocks(path).items()}
    for line in path.read_text().splitlines():
        if match := RULED_LINE.fullmatch(line):
            current = match[1]
            found[current] = []
        elif line in starts:
            found[current].append(starts.pop(line))
    return found


def fields(text: str) -> dict[str, tuple[str, str, str]]:
    """Annotation, default and comment of each field of the class `Args`."""
    pattern = re.compile(r" {4}(\w+): (.+?) = (.+?)  # (.+)")
    matches = [pattern.fullmatch(line) for line in text.splitlines()]
    return {match[1]: match.groups()[1:] for match in matches if match}


def metadata(path: Path) -> dict:
    """The script's inline metadata (PEP 723)."""
    text = path.read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)[1]
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


# --- the family -----------------------------------------------------------------------------------


@pytest.fixture
def agents(request) -> list[Path]:
    """All scripts; the mutants of a script, if there are any, stand in for it one by one."""
    return sorted(request.config.getoption("--agents").glob("*_*.py"))


def difference(name: str, a: Path, b: Path) -> str:
    """A unified diff of a block in two scripts, empty if there is none."""
    texts = [blocks(path).get(name, "").splitlines() for path in (a, b)]
    return "\n".join(difflib.unified_diff(*texts, f"{a.name}: {name}", f"{b.name}: {name}", "", ""))


def shared(name: str, a: Path, b: Path) -> bool:
    """Whether the block `name` must have the same text in both scripts."""
    (algorithm, backend), (other_algorithm, other_backend) = parts(a), parts(b)
    if name in ENVIRONMENTS:
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


def test_sections(agents):
    """The same ruled lines in the same order, and under each the same names in the same order."""
    for path in agents:
        assert list(sections(path)) == ["", *SECTIONS], path.name
    for a, b in itertools.combinations(agents, 2):
        for section, names in sections(a).items():
            others = sections(b)[section]
            ours = [name for name in names if name in others]
            assert ours == [name for name in others if name in names], (a.name, b.name, section)


def test_names(agents):
    """Two backends of an algorithm define the same names, and so do the roles of all scripts."""
    for a, b in itertools.combinations(agents, 2):
        if parts(a)[0] == parts(b)[0]:
            assert list(blocks(a)) == list(blocks(b)), (a.name, b.name)
        assert ROLES | ENVIRONMENTS <= set(blocks(a)) & set(blocks(b))


def test_imports(agents):
    """Two backends of an algorithm import the same modules, but for the backend itself."""
    for a, b in itertools.combinations(agents, 2):
        same = parts(a)[0] == parts(b)[0]
        assert not same or imports(a) ^ imports(b) <= {"import gymnasium as gym"}, (a.name, b.name)


def test_args(agents):
    """Two backends of an algorithm differ in the defaults and in what an environment is called;
    a flag that two algorithms have in common has the same type in both."""
    for a, b in itertools.combinations(agents, 2):
        ours, theirs = (fields(blocks(path)["Args"]) for path in (a, b))
        common = ours.keys() & theirs.keys()
        if parts(a)[0] == parts(b)[0]:
            assert list(ours) == list(theirs), (a.name, b.name)
            comments = {name for name in common if ours[name][2] != theirs[name][2]}
            assert comments <= {"env_id"}, (a.name, b.name)
        assert not [name for name in common if ours[name][0] != theirs[name][0]], (a.name, b.name)


def test_dependencies(agents):
    """The inline metadata of every script lists what requirements.txt lists."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    required = sorted(line for line in (x.partition("#")[0].strip() for x in lines) if line)
    for path in agents:
        assert sorted(metadata(path)["dependencies"]) == required, path.name
        assert metadata(path)["requires-python"] == metadata(agents[0])["requires-python"]


# --- each script ----------------------------------------------------------------------------------


def test_every_flag_is_read(script):
    """As `args.name` or `self.args.name`; `vars(args)` in a log does not count."""

    def is_args(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", "")) == "args"

    nodes = ast.walk(ast.parse(Path(script.__file__).read_text()))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_args(n.value)}
    assert set(script.Args.__dataclass_fields__) - read == set()


def test_every_flag_has_help(script, capsys, monkeypatch):
    """The comment on a field is what --help says about its flag."""
    monkeypatch.setenv("COLUMNS", "200")
    documented = fields(blocks(Path(script.__file__))["Args"])
    assert set(documented) == set(script.Args.__dataclass_fields__)
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--help"])
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, _, comment) in documented.items():
        assert f"--{name.replace('_', '-')} " in output.replace(",", " ")
        assert len(comment.split()) > 1 and comment in output, f"--{name}: {comment}"


def test_types_are_true(script):
    """Every default has exactly the type of its field, or is one of its literals."""
    hints = typing.get_type_hints(script.Args)
    for name, field in script.Args.__dataclass_fields__.items():
        types = typing.get_args(hints[name]) or (hints[name],)
        assert type(field.default) in types or field.default in types, f"{name} = {field.default!r}"


IMPORT = """
import importlib.util, json, os, sys

def watch(event, arguments):
    if event == "subprocess.Popen":
        done.append(f"{event} {arguments[1]}")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        done.append(f"{event} {arguments[0]}")

done, environment = [], dict(os.environ)
import flax, jax, optax, scipy.optimize  # what they do is not the script's doing
sys.addaudithook(watch)
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
done += [f"backend {x}" for x in jax._src.xla_bridge._backends]
done += [f"environment variable {x}" for x in os.environ if x not in environment]
print(json.dumps(done))
"""


def test_import_does_nothing(script, tmp_path):
    """No flags parsed, no backend initialised, no file written, nothing printed."""
    command = [sys.executable, "-B", "-c", IMPORT, script.__file__, "--no-such-flag"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []
