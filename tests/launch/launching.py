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
# The same layout, from rollouts; one request at a time, so that the server's batches, and the samples' bits, are alike.
STEPS = 5
REINFORCE = ["train", "experiment=demo", "init=random", f"trainer.steps={STEPS}", "trainer.eval_every=0"]
REINFORCE += ["trainer.prompts_per_step=2", "trainer.group_size=2", "trainer.mini_batches=1"]
REINFORCE += ["trainer.micro_batch_size=4", "trainer.save_every=1", "trainer.keep=99", "monitor.tensorboard=false"]
REINFORCE += ["rollout.max_new_tokens=8", "rollout.concurrency=1"]
REINFORCE += ["objective.kl_penalty=0.01", "objective.entropy_bonus=0.1"]  # something to learn whatever is sampled


@dataclass(frozen=True)
class Run:
    """A directory in which a run was, and what it showed on each node: on stdout, and on stderr."""

    directory: Path
    shown: list[str]
    said: list[str]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What each step computed."""
        (path,) = self.directory.rglob("metrics.jsonl")
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in step.items() if not _timed(name)} for step in steps]

    @property
    def logs(self) -> dict[str, str]:
        """What each rank wrote to stdout, by the path of its file."""
        return logs(self.directory, "stdout")


def _timed(name: str) -> bool:
    return name.startswith("seconds_") or name == "tokens_per_second"


def logs(directory: Path, stream: str) -> dict[str, str]:
    """What each rank of a run has written, by the path of its file."""
    found = (directory / "logs").rglob(f"{stream}.log")
    return {str(path.relative_to(directory / "logs")): path.read_text(errors="replace") for path in found}


def launched(directory: Path, nodes: tuple[Node, ...], *words: object, ranked: bool = False) -> Run:
    """torchrun.sh with the same words on each node, at once; with each one's rank where asked."""

    def start(rank: int) -> tuple[str, str]:
        own = ["--node-rank", rank] if ranked else []
        done = nodes[rank].finish(TORCHRUN, *own, "--logs", directory / "logs", *words, f"run.dir={directory}")
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout, done.stderr

    with ThreadPoolExecutor(len(nodes)) as pool:
        shown, said = zip(*pool.map(start, range(len(nodes))))
    return Run(directory, list(shown), list(said))
