"""Run as a script: sources that are replaced while `convert` or `train` reads them. Argument: a directory.

Each of CASES is a fork; `CASE.json` holds what it raised, empty where nothing, and whether a target came of it.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing
from moe import MODEL
from processes import prepare

from megatron_bai import config
from megatron_bai.checkpoint.common_state import COMMON, COMMON_OBJECT
from megatron_bai.checkpoint.torch_dist import TorchDistReader

# verb, format of the source, what is replaced once the weights are read
CASES = [
    ("convert", "hf", "config.json"),
    ("convert", "hf", "tokenizer.json"),
    ("convert", "hf", "model.safetensors"),
    ("convert", "hf", "nothing"),
    ("convert", "megatron", "common state"),
    ("convert", "megatron", "generation_config.json"),
    ("convert", "megatron", "directory"),
    ("convert", "megatron", "log"),
    ("train", "hf", "config.json"),
    ("train", "hf", "nothing"),
    ("train", "megatron", "tokenizer.json"),
    ("train", "megatron", "log"),
]
FILES = {
    "tokenizer.json": '{"added_tokens": [5, {"id": 9, "content": "<e>"}]}',
    "tokenizer_config.json": '{"eos_token": {"content": "<e>"}}',
    "generation_config.json": '{"eos_token_id": [5, 7]}',
    "train.log": "begun",
}


def build(settings: config.Config):  # noqa: ANN201, types of Megatron-Core
    from megatron_bai.distributed import backend
    from megatron_bai.model import build

    device = backend.init_backend(settings.backend)
    build.init_parallel(settings.parallel, seed=0)
    return build.build_actor(settings, device, train=False)


def make_sources(rank: int, directory: Path) -> None:
    """A random model in both formats, in a source of its own for each case."""
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint, param_shards

    settings = config.Config(model=MODEL, backend=config.Backend(kind="cpu"))
    actor, origin = build(settings), directory / "files"
    origin.mkdir()
    for name, text in FILES.items():
        (origin / name).write_text(text)
    param_shards.init_random(actor.modules, MODEL, 1)
    hf_checkpoint.save_hf(actor.modules, MODEL, directory / "hf", origin, {})
    megatron_checkpoint.save(actor, directory / "megatron", origin, {})
    for form in ("hf", "megatron"):
        (directory / form / "train.log").write_text("begun")
    for case in CASES:
        shutil.copytree(directory / case[1], directory / "-".join(case))


def replace(source: Path, what: str) -> str:
    """Replace a file by another one of the same content, or the directory, or write on into a log.

    Returns:
        The name of the file that was replaced; empty where none was.
    """
    if what == "log":
        with open(source / "train.log", "a") as log:
            log.write(" and going on")
    elif what == "directory":
        shutil.copytree(source, source.with_name("other"))
        source.rename(source.with_name("before"))
        source.with_name("other").rename(source)
    elif what != "nothing":
        name = file_of_common_state(source) if what == "common state" else what
        shutil.copy(source / name, source / "new")
        (source / "new").replace(source / name)
        return name
    return ""


def file_of_common_state(source: Path) -> str:
    """The file that has the state that is not sharded, whatever release wrote it."""
    with TorchDistReader(source) as reader:
        return reader.objects[COMMON_OBJECT].file if COMMON_OBJECT in reader.objects else COMMON


def run(rank: int, directory: Path, verb: str, form: str, what: str) -> None:
    from megatron_bai.errors import UserError
    from megatron_bai.model import convert, hf_checkpoint, megatron_checkpoint
    from megatron_bai.rl import init_weights

    source = directory / f"{verb}-{form}-{what}"

    def then_replace(load: Callable[..., object]) -> Callable[..., object]:
        def loaded(*arguments: object) -> object:
            nonlocal replaced
            result = load(*arguments)
            replaced = replace(source, what)
            return result

        return loaded

    hf_checkpoint.load_hf = then_replace(hf_checkpoint.load_hf)
    megatron_checkpoint.load = then_replace(megatron_checkpoint.load)
    target, said, replaced = source.with_name(f"{source.name}-target"), "", ""
    settings = config.Config(
        model=MODEL, backend=config.Backend(kind="cpu"), init=config.CheckpointInit(checkpoint=str(source))
    )
    try:
        if verb == "convert":
            convert.convert(settings, source, target, "megatron" if form == "hf" else "hf")
        else:
            init_weights.load_initial_weights(build(settings), settings)
    except UserError as error:
        said = str(error)
    source.with_name(f"{source.name}.json").write_text(
        json.dumps({"said": said, "replaced": replaced, "target": target.exists()})
    )


def main(directory: Path) -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.session")
    torch.multiprocessing.start_processes(make_sources, (directory,), nprocs=1, start_method="fork")
    for case in CASES:
        torch.multiprocessing.start_processes(run, (directory, *case), nprocs=1, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main(Path(sys.argv[1]))
