"""Prints what catches each defect of mutants.txt: python tests/mutants.py > tests/mutants.md"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

BACKENDS = "_dmc", "_gym"
TESTS = Path(__file__).resolve().parent
AGENTS = TESTS.parent / "agents"


class Mutant(NamedTuple):
    """A change of the text of a script, and the test that has to fail because of it."""

    name: str
    script: str
    test: str  # file::test
    why: str
    changes: list[tuple[str, str]]

    def apply(self, agents: Path = AGENTS) -> str:
        text = (agents / f"{self.script}.py").read_text()
        for original, mutated in self.changes:
            if text.count(original) != 1:
                raise ValueError(f"{self}: the text stands {text.count(original)} times")
            text = text.replace(original, mutated)
        return text

    def row(self, caught_by: str = "") -> str:
        return f"| {self.name} | {self.script} | {self.why} | {caught_by or f'`{self.test}`'} |"

    def __str__(self):
        return f"{self.script}__{self.name}"


def read() -> list[Mutant]:
    _, *records = (TESTS / "mutants.txt").read_text().strip().split("\n\n")
    return [parse(record.splitlines()) for record in records]


def parse(lines: list[str]) -> Mutant:
    """A mutant from its lines, of which those that begin with - and with + take turns."""
    signs = itertools.groupby(lines[2:], key=lambda line: line[0])
    texts = ["\n".join(line[2:] for line in group) for _, group in signs]
    return Mutant(*lines[0].split(), lines[1], list(zip(texts[::2], texts[1::2], strict=True)))


def run(mutants: list[Mutant], agents: Path = AGENTS) -> dict[str, set[str]]:
    """Outcomes of each mutant's test with and without the defect, in one pytest for all."""
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), set()
        for mutant in mutants:
            file, test = mutant.test.split("::")
            shutil.copy(agents / f"{mutant.script}.py", folder)
            (folder / f"{mutant}.py").write_text(mutant.apply(agents))
            wanted |= {f"{file}.py::{test}[{script}]" for script in (mutant.script, mutant)}
        chosen, report = folder / "chosen.txt", folder / "report.xml"
        chosen.write_text("\n".join(wanted))
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
        command += ["--tb=no", f"--agents={folder}", f"--only={chosen}", f"--junit-xml={report}"]
        command += sorted({str(TESTS / test.split("::")[0]) for test in wanted})
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
        assert report.exists(), done.stdout + done.stderr
        return outcomes(report)


def outcomes(report: Path) -> dict[str, set[str]]:
    """What a JUnit report says of each file::test[script]."""
    found = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, parameters = case.get("name").rstrip("]").partition("[")
        file = case.get("classname").rpartition(".")[2]
        (script,) = (x for x in parameters.split("-") if x.endswith(BACKENDS) or "__" in x)
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{file}::{name}[{script}]"] |= kinds or {"passed"}
    return found


def survivors(mutants: list[Mutant], agents: Path = AGENTS) -> dict[str, str]:
    """Names of mutants that their tests do not catch, and what these did."""
    found, alive = run(mutants, agents), {}
    for mutant in mutants:
        before, after = (found[f"{mutant.test}[{x}]"] for x in (mutant.script, mutant))
        if before != {"passed"}:
            alive[str(mutant)] = f"{mutant.test} without the defect: {before}"
        elif "failure" not in after:
            alive[str(mutant)] = f"{mutant.test} with the defect: {after}"
    return alive


def main():
    """Prints the table; ends with an error if a mutant survives."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help runs nothing
    alive = survivors(mutants := read())
    print("# What catches each defect\n\nMade by `python tests/mutants.py > tests/mutants.md`.\n")
    print("| defect | script | what goes wrong | caught by |\n|---|---|---|---|")
    for mutant in mutants:
        print(mutant.row(alive.get(str(mutant), "")))
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
