"""What all tests share: Megatron-Core's work that several directories look at, done once."""

import hypothesis
import pytest
from processes import TESTS, Layouts, launch

# No time limit on a machine that is busy; the same examples every time, so that a failure can be had again.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


_WHOLE = ("e2e", "launch", "live", "routing")  # directories whose files share what takes long to set up


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where two processes share the tests (`make test`), those with a fixture in common go to one of them."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        directory = item.path.relative_to(TESTS).parts[0]
        own = directory if directory in _WHOLE else str(item.path)
        item.add_marker(pytest.mark.xdist_group("layouts" if "layouts" in item.fixturenames else own))


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """All cases of `distributed/worker.py`."""
    directory = tmp_path_factory.mktemp("layouts")
    launch(TESTS / "distributed" / "worker.py", directory)
    return Layouts(directory)
