"""Work of Megatron-Core that several directories of tests look at, done once."""

import pytest
from processes import TESTS, Layouts, launch


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """All cases of `distributed/worker.py`."""
    directory = tmp_path_factory.mktemp("layouts")
    launch(TESTS / "distributed" / "worker.py", directory)
    return Layouts(directory)
