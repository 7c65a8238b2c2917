"""Runs started with launch/torchrun.sh, and what they show."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def launched(directory: Path, nodes: tuple[Node, ...], *words: object, ranked: bool = False) -> Run:
    """torchrun.sh with the same words on each node, at once; with each one's rank where asked."""

    def start(rank: int) -> str:
        own = ["--node-rank", rank] if ranked else []
        return nodes[rank].run(TORCHRUN, *own, "--logs", directory / "logs", *words, f"run.dir={directory}")

    with ThreadPoolExecutor(len(nodes)) as pool:
        return Run(directory, list(pool.map(start, range(len(nodes)))))
