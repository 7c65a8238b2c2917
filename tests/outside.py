"""A package from outside that brings an objective, as pip would leave it."""

from pathlib import Path

MODULE = '''
from dataclasses import dataclass

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives


@dataclass
class Reinforce(config.Policy):
    """Plain policy gradient."""

    name: str = "reinforce"
    scale: float = 1.0


def loss(logprobs, batch, settings):
    stats = Stats()
    stats.mean("surprise", -logprobs.detach()[batch.mask])
    return -settings.scale * batch.advantages[:, None] * logprobs, stats


objectives.register(objectives.Objective(loss, Reinforce, mean=lambda settings: "token_mean"))
'''


def install(place: Path) -> Path:
    """Into a directory for PYTHONPATH: the module, and the entry point that names it."""
    about = place / "outside-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "outside.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[megatron_bai.objectives]\noutside = outside\n")
    return place
