"""The scripts are one family, and small: same name, same text; different text, different name."""

import ast
import difflib
import functools
import io
import itertools
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import tyro
from conftest import REPOSITORY, parts

# The names whose text is the algorithm, and those whose text is the backend.
ROLES = {
    "Args", "State", "init", "policy", "SQUASH", "explore", "td_target", "actor_loss", "update",
    "main",
}  # fmt: skip
BACKEND = {"WANTED", "make_env"}
ALGORITHM = ["networks", "state", "replay buffer", "acting", "learning"]
SECTIONS = ["environment", *ALGORITHM, "running"]
# Code lines (no blanks, comments, docstrings) and all lines of a script. They only ever go down.
CEILINGS = {
    "sac_dmc": (422, 619), "sac_gym": (415, 607), "td3_dmc": (408, 599), "td3_gym": (401, 587),
    "mpo_dmc": (554, 817), "mpo_gym": (547, 807),
}  # fmt: skip


@functools.cache
def blocks(path: Path) -> dict[str, str]:
    """The text of each named top-level block, in order, with decorators and comments inside."""
    text, found = path.read_text(), {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        start = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.Assign):
            names = [ast.unparse(node.targets[0])]
        else:
            names = [getattr(node, "name", None) or ("__main__" if type(node) is ast.If else None)]
        found |= {name: "\n".join(lines[start - 1 : node.end_lineno]) for name in names if name}
    return found


def sections(path: Path) -> dict[str, list[str]]:
    """The names defined under each ruled line."""
    found, current = {"": []}, ""
    starts = {text.splitlines()[0]: name for name, text in blocks(path).items()}
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"# --- ([a-z ]+) -+", line):
            current = match[1]
            found[current] = []
        elif line in starts:
            found[current].append(starts.pop(line))
    return found


def code_lines(text: str) -> dict[int, str]:
    """Lines that hold code, by their number and up to their comment; docstrings are not code."""
    lines, code = text.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            for number in range(token.start[0], token.end[0] + 1):
                end = token.end[1] if number == token.end[0] else None
                code[number] = lines[number - 1][:end]
    for node in ast.walk(ast.parse(text)):
        if has_docstring(node):
            for number in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                code.pop(number, None)
    return code


def has_docstring(node) -> bool:
    """Whether a module, class or function begins with a docstring."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


@pytest.fixture
def agents(request) -> list[Path]:
    """All scripts; the mutants of a script, if there are any, stand in for it one by one."""
    return sorted(request.config.getoption("--agents").glob("*_*.py"))


# --- the family -----------------------------------------------------------------------------------


def difference(name: str, a: Path, b: Path) -> str:
    """A unified diff of a block in two scripts, empty if there is none."""
    texts = [blocks(path).get(name, "").splitlines() for path in (a, b)]
    return "\n".join(difflib.unified_diff(*texts, f"{a.name}: {name}", f"{b.name}: {name}", "", ""))


def shared(name: str, a: Path, b: Path) -> bool:
    """Whether the block `name` must have the same text in both scripts."""
    (algorithm, backend), (other_algorithm, other_backend) = parts(a), parts(b)
    if name in BACKEND:
        return backend == other_backend
    return name not in ROLES or algorithm == other_algorithm and name != "Args"


def test_same_name_same_text(agents):
    differences = [
        difference(name, a, b)
        for a, b in itertools.combinations(agents, 2)
        for name in blocks(a).keys() & blocks(b).keys()
        if shared(name, a, b)
    ]
    assert not any(differences), "\n\n".join(filter(None, differences))


def test_sections(agents):
    """The same ruled lines in the same order, and under each the same names in the same order."""
    for path in agents:
        assert list(sections(path)) == ["", *SECTIONS], path.name
        assert ROLES | BACKEND <= set(blocks(path)), path.name
    for a, b in itertools.combinations(agents, 2):
        for section, names in sections(a).items():
            others = sections(b)[section]
            ours = [name for name in names if name in others]
            assert ours == [name for name in others if name in names], (a.name, b.name, section)


def test_two_backends_differ_in_thirty_lines(agents):
    for a, b in itertools.combinations(agents, 2):
        if parts(a)[0] == parts(b)[0]:
            lines = list(difflib.ndiff(a.read_text().splitlines(), b.read_text().splitlines()))
            added, removed = (sum(x.startswith(sign) for x in lines) for sign in "+-")
            assert added <= 30 and removed <= 37, (a.name, b.name, added, removed)


def test_dependencies(agents):
    """The inline metadata (PEP 723) of a script lists lines of requirements.txt."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    required = {x.partition("#")[0].strip() for x in lines}
    for path in agents:
        block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())[1]
        metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
        assert set(metadata["dependencies"]) <= required, path.name


# --- each script ----------------------------------------------------------------------------------


def test_size(script):
    """The script is no longer than it has been, and not because it is crammed."""
    text = Path(script.__file__).read_text()
    code, (ceiling, physical) = code_lines(text), CEILINGS["_".join(parts(Path(script.__file__)))]
    assert len(code) <= ceiling and len(text.splitlines()) <= physical
    assert sum(map(len, code.values())) / len(code) <= 53.5
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 62, node.name
        if isinstance(node, ast.stmt):
            assert node.col_offset <= 16 or node.lineno not in code, f"line {node.lineno}"


def test_the_algorithm_is_a_large_part(script):
    path, counts = Path(script.__file__), dict.fromkeys(SECTIONS, 0)
    for section, names in sections(path).items():
        for name in names if section else ():
            counts[section] += len(code_lines(blocks(path)[name]))
    assert sum(counts[name] for name in ALGORITHM) > 0.42 * sum(counts.values()), counts


def test_every_flag_is_read(script):
    """As `args.name` or `self.args.name`; those that are dumped into a log do not count."""

    def is_args(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", "")) == "args"

    nodes = ast.walk(ast.parse(Path(script.__file__).read_text()))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_args(n.value)}
    assert script.Args.model_fields.keys() - read <= {"alpha_mean", "alpha_stddev"}  # by getattr


def test_every_flag_has_help(script, capsys, monkeypatch):
    """The comment on a field is what --help says about its flag."""
    monkeypatch.setenv("COLUMNS", "200")
    text = blocks(Path(script.__file__))["Args"]
    comments = dict(re.findall(r"^ {4}(\w+): .+?  # (.+)$", text, re.MULTILINE))
    assert comments.keys() == script.Args.model_fields.keys()
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--help"])
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, comment in comments.items():
        assert f"--{name.replace('_', '-')} " in output.replace(",", " ")
        assert comment in output, f"--{name}: {comment}"


IMPORT = """
import importlib.util, json, os, sys

def watch(event, arguments):
    if event == "subprocess.Popen":
        done.append(f"{event} {arguments[1]}")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        done.append(f"{event} {arguments[0]}")

done, environment = [], dict(os.environ)
import flax, gymnasium, jax, optax, pydantic, scipy.optimize, tensorboardX, tqdm, tyro
sys.addaudithook(watch)
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
done += [f"backend {x}" for x in jax._src.xla_bridge._backends]
done += [f"environment variable {x}" for x in os.environ if x not in environment]
print(json.dumps(done))
"""


@pytest.mark.backends("dmc")
def test_import_does_nothing(script, tmp_path):
    """No flags parsed, no backend initialised, no file written, nothing printed."""
    command = [sys.executable, "-B", "-c", IMPORT, script.__file__, "--no-such-flag"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []
