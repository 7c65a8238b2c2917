"""Run as a script: actors that start from a merge done on the fly, beside the verb merge. Argument: a directory.

Megatron-Core is imported once; each world of ranks is forked from here. `FORMAT/` holds three sources, the verb's
output `merged`, and for each world `WORLD/actor`, what `init=merge` merged, `WORLD/routing.json`, what is measured of
its routing, and `WORLD/hf`, the weights the actor has after that; `megatron/loaded` has the weights of an actor that
started from `merged`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch.multiprocessing
from moe import MODEL
from processes import free_port, prepare

from megatron_bai import config

SOURCES = ("pretrained", "instruct", "reasoning")
LAYOUTS = {1: config.Parallel(), 2: config.Parallel(tensor=2, expert=2, sequence=True)}
STARTS = [("megatron", 1), ("megatron", 2), ("hf", 2)]  # the format of the sources, and the processes


def settings_of(directory: Path, init: config.Init, output: Path, world: int = 1) -> config.Config:
    pretrained, *members = (str(directory / name) for name in SOURCES)
    merge = config.Merge(pretrained=pretrained, members=members, weights=[0.25, 0.75], alpha=0.3, output=str(output))
    model = dataclasses.replace(MODEL, vocab_size=64, max_position_embeddings=128)  # as the task needs
    run, backend = config.Run(dir=str(directory / "run")), config.Backend(kind="cpu", timeout_s=120)
    return config.Config(run=run, backend=backend, model=model, parallel=LAYOUTS[world], init=init, merge=merge)


def sources(rank: int, directory: Path) -> None:
    """Three random models, in both formats."""
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint, param_shards
    from megatron_bai.rl.session import open_session

    with open_session(settings_of(directory, config.RandomInit(), directory)) as session:
        for seed, name in enumerate(SOURCES):
            param_shards.init_random(session.actor.modules, session.settings.model, seed)
            megatron_checkpoint.save(session.actor, directory / "megatron" / name, session.tokenizer_dir, {})
            target = directory / "hf" / name
            hf_checkpoint.save_hf(session.actor.modules, session.settings.model, target, session.tokenizer_dir, {})


def start(rank: int, world: int, port: int, directory: Path, init: config.Init, output: Path, weights: Path) -> None:
    """One rank that starts as `init` says and leaves the weights it then has."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_bai.model import hf_checkpoint
    from megatron_bai.rl.merge_routing import measure_merge_routing
    from megatron_bai.rl.session import open_session

    with open_session(settings_of(directory, init, output, world)) as session:
        measured = measure_merge_routing(session)
        if rank == 0 and measured:
            weights.with_name("routing.json").write_text(json.dumps(measured))
        hf_checkpoint.save_hf(session.actor.modules, session.settings.model, weights, session.tokenizer_dir, {})


def worlds(world: int, directory: Path, init: config.Init, output: Path, weights: Path) -> None:
    arguments = world, free_port(), directory, init, output, weights
    torch.multiprocessing.start_processes(start, arguments, nprocs=world, start_method="fork")


def main(directory: Path) -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.merge_routing")
    from megatron_bai.cli import merge as merge_verb

    torch.multiprocessing.start_processes(sources, (directory,), nprocs=1, start_method="fork")
    for form in ("megatron", "hf"):
        merge_verb.run(settings_of(directory / form, config.RandomInit(), directory / form / "merged"))
    own = directory / "megatron"
    worlds(1, own, config.CheckpointInit(checkpoint=str(own / "merged")), own, own / "loaded")
    for form, world in STARTS:
        own = directory / form / str(world)
        worlds(world, directory / form, config.MergeInit(), own / "actor", own / "hf")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main(Path(sys.argv[1]))
