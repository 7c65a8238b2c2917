"""The demo's commands, shortened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from command import Command, Result, all_succeeded, megatron_bai, torchrun

STEPS = 3
SHORT = {  # enough text for a few right answers, without which there is nothing to learn from
    "pretrained": ["trainer.steps=100"],
    "instruct": ["trainer.steps=20"],
    "reasoning": ["trainer.steps=20"],
}
RL = [f"trainer.steps={STEPS}", "trainer.eval_every=2", "data.eval_prompts=16"]
ONE_PROCESS = ["parallel.tensor=1", "parallel.expert=1", "parallel.sequence=false"]


@dataclass(frozen=True)
class Demo:
    """A run directory with its checkpoints, and where commands keep what they say."""

    directory: Path
    logs: Path

    @property
    def actor(self) -> Path:
        return self.directory / "actor"

    def make(self, log: str) -> dict[str, Result]:
        """What the verbs say that make the three checkpoints and merge them."""
        supervised = {name: ["train", f"experiment=demo_{name}", *short] for name, short in SHORT.items()}
        return self.verbs(log, supervised | {"merge": ["merge", "experiment=demo"]})

    def verbs(self, log: str, cases: Mapping[str, Sequence[str | Path]]) -> dict[str, Result]:
        """Verbs that must end well, one after the other, with this run directory."""
        own = f"run.dir={self.directory}"
        return all_succeeded(self.logs / log, {name: [*words, own] for name, words in cases.items()})

    def verb(self, log: str, *words: str | Path) -> Command:
        """A verb in a process of its own, with this run directory."""
        return megatron_bai(self.logs / log, *words, f"run.dir={self.directory}")

    def reinforce(self, log: str, processes: int, *more: str | Path, merged: bool = False) -> Command:
        """The verb train of the demo from this actor; the run's directory is `log`'s unless `more` says.

        Args:
            merged: as the demo itself does, which finds its own merge done; else from the actor as a checkpoint.
        """
        directory = self.logs / log / "run"
        init = [] if merged else ["init=checkpoint", f"init.checkpoint={self.actor}"]
        words = ["train", "experiment=demo", f"run.dir={directory}", *init, *RL, *more]
        return torchrun(self.logs / log, processes, "-m", "megatron_bai", *words)
