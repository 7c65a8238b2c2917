"""What all tests share: Megatron-Core's work that several directories look at, done once."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faults_table
import forking
import hypothesis
import pytest
from distributed.worker import QUICK
from processes import TESTS, Layouts, launch
from run_metrics import find_metrics_without_row, list_records
from tiers import wants_long

# No time limit on a machine that is busy; the same examples every time, so that a failure can be had again.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")

# Fixtures of a session that take long to make, and the files whose tests share them: these go to one worker of
# pytest-xdist.
SHARED = {
    "demo": [
        "e2e/test_pipeline.py",
        "e2e/test_verbs.py",
        "e2e/test_faults.py",
        "e2e/test_numerics.py",
    ],
    "nodes": ["launch/test_torchrun.py", "launch/test_machines.py", "launch/test_elastic.py", "launch/test_slurm.py"],
    "layouts": [
        *(f"distributed/test_{name}.py" for name in ("layouts", "packed", "critic", "truncated_layouts")),
        "model/test_conversion.py",
    ],
    "server": [
        f"live/test_{name}.py"
        for name in ("contract", "server", "server_faults", "fleet", "served_rewards", "conversations", "drawn_from")
    ],
    "facts": ["routing/test_replay.py", "routing/test_routers.py"],
}
GROUPS = {f"tests/{file}": name for name, files in SHARED.items() for file in files}
# What takes minutes besides, begun before the rest; of the first the layouts of each family may go to another worker.
FAMILIES = "tests/model/families/test_families.py"
LONGEST = (
    FAMILIES,
    *(f"tests/{name}.py" for name in ("live/test_family_servers", "rl/test_resume", "routing/test_replay_layouts")),
)


def pytest_configure(config: pytest.Config) -> None:
    """Start fork servers for all workers of pytest-xdist; they import engines when they are first asked for a fork."""
    if not hasattr(config, "workerinput"):
        stack = ExitStack()
        config.add_cleanup(stack.close)
        for kind in ("server", "script"):
            stack.enter_context(forking.fork_server(kind))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put pure code first, then what takes longest, so that no worker is left with it at the end."""

    def place(item: pytest.Item) -> tuple[int, int, str]:
        file = item.nodeid.partition("::")[0]
        of_session = {
            name for name, found in item._fixtureinfo.name2fixturedefs.items() if found[-1].scope == "session"
        }
        if file not in GROUPS and (shared := of_session & SHARED.keys()):
            raise pytest.UsageError(f"{file} uses the fixture {min(shared)}: name it in SHARED of tests/conftest.py")
        slow = any(item.iter_markers("live")) or any(item.iter_markers("distributed"))
        order = (*SHARED, *LONGEST)
        number = next((i for i, each in enumerate(order) if each in (GROUPS.get(file), file)), len(order))
        return slow, number, file

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, and all files that share a fixture, in the order above."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file == FAMILIES and "every_layout[" in test:
                return f"{file} {test.partition('[')[2].partition('-')[0]}"
            return GROUPS.get(file, file)

    config.option.loadscopereorder = False
    return ByFixture(config, log)


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
            path.write_text(
                json.dumps({"fault": name, "lost": lost, "line": line.removeprefix("[rank 0] "), "seconds": seconds})
            )

    return note


@pytest.fixture(scope="session")
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """The cases of `distributed/worker.py` that the chosen tests are about."""
    directory = tmp_path_factory.mktemp("layouts")
    launch(TESTS / "distributed" / "worker.py", directory, *(() if wants_long(request.session, "layouts") else QUICK))
    return Layouts(directory)


@pytest.fixture(scope="module")
def forked_servers() -> Iterator[None]:
    """SGLang in forks, for the whole module, whoever starts it on this machine: seconds instead of a third of a minute.

    Not where a test is about a server's start, its processes or their end: it has one process as before, which stands
    for those of the fork.
    """
    with forking.in_environment(forking.variables()):
        yield


@pytest.fixture(scope="module", autouse=True)
def every_metric_has_a_row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that the runs of a module have written is without a row in the table of metrics."""
    items = (item for item in request.session.items if item.nodeid.startswith(f"{request.node.nodeid}::"))
    if not any(item.get_closest_marker(name) for item in items for name in ("live", "distributed")):
        yield
        return
    before = list_records(tmp_path_factory.getbasetemp())
    yield
    records = list_records(tmp_path_factory.getbasetemp()) - before
    found = {str(record): names for record in sorted(records) if (names := find_metrics_without_row(record))}
    assert not found, "add them to megatron_bai/monitor/metrics/table"
