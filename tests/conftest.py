"""What all tests share: Megatron-Core's work that several directories look at, done once."""

import hypothesis
import pytest
from processes import TESTS, Layouts, launch

# No time limit on a machine that is busy; the same examples every time, so that a failure can be had again.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """All cases of `distributed/worker.py`."""
    directory = tmp_path_factory.mktemp("layouts")
    launch(TESTS / "distributed" / "worker.py", directory)
    return Layouts(directory)
