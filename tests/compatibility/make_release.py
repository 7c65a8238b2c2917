"""`python make_release.py TARGET`: a checkpoint as Megatron-LM leaves it with the installed Megatron-Core.

Run it with the wanted release first on the path (`data/releases/README.md`). TARGET then has the tracker and one
iteration, with Megatron-Core's own files alone.
"""

import argparse
import sys
from pathlib import Path

from packaging.version import Version

from megatron_bai import config
from megatron_bai.compat import releases
from megatron_bai.distributed import backend
from megatron_bai.model import build, megatron_lm, param_shards
from megatron_bai.model.architecture import architecture_of

MODEL = config.Model(
    num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, head_dim=4, num_experts=2, moe_topk=2,
    moe_ffn_hidden_size=4, vocab_size=64, max_position_embeddings=64,
)  # fmt: skip
ITERATION = 3


def release_seed(release: str) -> int:
    """Of the weights: the releases save different ones, so that a mix of them shows."""
    return Version(release).minor


def save(target: Path) -> None:
    device = backend.init_backend(config.Backend(kind="cpu"))
    build.init_parallel(config.Parallel(), seed=0)
    from megatron.core import dist_checkpointing

    actor = build.build_actor(config.Config(model=MODEL), device, train=False)
    param_shards.init_random(actor.modules, MODEL, seed=release_seed(releases.installed_megatron() or ""))
    path = target / f"iter_{ITERATION:07d}"
    path.mkdir(parents=True)
    arguments = argparse.Namespace(**megatron_lm.arguments(architecture_of(MODEL)))
    state = {"args": arguments, "iteration": ITERATION, "checkpoint_version": 3.0}
    dist_checkpointing.save({**state, "model": actor.modules[0].sharded_state_dict()}, str(path))
    (target / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    backend.shutdown_backend()


if __name__ == "__main__":
    save(Path(sys.argv[1]))
