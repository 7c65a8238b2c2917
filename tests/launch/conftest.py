"""Two nodes, and one short run that the others are compared with."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netnodes
import pytest
from netnodes import Node
from processes import TESTS

TORCHRUN = TESTS.parent / "launch" / "torchrun.sh"
# Two processes, in a layout that has collectives in every layer.
TRAIN = ["train", "experiment=demo_pretrained", "trainer.steps=4"]
TRAIN += ["parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true"]


@dataclass(frozen=True)
class Run:
    """A directory in which a run was, and what it showed on each node."""

    directory: Path
    shown: list[str]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What each step computed."""
        lines = (self.directory / "pretrained-log" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return [{name: value for name, value in step.items() if name != "seconds_step"} for step in steps]

    @property
    def logs(self) -> dict[str, str]:
        """What each rank wrote to stdout, by the path of its file."""
        found = (self.directory / "logs").rglob("stdout.log")
        return {str(path.relative_to(self.directory / "logs")): path.read_text() for path in found}


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    if why := netnodes.missing():
        pytest.skip(why)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch, netnodes.two_nodes(tmp_path_factory.mktemp("nodes")) as both:
        patch.setenv("PATH", path)  # where a checkout without .venv finds torchrun
        yield both


def launched(directory: Path, nodes: tuple[Node, ...], *words: object, ranked: bool = False) -> Run:
    """torchrun.sh with the same words on each node, at once; with each one's rank where asked."""

    def start(rank: int) -> str:
        own = ["--node-rank", rank] if ranked else []
        return nodes[rank].run(TORCHRUN, *own, "--logs", directory / "logs", *words, f"run.dir={directory}")

    with ThreadPoolExecutor(len(nodes)) as pool:
        return Run(directory, list(pool.map(start, range(len(nodes)))))


@pytest.fixture(scope="session")
def reference(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes on one node."""
    return launched(tmp_path_factory.mktemp("reference"), nodes[:1], "--processes", 2, *TRAIN)
