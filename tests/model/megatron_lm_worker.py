"""Run as a script: checkpoints as Megatron-LM leaves them. Argument: a directory.

Leaves `ours/iter_0000012`, as it is written here, and `theirs/iter_0000300`: the same weights with the vocabulary
padded, and nothing but Megatron-Core's files, Megatron-LM's arguments and the tracker. `hf` has the weights as they
are published. `found.pt`: what Megatron-LM's loader asks for, as it gets it from `ours`.
"""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

import torch
from moe import MODEL

from megatron_bai import config
from megatron_bai.distributed import backend
from megatron_bai.model import build, hf_checkpoint, megatron_checkpoint, param_shards

PADDED = 64


def make(model: config.Model, device: backend.Device) -> build.MegatronModel:
    return build.build_actor(config.Config(model=model), device, train=False)


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "empty").mkdir()
    device = backend.init_backend(config.Backend(kind="cpu"))
    build.init_parallel(config.Parallel(), seed=0)
    actor = make(MODEL, device)
    param_shards.init_random(actor.modules, MODEL, seed=3)
    megatron_checkpoint.save(actor, directory / "ours" / "iter_0000012", directory / "empty", {})
    hf_checkpoint.save_hf(actor.modules, MODEL, directory / "hf", directory / "empty", {})
    weights = dict(actor.modules[0].named_parameters())
    from megatron.core import dist_checkpointing

    ours = str(directory / "ours" / "iter_0000012")
    common = dist_checkpointing.load_common_state_dict(ours)
    # as `generate_state_dict` names it for one chunk of a model
    loaded = dist_checkpointing.load({"model": make(MODEL, device).modules[0].sharded_state_dict()}, ours)
    same = all(torch.equal(loaded["model"][name], value) for name, value in weights.items())
    # a vocabulary that is padded there
    wide = dist_checkpointing.load(
        {"model": make(dataclasses.replace(MODEL, vocab_size=PADDED), device).modules[0].sharded_state_dict()}, ours
    )
    rows = "embedding.word_embeddings.weight"
    same = same and torch.equal(wide["model"][rows][: MODEL.vocab_size], weights[rows])
    padded = make(dataclasses.replace(MODEL, vocab_size=PADDED), device)
    for name, value in padded.modules[0].named_parameters():
        value.data.fill_(7.0)
        value.data[tuple(slice(0, size) for size in weights[name].shape)] = weights[name].data
    theirs = directory / "theirs" / "iter_0000300"
    theirs.parent.mkdir()
    theirs.mkdir()
    changes = {"vocab_size": MODEL.vocab_size, "exit_signal": signal.SIGTERM}
    state = {"args": argparse.Namespace(**vars(common["args"]) | changes), "iteration": 300}
    state["model"] = padded.modules[0].sharded_state_dict()
    dist_checkpointing.save(state, str(theirs))
    (theirs.parent / "latest_checkpointed_iteration.txt").write_text("300\n")
    torch.save({"common": {**common, "args": vars(common["args"])}, "same": same}, directory / "found.pt")
    backend.shutdown_backend()


if __name__ == "__main__":
    main()
