"""The verb `convert`: Megatron torch_dist ↔ Hugging Face safetensors, in one process."""

import logging
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir, formats
from megatron_bai.checkpoint.carried_files import list_carried_files
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.checkpoint.weight_checks import is_state
from megatron_bai.distributed import backend
from megatron_bai.errors import PermanentError, UserError
from megatron_bai.model import build, hf_checkpoint, megatron_checkpoint
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.required_tensors import require_tensors

_log = logging.getLogger(__name__)
_SHOWN = 3  # names in a line


def convert(settings: config.Config, source: str | Path, target: str | Path, to: str) -> None:
    """Load a checkpoint of either format and write it in format `to` (`hf` or `megatron`).

    The whole model is held in memory once. The architecture comes from the source's `config.json`. What is rounded, and
    which files are not carried, is logged.

    Args:
        settings: of which `backend` alone is used: device and dtype of the model.
        source: directory of the checkpoint, with its tokenizer and the other files that are carried.
        target: directory to write, complete or not at all; an earlier checkpoint there is replaced.
        to: `hf` or `megatron`.

    Raises:
        UserError: there is no complete checkpoint of a supported architecture at `source`, the target cannot be
            written, or there are several processes.
    """
    kind = formats.require_model(source)  # before its configuration decides how much memory is asked for
    with formats.open_checkpoint(source) as reader:
        _convert_opened(settings, reader, kind, target, to)


def _convert_opened(settings: config.Config, reader: CheckpointReader, kind: str, target: str | Path, to: str) -> None:
    """Convert a checkpoint whose files are still those of the open `reader` when the target is complete."""
    source = reader.path
    notes = describe_losses(reader, settings.backend.dtype)
    architecture = read_architecture(source)
    require_tensors(source, architecture)  # before memory is taken for them
    # Nothing is computed, and parameters have the same names in local layers, which need no package
    whole = config.Config(backend=replace(settings.backend, transformer_impl="local"), model=architecture)
    device = backend.init_backend(whole.backend)
    try:
        if dist.get_world_size() > 1:
            raise UserError("convert runs in one process: start it without torchrun")
        build.init_parallel(whole.parallel, seed=0)
        actor = build.build_actor(whole, device, train=False)
        if kind == "hf":
            hf_checkpoint.load_hf(actor.modules, architecture, source)
        else:
            megatron_checkpoint.load(actor, source)
        info, unchanged = {"converted_from": str(source)}, reader.require_unchanged
        if to == "hf":
            hf_checkpoint.save_hf(actor.modules, architecture, target, source, info, verify_origin=unchanged)
        else:
            megatron_checkpoint.save(actor, target, source, info, unchanged)
        for note in notes:
            _log.warning(note)
    except PermanentError:  # of what is written nothing can be used
        with suppress(UserError), atomic_dir.lock(Path(target)):
            atomic_dir.remove_leftovers(Path(target))
        raise
    finally:
        backend.shutdown_backend()


def describe_losses(reader: CheckpointReader, dtype: str) -> list[str]:
    """Say what a checkpoint loses where a model of one dtype is filled from it and written again.

    Args:
        reader: of the checkpoint.
        dtype: of the model: `backend.dtype`.

    Returns:
        A line about tensors of each other dtype, and one about files that are not carried; none where nothing is lost.
    """
    source, lines = reader.path, []
    others: dict[torch.dtype, list[str]] = defaultdict(list)
    kept: torch.dtype = getattr(torch, dtype)
    for key, entry in reader.tensors.items():
        if entry.dtype.is_floating_point and entry.dtype != kept and not is_state(key):
            others[entry.dtype].append(key)
    for other, keys in others.items():
        name, count = str(other).removeprefix("torch."), f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}"
        shown = f"{', '.join(keys[:_SHOWN])}{f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''}"
        if other.itemsize > kept.itemsize or (other, kept) == (torch.float16, torch.bfloat16):
            lines.append(f"rounded from {name} to {dtype} (backend.dtype): {count} of {source}, {shown}")
        else:
            lines.append(f"written as {dtype} (backend.dtype), not {name}: {count} of {source}")
    if left_out := list_carried_files(source, reader.own_files()).describe_left_out(source):
        lines.append(left_out)
    return lines
