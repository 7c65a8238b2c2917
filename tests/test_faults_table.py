"""docs/faults.md has a row for every fault that the tests provoke, and for no other."""

import ast

import faults_table
import pytest
from processes import TESTS


def provoked() -> list[str]:
    """The faults that tests note, by the fixture's calls in their source."""
    calls = [
        node
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fault"
    ]
    return [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def test_every_fault_that_is_provoked_has_its_row_and_every_row_its_test() -> None:
    assert list(faults_table.rows(faults_table.PAGE.read_text())) == list(faults_table.FAULTS)
    assert set(provoked()) == set(faults_table.FAULTS)


def test_what_is_noted_becomes_the_row(tmp_path, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    page = tmp_path / "faults.md"
    name = faults_table.FAULTS[0]
    page.write_text("\n".join(["# Faults", "", *faults_table.HEAD, f"| {name} | much | `once` | 9 |", "", "After."]))
    monkeypatch.setattr(faults_table, "PAGE", page)
    (tmp_path / "1.json").write_text(
        '{"fault": "two runs in one directory", "lost": "nothing", "line": "at /a/b/run/x", "seconds": null}'
    )
    faults_table.main(tmp_path)
    assert page.read_text().split("\n\n")[1:] == [
        "\n".join([*faults_table.HEAD, f"| {name} | much | `once` | 9 |",
                   "| two runs in one directory | nothing | `at …/run/x` | – |"]), "After."
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="is no fault of"):
        fault(f"{name}, twice", "", "", 0)
