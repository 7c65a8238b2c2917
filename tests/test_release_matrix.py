"""The table of docs/compatibility.md: what the records give, with a row for every release that is taken."""

from collections.abc import Callable
from pathlib import Path

import engine_releases
import pytest
import release_matrix
import release_page
from engine_releases import DEFAULT, TABLE, Engines
from packaging.version import Version
from release_matrix import SUITES, Cell
from test_locks import pinned

from megatron_bai.compat.releases import SERVERS

OUTCOME = {"passed": 3, "skipped": 1, "failed": {}, "imports": {"sglang": 2}, "seconds": 9}
MACHINE = {"processor": "a processor", "cores": 2, "python": "3.11.9", "torch": "2.13.0"}
RECORD = OUTCOME | MACHINE | {"date": "2026-11-29", "commit": "1234567"}
NEWEST = Cell(next(iter(release_matrix.rows())), "routing")


def page(records: dict) -> str:
    return release_page.make_page(release_matrix.rows(), SUITES, records)


def test_the_page_is_what_the_records_give() -> None:
    assert release_page.PAGE.read_text() == page(release_page.read_records()), "make test-matrix ARGS=page"


def test_every_release_of_the_table_has_a_row() -> None:
    for distribution, releases in TABLE.items():
        rows = {engines.releases[distribution] for engines in release_matrix.rows()}
        assert rows == {*releases, *(SERVERS if distribution == "sglang" else ())}


def test_every_suite_that_depends_on_a_minor_release_is_asked_for() -> None:
    """Of its last patch: with that alone, but for the suites that start servers, or in a corner."""
    rows = release_matrix.rows()
    assert not rows[DEFAULT], "CI runs every test with it"
    for names in list(rows.values())[:2]:
        assert {*names} == SUITES.keys() - {"diffs"}
    depend = {name for name, suite in SUITES.items() if "megatron-core" in suite.engines} - {"rl"}
    last = {Version(release).release[:2]: release for release in TABLE["megatron-core"]}
    for release in TABLE["megatron-core"]:
        asked = [{*names} for engines, names in rows.items() if engines.megatron_core == release and engines != DEFAULT]
        if release in last.values() and release != DEFAULT.megatron_core:
            assert any(depend <= names for names in asked), release
        assert release == DEFAULT.megatron_core or {"routing", "checkpoints"} <= set.union(*asked), release


@pytest.mark.parametrize("distribution", TABLE)
def test_every_release_has_a_lock(distribution: str) -> None:
    for release in TABLE[distribution]:
        if release != DEFAULT.releases[distribution]:
            assert pinned(f"{distribution}-{release}.lock")[distribution] == release


def test_the_defaults_are_what_the_lock_installs() -> None:
    assert DEFAULT.releases == {name: engine_releases.locked(name) for name in TABLE}


def test_outcomes_are_named() -> None:
    assert page({}).count("*not run*") > len(release_matrix.cells())
    done = page({NEWEST.key: RECORD})
    assert "| 3 passed, 1 skipped |" in done and "Nothing that was run." in done and "a processor, 2 cores" in done
    failed = page({NEWEST.key: RECORD | {"failed": {"tests.test_it::test": "assert `a`"}}})
    assert "| **1 failed**, 3 passed, 1 skipped |" in failed
    assert f"`{NEWEST.key}`:\n\n- `tests.test_it::test`: `assert 'a'`" in failed


@pytest.mark.parametrize(
    "cell", [Cell(Engines(megatron_core="0.15.0"), "routing"), Cell(DEFAULT, "no-suite"), Cell(NEWEST.engines, "diffs")]
)
def test_a_record_of_no_cell_is_refused(cell: Cell) -> None:
    with pytest.raises(ValueError, match=f"records of no cell, delete them: {cell.key}"):
        page({cell.key: RECORD})


def test_cells_are_chosen_by_words() -> None:
    everything = release_matrix.cells()
    failed = {NEWEST.key: RECORD | {"failed": {"a": "b"}}}
    assert release_matrix.choose([], {}) == everything
    assert release_matrix.choose([], failed) == [cell for cell in everything if cell != NEWEST]
    assert release_matrix.choose(["failed"], failed) == [NEWEST]
    named = [f"{name}={release}" for name, release in NEWEST.engines.releases.items()]
    assert release_matrix.choose([*named, "suite=routing"], failed) == [NEWEST]
    for words in (["megatron=0.19.2"], ["faild"], ["sglang=0.5.20"]):
        with pytest.raises(SystemExit):
            release_matrix.choose(words, {})


def test_a_record_replaces_the_cells_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_page, "RECORDS", tmp_path / "records.json")
    for passed in (1, 2):
        release_page.keep(NEWEST.key, RECORD | {"passed": passed})
    release_page.keep("another", RECORD)
    assert {key: record["passed"] for key, record in release_page.read_records().items()} == {
        NEWEST.key: 2,
        "another": 3,
    }


def test_a_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
        '<testcase classname="tests.a" name="two"><skipped message="no"/></testcase>'
        '<testcase classname="tests.a" name="three">'
        '<failure message="AssertionError: a warning&#10;  TypeError: no&#10;assert 1 == 0"/></testcase>'
        '<testcase classname="tests.a" name="four"><error message="no fixture"/></testcase></testsuite></testsuites>'
    )
    failed = {"tests.a::three": "TypeError: no", "tests.a::four": "no fixture"}
    assert release_matrix.read_report(report) == {"passed": 1, "skipped": 1, "failed": failed}


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, int]]:
    """What is found for the newest Megatron-Core in `tmp_path`, from imports of these files below it."""
    newest = Engines(megatron_core=TABLE["megatron-core"][-1])
    monkeypatch.setattr(engine_releases, "DIRECTORY", tmp_path)
    metadata = tmp_path / f"megatron-core-{newest.megatron_core}" / "megatron_core-1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)

    def require(*files: str, release: str = newest.megatron_core) -> dict[str, int]:
        metadata.write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {release}\n")
        (tmp_path / "notes").write_text("".join(f"megatron.core\t{tmp_path / file}\n" for file in files))
        return engine_releases.require_imported(newest, tmp_path / "notes", ["megatron-core"], tmp_path / "copies")

    return require


def test_imports_of_another_release_are_found(noted: Callable[..., dict[str, int]]) -> None:
    right = f"megatron-core-{TABLE['megatron-core'][-1]}/megatron/core/__init__.py"
    assert noted(right, right, "copies/a/megatron/core/__init__.py")["megatron-core"] == 2
    with pytest.raises(RuntimeError, match="was wanted, and .*site-packages/.* was imported"):
        noted(right, "site-packages/megatron/core/__init__.py")
    with pytest.raises(RuntimeError, match="no process imported it"):
        noted()
    with pytest.raises(RuntimeError, match=r"was wanted, and .* has 0\.1\.0"):
        noted(right, release="0.1.0")
