"""Every defect of mutants.py is caught, in every script, by the test it names.

All mutants go into one folder, sac_dmc__polyak_swapped.py and so on, beside the scripts as they
are; one pytest runs the named tests on them, so that what they have in common compiles once.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mutants import MUTANTS, Mutant

TESTS = Path(__file__).resolve().parent
CASES = [(mutant, script) for mutant in MUTANTS for script in mutant.scripts]


def present(agents: Path) -> list[tuple[Mutant, str]]:
    """The mutants of the scripts in this folder."""
    return [case for case in CASES if (agents / f"{case[1]}.py").exists()]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[tuple[str, str], set[str]]:
    """Outcomes of the named tests, all their parameters together, by test and script."""
    agents = request.config.getoption("--agents")
    folder = tmp_path_factory.mktemp("agents")
    selected = set()
    for mutant, script in present(agents):
        text = (agents / f"{script}.py").read_text()
        (folder / f"{script}.py").write_text(text)
        (folder / f"{script}__{mutant.name}.py").write_text(mutant.apply(text))
        selected |= {(mutant.caught_by, script), (mutant.caught_by, f"{script}__{mutant.name}")}
    chosen, report = folder / "selected.txt", folder / "report.xml"
    chosen.write_text("\n".join(f"{test}[{script}]" for test, script in selected))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
    command += [f"--agents={folder}", f"--only={chosen}", f"--junit-xml={report}"]
    command += sorted({str(TESTS / test.split("::")[0]) for test, _ in selected})
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr
    return outcomes(report)


def outcomes(report: Path) -> dict[tuple[str, str], set[str]]:
    """What a JUnit report says of every test and script."""
    found = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, parameters = case.get("name").partition("[")
        test = case.get("classname").rpartition(".")[2] + ".py::" + name
        script = parameters.rstrip("]").split("-")[0]
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[test, script] |= kinds or {"passed"}
    return found


@pytest.mark.parametrize("mutant, name", CASES, ids=[f"{s}-{m.name}" for m, s in CASES])
def test_mutant_is_caught(request, results, mutant, name):
    if (mutant, name) not in present(request.config.getoption("--agents")):
        pytest.skip(f"{name} is not there")
    assert results[mutant.caught_by, name] == {"passed"}, "fails without the defect"
    caught = results[mutant.caught_by, f"{name}__{mutant.name}"]
    assert "failure" in caught and "error" not in caught, mutant.why
