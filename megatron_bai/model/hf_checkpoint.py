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
        tokenizer: directory of the tokenizer; its end token becomes the model's, which stops generation.
    """
    described = hf_config(model, dtype)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, target / name)
    if (end := _end_token(target)) is not None:
        described["eos_token_id"] = end
    (target / "config.json").write_text(json.dumps(described, indent=1))


def _end_token(directory: Path) -> int | None:
    """Id of the tokenizer's end token, read from its files."""
    try:
        word = json.loads((directory / "tokenizer_config.json").read_text()).get("eos_token")
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    except (OSError, ValueError, KeyError):
        return None
    word = word.get("content") if isinstance(word, dict) else word
    return next((token["id"] for token in added if token["content"] == word), None)


def hf_config(model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """The architecture in Hugging Face's terms."""
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
    """The architecture a checkpoint's `config.json` describes.

    Raises:
        UserError: no such file, or an architecture other than this library's Qwen3-MoE.
    """
    path = Path(directory) / "config.json"
    try:
        found = parse(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for name, value in _SUPPORTED.items():
        if found.get(name, value) != value:
            raise UserError(f"{path}: {name} is {found[name]!r}, only {value!r} is supported")
    if missing := [theirs for theirs in _HF_FIELDS.values() if theirs not in found]:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    rope = found.get("rope_parameters") or {}
    scaling = rope or found.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: its rotary embeddings are {scaling!r}, which cannot be understood")
    if scaling.get("rope_type", "default") != "default":
        raise UserError(f"{path}: scaled rotary embeddings are not supported")
    theta: Any = rope.get("rope_theta", found.get("rope_theta", 10000.0))
    numbers = {ours: found[theirs] for ours, theirs in _HF_FIELDS.items()}
    for ours, value in (*numbers.items(), ("rope_theta", theta)):
        kinds = (int, float) if ours in ("norm_epsilon", "init_std", "rope_theta") else (int,)
        if type(value) not in kinds or not 0 <= value < math.inf or (kinds == (int,) and value == 0):
            raise UserError(f"{path}: {_HF_FIELDS.get(ours, ours)} is {value!r}, which is no size")
    return Model(rope_theta=float(theta), **numbers)


class HFReader:
    """Tensors of a safetensors checkpoint by name, each read when asked for."""

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
        return set(self._file_of)

    def read_tensor(self, name: str) -> torch.Tensor:
        try:
            file = self._file_of[name]
            if file not in self._files:
                self._files[file] = safe_open(self.directory / file, "pt")
            tensor: torch.Tensor = self._files[file].get_tensor(name)
            return tensor
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(f"cannot read tensor {name} from {self.directory}: {error}") from None


def load_hf(modules: list[torch.nn.Module], model: Model, directory: str | Path) -> None:
    """Fill a live model, in any layout, from a Hugging Face checkpoint.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a file is not what its manifest says.
    """
    group = current_ranks()
    group.run_on_all(lambda: manifest.verify_weights(directory, group.rank, group.num_ranks))
    reader = HFReader(directory)
    wanted = set(hf_mapping.hf_names(model))
    if difference := sorted(wanted ^ reader.tensor_names()):
        state = "missing" if difference[0] in wanted else "unknown"
        raise UserError(f"{directory}: {len(difference)} tensors missing or unknown, first {difference[0]} ({state})")

    def whole(shard: Shard) -> torch.Tensor:
        kind = hf_mapping.mapping_of(shard.key)
        names = kind.names(shard.index)
        tensors = [reader.read_tensor(name) for name in names]
        for name, tensor, part in zip(names, tensors, kind.split(torch.empty(shard.shape, device="meta"), model), strict=True):
            if tensor.shape != part.shape:
                shapes = tuple(tensor.shape), tuple(part.shape)
                raise UserError(f"{directory}: {name} has shape {shapes[0]}, the model needs {shapes[1]}")
        return kind.merge(tensors, model)

    fill_parameters(modules, whole)


def iter_hf_tensors(modules: list[torch.nn.Module], model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a live model under Hugging Face's name, whole, one after the other. Every rank must consume the
    iterator; collective.

    Yields:
        Names and tensors in the same order on every rank; values are defined on rank 0 alone.
    """
    for key, index, tensor in gather_slices(modules):
        kind = hf_mapping.mapping_of(key)
        if dist.get_rank() == 0:
            yield from zip(kind.names(index), kind.split(tensor, model), strict=True)
        else:
            yield from ((name, tensor) for name in kind.names(index))


def hf_shapes(modules: list[torch.nn.Module], model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `tensors` yields, on every rank. Collective."""
    mine = {(shard.key, shard.index): shard.shape for shard in local_shards(modules)}
    everyone: list[dict[tuple[str, tuple[int, ...]], tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    found: dict[str, tuple[int, ...]] = {}
    for (key, index), shape in (item for own in everyone for item in own.items()):
        kind = hf_mapping.mapping_of(key)
        parts = kind.split(torch.empty(shape, device="meta"), model)
        found |= {name: tuple(part.shape) for name, part in zip(kind.names(index), parts, strict=True)}
    return found


def save_hf(
    modules: list[torch.nn.Module],
    model: Model,
    target: str | Path,
    tokenizer: str | Path,
    info: dict[str, Any],
    transform: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> None:
    """Write a live model as a Hugging Face checkpoint, complete or not at all. Collective; rank 0 writes.

    Args:
        tokenizer: directory whose tokenizer files are copied beside the weights.
        info: kept in the manifest.
        change: of each tensor, by name, before it is written; shape and dtype stay.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is as it was.
        RuntimeError: the tensors written are not exactly those `config.json` promises.
    """
    group = current_ranks()
    with ExitStack() as stack:
        group.run_on_first(lambda: stack.enter_context(atomic_dir.lock(Path(target))))
        stage = group.run_on_first(lambda: manifest.make_staging_dir(target))
        files, dtype = _write_files(modules, model, stage, group.rank == 0, transform)

        def finish() -> None:
            _name_and_index_files(stage, files, model)
            write_config(model, dtype, tokenizer, stage)
            manifest.finalize(stage, target, info)

        group.run_on_first(finish, stage)


def _write_files(
    modules: list[torch.nn.Module],
    model: Model,
    stage: Path,
    is_writer: bool,
    transform: Callable[[str, torch.Tensor], torch.Tensor],
) -> tuple[dict[int, list[str]], torch.dtype]:
    """Gather every tensor and write it, on the lead alone; returns the names in each file, and the dtype."""
    pending: dict[str, torch.Tensor] = {}
    files: dict[int, list[str]] = defaultdict(list)
    size, dtype = 0, torch.float32

    def flush() -> None:
        nonlocal pending, size
        path = stage / f"part-{len(files)}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}") from None
        files[len(files)] = list(pending)
        pending, size = {}, 0

    for name, tensor in iter_hf_tensors(modules, model):
        if not is_writer:
            continue
        dtype = tensor.dtype
        pending[name] = transform(name, tensor).contiguous().cpu()
        size += tensor.nbytes
        if size >= MAX_FILE_BYTES:
            flush()
    if pending:
        flush()
    return files, dtype


def _name_and_index_files(stage: Path, files: dict[int, list[str]], model: Model) -> None:
    """Name the files as Hugging Face does, and index them."""
    weight_map: dict[str, str] = {}
    for number, names in files.items():
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (stage / f"part-{number}.safetensors").rename(stage / file)
        weight_map |= dict.fromkeys(names, file)
    if set(weight_map) != set(hf_mapping.hf_names(model)):
        raise RuntimeError(f"exported {len(weight_map)} tensors, config.json promises {len(hf_mapping.hf_names(model))}")
    if len(files) > 1:
        (stage / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
