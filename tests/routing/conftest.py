"""One process in which Megatron-Core does all that the tests of replay look at."""

from typing import Any

import pytest
import torch
from processes import TESTS, launch


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `replay_worker.py` left."""
    path = tmp_path_factory.mktemp("replay") / "facts.pt"
    launch(TESTS / "routing" / "replay_worker.py", path)
    return torch.load(path)
