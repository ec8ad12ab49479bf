"""Every defect of mutants.txt can still be made, and is caught by the test that it names."""

import ast

import mutants
import pytest

ALL = mutants.read()


def test_every_mutant_applies(request):
    """To its script as it is; its test exists, and mutants.md has it: none may vanish unseen."""
    agents = request.config.getoption("--agents")
    assert len({str(mutant) for mutant in ALL}) == len(ALL) > 90
    table = (mutants.TESTS / "mutants.md").read_text().splitlines()
    assert [mutant.row() for mutant in ALL] == table[-len(ALL) :], "python tests/mutants.py"
    for mutant in ALL:
        ast.parse(mutant.apply(agents))
        file, test = mutant.test.split("::")
        assert f"def {test}(" in (mutants.TESTS / f"{file}.py").read_text(), mutant


@pytest.mark.slow
def test_every_mutant_is_caught(request):
    assert mutants.survivors(ALL, request.config.getoption("--agents")) == {}
