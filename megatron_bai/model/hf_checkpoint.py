"""Read and write Hugging Face checkpoints from and into a live, parallel Megatron model."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_bai.checkpoint import atomic_dir, hf_files, manifest
from megatron_bai.config import Model
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import hf_mapping
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.architecture import read_architecture as read_config  # its documented name
from megatron_bai.model.gather import drained, exchange_infos, main_shards
from megatron_bai.model.hf_config_file import hf_config, write_config
from megatron_bai.model.hf_gather import HFGather
from megatron_bai.model.hf_reader import HFReader
from megatron_bai.model.param_shards import Shard, fill_parameters

__all__ = ["HFReader", "hf_config", "hf_shapes", "iter_hf_tensors", "load_hf", "read_config", "save_hf", "write_config"]

MAX_FILE_BYTES = 4 << 30


def load_hf(modules: list[torch.nn.Module], model: Model, directory: str | Path) -> None:
    """Fill a live model, in any layout, from a Hugging Face checkpoint. *Collective*.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
        directory: of the checkpoint.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a file is not what its manifest says.
    """
    ranks, architecture = current_ranks(), architecture_of(model)
    readers: list[HFReader] = []

    def open_and_verify() -> None:
        readers.append(HFReader(directory))
        manifest.verify_weights(directory, ranks.rank, ranks.num_ranks)
        readers[0].require_tensors_of(architecture)

    ranks.run_on_all(open_and_verify)
    (reader,) = readers

    def read_slice(shard: Shard) -> torch.Tensor:
        return reader.read_slice(hf_mapping.mapping_of(shard.key, architecture), shard.index, architecture)

    ranks.run_on_all(lambda: fill_parameters(modules, read_slice))  # a rank that cannot read ends the others' wait
    ranks.run_on_all(reader.opened.require_unchanged)


def iter_hf_tensors(modules: list[torch.nn.Module], model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors of a live model in Hugging Face's form. *Collective*: every rank consumes the iterator.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.

    Yields:
        Names and complete tensors in the same order on every rank; values are defined on rank 0 alone. A tensor may be
        a view of a parameter, so what is kept is copied.
    """
    gather = HFGather(modules, model)
    for bucket, named in gather.iter_buckets(gather.plan()):
        yield from named if named is not None else ((info.name, torch.empty(0)) for info in bucket.tensors)


def hf_shapes(modules: list[torch.nn.Module], model: Model) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what `iter_hf_tensors` yields, on every rank. *Collective*.

    The shapes are the architecture's, and not those of the shards: what is sent is compared with them
    (`weight_buckets.Coverage`).

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
    """
    architecture = architecture_of(model)
    shapes: dict[str, tuple[int, ...]] = {}
    slice_ids = {(info.key, info.index) for infos in exchange_infos(main_shards(modules)) for info in infos}
    for key, index in sorted(slice_ids):
        mapping = hf_mapping.mapping_of(key, architecture)
        shapes |= zip(mapping.names(index), mapping.published_shapes(architecture), strict=True)
    return shapes


def save_hf(
    modules: list[torch.nn.Module],
    model: Model,
    target: str | Path,
    tokenizer: str | Path,
    info: dict[str, Any],
    transform: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    for_rollouts: bool = False,
    verify_origin: Callable[[], None] = lambda: None,
) -> None:
    """Write a live model as a Hugging Face checkpoint, complete or not at all. *Collective*; rank 0 writes.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
        target: directory of the checkpoint.
        tokenizer: directory whose tokenizer files are copied beside the weights.
        info: kept in the manifest.
        transform: applied to each tensor, with its name, before it is written; shape and dtype stay.
        for_rollouts: as for `write_config`.
        verify_origin: likewise.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is unchanged.
        RuntimeError: the tensors written are not exactly those `config.json` promises.
    """
    ranks = current_ranks()
    with ExitStack() as stack:
        ranks.run_on_first(lambda: stack.enter_context(atomic_dir.lock(Path(target))))
        stage = ranks.run_on_first(lambda: manifest.make_staging_dir(target))
        write = partial(_write_files, modules, model, stage, ranks.rank == 0, transform)
        files, dtype = ranks.run_on_all(write, stage)[0]

        def finalize() -> None:
            _name_and_index_files(stage, files, model)
            write_config(model, dtype, tokenizer, stage, for_rollouts, verify_origin)
            manifest.finalize(stage, target, info)

        ranks.run_on_first(finalize, stage)


def _write_files(
    modules: list[torch.nn.Module],
    model: Model,
    stage: Path,
    is_writer: bool,
    transform: Callable[[str, torch.Tensor], torch.Tensor],
) -> tuple[dict[int, list[str]], torch.dtype]:
    """Gather every tensor and write it, on the writer alone; return the names in each file, and the dtype."""
    pending: dict[str, torch.Tensor] = {}
    files: dict[int, list[str]] = defaultdict(list)
    # The model's; what it keeps in float32 whatever that is, such as an expert bias, is written so
    num_bytes, dtype = 0, next(modules[0].parameters()).dtype

    def flush() -> None:
        nonlocal pending, num_bytes
        path = stage / f"part-{len(files)}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}") from None
        files[len(files)] = list(pending)
        pending, num_bytes = {}, 0

    with drained(iter_hf_tensors(modules, model)) as tensors:
        for name, tensor in tensors:
            if not is_writer:
                continue
            pending[name] = transform(name, tensor).contiguous().cpu()
            num_bytes += tensor.nbytes
            if num_bytes >= MAX_FILE_BYTES:
                flush()
    if pending:
        flush()
    return files, dtype


def _name_and_index_files(stage: Path, files: dict[int, list[str]], model: Model) -> None:
    """Rename the files as Hugging Face names them, and write their index."""
    weight_map: dict[str, str] = {}
    for i, names in files.items():
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (stage / f"part-{i}.safetensors").rename(stage / file)
        weight_map |= dict.fromkeys(names, file)
    if set(weight_map) != set(hf_mapping.hf_names(model)):
        raise RuntimeError(
            f"exported {len(weight_map)} tensors, config.json promises {len(hf_mapping.hf_names(model))}"
        )
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (stage / hf_files.INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
