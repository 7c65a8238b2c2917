"""The part of the verb `inspect` that runs a model and its parents on prompts, and prints how they route."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from megatron_bai import config
from megatron_bai.checkpoint import formats
from megatron_bai.checkpoint.carried_files import PROVENANCE, has_provenance
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.model.architecture import read_architecture
from megatron_bai.utils import strict_json
from megatron_bai.utils.terminal_text import make_console


def is_wanted(settings: config.Inspect) -> bool:
    """Return whether routes are to be recorded: where it is said, or prompts or parents are given."""
    return bool(settings.routing or settings.parents or settings.prompts)


def inspect_routing(settings: config.Config) -> None:
    """Record the routes of `inspect.path` and of its parents on prompts, and print them on rank 0. *Collective*.

    Raises:
        UserError: no parents, prompts or models that can be used, or a layout that the model does not fit.
    """
    from megatron_bai.model.load_weights import load_weights
    from megatron_bai.rl.merge_routing import compare_routing, describe_kept
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    path, parents = settings.inspect.path, list_parents(settings.inspect)
    for directory in (path, *parents):
        formats.require_model(directory)
        formats.require_complete(directory)
    settings = dataclasses.replace(settings, model=read_architecture(path))
    sequences = _read_sequences(settings)
    device = backend.init_backend(settings.backend)
    try:
        build.validate_layout(settings.model, settings.parallel, dist.get_world_size())
        build.init_parallel(settings.parallel, seed=0, timeout_s=settings.backend.timeout_s)
        actor = build.build_actor(settings, device, train=False)
        replay = RoutingReplay(actor.modules)
        load_weights(actor, path)
        merged, found = compare_routing(actor, replay, parents, sequences)
        if dist.get_rank() == 0:
            console = make_console(soft_wrap=True)
            console.print(_make_table(f"routing of {path}", merged, compared=False))
            for parent in found:
                console.print(_make_table(f"routing of {parent.path}", parent.layers, compared=True))
            if found:
                console.print(describe_kept(found, len(sequences)))
    finally:
        backend.shutdown_backend()


def list_parents(settings: config.Inspect) -> list[str]:
    """Return the checkpoints whose routes are compared: `inspect.parents`, or else the sources of a merge.

    Raises:
        UserError: a source that the merge's provenance names is there no longer, or the provenance cannot be read.
    """
    if settings.parents or not has_provenance(Path(settings.path)):
        return list(settings.parents)
    file = Path(settings.path) / PROVENANCE
    try:
        sources = [str(source["path"]) for source in strict_json.parse(file.read_bytes())["sources"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): restore the checkpoint from a copy") from None
    if lost := [source for source in sources if not Path(source).is_dir()]:
        raise UserError(f"{lost[0]}, a source of {settings.path}, is not there: give inspect.parents")
    return sources


def _read_sequences(settings: config.Config) -> Sequence[Sequence[int]]:
    """Return the token ids of the texts to run: of the rows given, or of the prompts that `data` describes."""
    from megatron_bai.data.row_texts import read_texts
    from megatron_bai.rl.run_task import load_tokenizer, make_task

    data, inspect = settings.data, settings.inspect
    if not inspect.prompts:
        task = make_task(settings, Path(inspect.path), print)
        prompts = task.prompts("train", settings.run.seed, 0, inspect.count)
        return [prompt.ids for prompt in prompts]
    rows = data if isinstance(data, config.Dataset) else config.Dataset()
    tokenizer = load_tokenizer(Path(inspect.path))
    return read_texts(inspect.prompts, "inspect.prompts", rows, tokenizer, inspect.count)


def _make_table(title: str, layers: Sequence[Any], compared: bool) -> Table:
    """Make a table with a row for each MoE layer."""
    table = Table("layer", "experts used", "entropy, nats", "margin", title=title, title_justify="left")
    for name in ("routes kept", "overlap") if compared else ():
        table.add_column(name)
    for layer in layers:
        shares = (f"{layer.kept:.1%}", f"{layer.overlap:.3f}") if compared else ()
        table.add_row(str(layer.layer), f"{layer.experts:.2f}", f"{layer.entropy:.3f}", f"{layer.margin:.3f}", *shares)
    return table
