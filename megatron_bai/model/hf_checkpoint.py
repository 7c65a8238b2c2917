"""Read and write Hugging Face Qwen3-MoE checkpoints from and into a live, parallel Megatron model."""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.config import Model
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import hf_mapping
from megatron_bai.model.param_shards import Shard, fill_parameters, gather_slices, local_shards
from megatron_bai.utils.strict_json import parse

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 4 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# Our name of a setting → Hugging Face's.
_HF_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "moe_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
# What this library builds; another value means another architecture.
_SUPPORTED = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def write_config(model: Model, dtype: torch.dtype, tokenizer: str | Path, target: Path) -> None:
    """Write `config.json`, as transformers and SGLang read it, and copy the tokenizer's files beside it.

    Args:
        model: the architecture.
        dtype: of the weights.
        tokenizer: directory of the tokenizer; its end token becomes the model's, which stops generation.
        target: directory to write into.

    Raises:
        OSError: a file cannot be read or written.
    """
    content = hf_config(model, dtype)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, target / name)
    if (end := _end_token(target)) is not None:
        content["eos_token_id"] = end
    (target / "config.json").write_text(json.dumps(content, indent=1))


def _end_token(directory: Path) -> int | None:
    """Return the id of the tokenizer's end token, read from its files; None where they do not say."""
    try:
        end_token = json.loads((directory / "tokenizer_config.json").read_text()).get("eos_token")
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    except (OSError, ValueError, KeyError):
        return None
    end_token = end_token.get("content") if isinstance(end_token, dict) else end_token
    return next((token["id"] for token in added if token["content"] == end_token), None)


def hf_config(model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """Return the architecture in Hugging Face's terms, the content of a `config.json`.

    Args:
        model: the architecture.
        dtype: of the weights.

    Returns:
        JSON values by Hugging Face's names of settings; no id of an end token, which is the tokenizer's.
    """
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **_SUPPORTED,
        **{theirs: getattr(model, ours) for ours, theirs in _HF_FIELDS.items()},
        "intermediate_size": model.moe_ffn_hidden_size,  # of dense layers, of which there are none
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(directory: str | Path) -> Model:
    """Read the architecture that a checkpoint's `config.json` describes.

    Raises:
        UserError: no such file, or an architecture other than this library's Qwen3-MoE.
    """
    path = Path(directory) / "config.json"
    try:
        content = parse(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for name, value in _SUPPORTED.items():
        if content.get(name, value) != value:
            raise UserError(f"{path}: {name} is {content[name]!r}, only {value!r} is supported")
    if missing := [theirs for theirs in _HF_FIELDS.values() if theirs not in content]:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    rope = content.get("rope_parameters") or {}
    scaling = rope or content.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: its rotary embeddings are {scaling!r}, which cannot be understood")
    if scaling.get("rope_type", "default") != "default":
        raise UserError(f"{path}: scaled rotary embeddings are not supported")
    theta: Any = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    numbers = {ours: content[theirs] for ours, theirs in _HF_FIELDS.items()}
    for ours, value in (*numbers.items(), ("rope_theta", theta)):
        kinds = (int, float) if ours in ("norm_epsilon", "init_std", "rope_theta") else (int,)
        if type(value) not in kinds or not 0 <= value < math.inf or (kinds == (int,) and value == 0):
            raise UserError(f"{path}: {_HF_FIELDS.get(ours, ours)} is {value!r}, which is no size")
    return Model(rope_theta=float(theta), **numbers)


class HFReader:
    """The tensors of a safetensors checkpoint by name, each read on request."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        index = self.directory / INDEX
        try:
            if index.is_file():
                self._file_of = {name: str(file) for name, file in parse(index.read_bytes())["weight_map"].items()}
            else:
                with safe_open(self.directory / "model.safetensors", "pt") as file:
                    self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"no readable safetensors checkpoint at {directory}: {error}") from None
        for name in set(self._file_of.values()):
            if Path(name).name != name:  # an index is untrusted: it names files beside it, nothing else
                raise UserError(f"{index} names the file {name!r}, outside its directory")

    def tensor_names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._file_of)

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, on the CPU.

        Raises:
            UserError: there is none of this name, or its file cannot be read.
        """
        try:
            file = self._file_of[name]
            if file not in self._files:
                self._files[file] = safe_open(self.directory / file, "pt")
            tensor: torch.Tensor = self._files[file].get_tensor(name)
            return tensor
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(f"cannot read tensor {name} from {self.directory}: {error}") from None


def load_hf(modules: list[torch.nn.Module], model: Model, directory: str | Path) -> None:
    """Fill a live model, in any layout, from a Hugging Face checkpoint. *Collective*.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
        directory: of the checkpoint.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a file is not what its manifest says.
    """
    ranks = current_ranks()
    ranks.run_on_all(lambda: manifest.verify_weights(directory, ranks.rank, ranks.num_ranks))
    reader = HFReader(directory)
    expected = set(hf_mapping.hf_names(model))
    if difference := sorted(expected ^ reader.tensor_names()):
        state = "missing" if difference[0] in expected else "unknown"
        raise UserError(f"{directory}: {len(difference)} tensors missing or unknown, first {difference[0]} ({state})")

    def merge_tensors(shard: Shard) -> torch.Tensor:
        mapping = hf_mapping.mapping_of(shard.key)
        names = mapping.names(shard.index)
        tensors = [reader.read_tensor(name) for name in names]
        for name, tensor, part in zip(
            names, tensors, mapping.split(torch.empty(shard.shape, device="meta"), model), strict=True
        ):
            if tensor.shape != part.shape:
                shapes = tuple(tensor.shape), tuple(part.shape)
                raise UserError(f"{directory}: {name} has shape {shapes[0]}, the model needs {shapes[1]}")
        return mapping.merge(tensors, model)

    fill_parameters(modules, merge_tensors)


def iter_hf_tensors(modules: list[torch.nn.Module], model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors of a live model in Hugging Face's form. *Collective*: every rank consumes the iterator.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.

    Yields:
        Names and complete tensors in the same order on every rank; values are defined on rank 0 alone.
    """
    for key, index, tensor in gather_slices(modules):
        mapping = hf_mapping.mapping_of(key)
        if dist.get_rank() == 0:
            yield from zip(mapping.names(index), mapping.split(tensor, model), strict=True)
        else:
            yield from ((name, tensor) for name in mapping.names(index))


def hf_shapes(modules: list[torch.nn.Module], model: Model) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what `iter_hf_tensors` yields, on every rank. *Collective*.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
    """
    local_shapes = {(shard.key, shard.index): shard.shape for shard in local_shards(modules)}
    all_shapes: list[dict[tuple[str, tuple[int, ...]], tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(all_shapes, local_shapes)
    shapes: dict[str, tuple[int, ...]] = {}
    for (key, index), shape in (item for shapes_of_rank in all_shapes for item in shapes_of_rank.items()):
        mapping = hf_mapping.mapping_of(key)
        parts = mapping.split(torch.empty(shape, device="meta"), model)
        shapes |= {name: tuple(part.shape) for name, part in zip(mapping.names(index), parts, strict=True)}
    return shapes


def save_hf(
    modules: list[torch.nn.Module],
    model: Model,
    target: str | Path,
    tokenizer: str | Path,
    info: dict[str, Any],
    transform: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> None:
    """Write a live model as a Hugging Face checkpoint, complete or not at all. *Collective*; rank 0 writes.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
        target: directory of the checkpoint.
        tokenizer: directory whose tokenizer files are copied beside the weights.
        info: kept in the manifest.
        transform: applied to each tensor, with its name, before it is written; shape and dtype stay.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is unchanged.
        RuntimeError: the tensors written are not exactly those `config.json` promises.
    """
    ranks = current_ranks()
    with ExitStack() as stack:
        ranks.run_on_first(lambda: stack.enter_context(atomic_dir.lock(Path(target))))
        stage = ranks.run_on_first(lambda: manifest.make_staging_dir(target))
        files, dtype = _write_files(modules, model, stage, ranks.rank == 0, transform)

        def finalize() -> None:
            _name_and_index_files(stage, files, model)
            write_config(model, dtype, tokenizer, stage)
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
    num_bytes, dtype = 0, torch.float32

    def flush() -> None:
        nonlocal pending, num_bytes
        path = stage / f"part-{len(files)}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}") from None
        files[len(files)] = list(pending)
        pending, num_bytes = {}, 0

    for name, tensor in iter_hf_tensors(modules, model):
        if not is_writer:
            continue
        dtype = tensor.dtype
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
        (stage / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
