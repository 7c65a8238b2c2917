"""What all tests share: Megatron-Core's work that several directories look at, done once."""

import json
from collections.abc import Callable
from pathlib import Path

import faults_table
import hypothesis
import pytest
from processes import TESTS, Layouts, launch

# No time limit on a machine that is busy; the same examples every time, so that a failure can be had again.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="DIR", help="note here what each fault cost, for tests/faults_table.py")


@pytest.fixture(scope="session")
def fault(pytestconfig: pytest.Config) -> Callable[[str, str, str, float | None], None]:
    """Notes what a fault cost: its name, what was lost, the line that the user sees, and the seconds until work went
    on, None where there was nothing to recover."""
    directory = pytestconfig.getoption("--faults")

    def note(name: str, lost: str, line: str, seconds: float | None) -> None:
        assert name in faults_table.FAULTS, f"{name!r} is no fault of tests/faults_table.py"
        if directory:
            path = Path(directory) / f"{name.replace(' ', '-')}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"fault": name, "lost": lost, "line": line, "seconds": seconds}))

    return note


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """All cases of `distributed/worker.py`."""
    directory = tmp_path_factory.mktemp("layouts")
    launch(TESTS / "distributed" / "worker.py", directory)
    return Layouts(directory)
