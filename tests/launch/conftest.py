"""Two nodes, and one short run that the others are compared with."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import netnodes
import pytest
from launching import TRAIN, Run, launched
from netnodes import Node


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    if why := netnodes.missing():
        pytest.skip(why)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch, netnodes.two_nodes(tmp_path_factory.mktemp("nodes")) as both:
        patch.setenv("PATH", path)  # where a checkout without .venv finds torchrun
        yield both


@pytest.fixture(scope="session")
def reference(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes on one node."""
    return launched(tmp_path_factory.mktemp("reference"), nodes[:1], "--processes", 2, *TRAIN)
