"""Write the `config.json` of a checkpoint, and the files that go with its weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_bai.checkpoint.carried_files import GENERATION_CONFIG, list_carried_files, read_end_tokens
from megatron_bai.checkpoint.hf_config import CONFIG, read_raw_config
from megatron_bai.checkpoint.opened_files import OpenedFiles
from megatron_bai.config import Model
from megatron_bai.model.architecture import Architecture, architecture_of, differences, find_architecture


def write_config(
    model: Model,
    dtype: torch.dtype,
    origin: str | Path,
    target: Path,
    for_rollouts: bool = False,
    verify_origin: Callable[[], None] = lambda: None,
) -> None:
    """Write `config.json`, as transformers and SGLang read it, and copy the files that go with the weights.

    Where `origin` has a `config.json` of this architecture, it is that one, with the dtype of the weights: end tokens
    and whatever else it says stay. Else the tokenizer's end token, and others that `origin` names, become the model's.

    Args:
        model: the architecture.
        dtype: of the weights.
        origin: directory of the tokenizer, which is that of the initial checkpoint where there is one.
        target: directory to write into.
        for_rollouts: leave `generation_config.json` out, whose defaults would change samples; its end tokens stay.
        verify_origin: called once files are copied: raises where they are not those that `model` was read from.

    Raises:
        OSError: a file cannot be read or written.
        UserError: a file of `origin` was replaced while it was copied.
    """
    origin = Path(origin)
    names = list_carried_files(origin).names if origin.is_dir() else []
    names = [name for name in names if not (for_rollouts and name.name == GENERATION_CONFIG)]
    opened = OpenedFiles(origin, map(str, names))
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, target / name)
    opened.require_unchanged()
    verify_origin()
    content = _config_of(model, target)
    if content is None:
        content = hf_config(model, dtype) | _end_tokens(origin)
        (target / CONFIG).write_text(json.dumps(content, indent=1), encoding="utf-8")
        return
    changes = _changes(content, architecture_of(model), dtype)
    if for_rollouts:
        changes |= _end_tokens(origin)
    if any(content.get(key) != value for key, value in changes.items()):  # else the file stays as it is, byte for byte
        (target / CONFIG).write_text(json.dumps(content | changes, indent=2) + "\n", encoding="utf-8")


def _config_of(model: Model, directory: Path) -> dict[str, Any] | None:
    """Return what a directory's `config.json` says; None where there is none, or one of another architecture."""
    if not (directory / CONFIG).is_file():  # arguments of Megatron-LM's may be there
        return None
    described = find_architecture(directory)
    if described is None or differences(described, architecture_of(model)):
        return None
    return read_raw_config(directory)


def _changes(content: Mapping[str, Any], model: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a `config.json` says otherwise once it is written: the dtype of the weights, and what is left out."""
    dtypes = [key for key in ("dtype", "torch_dtype") if key in content] or ["torch_dtype"]
    return {**dict.fromkeys(dtypes, str(dtype).removeprefix("torch.")), **model.family.exported_values(model, content)}


def _end_tokens(directory: Path) -> dict[str, int | list[int]]:
    """Return the setting of the tokens that end a response; none where nothing names one."""
    tokens = read_end_tokens(directory)
    return {"eos_token_id": tokens if len(tokens) > 1 else tokens[0]} if tokens else {}


def hf_config(model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """Return the architecture in Hugging Face's terms, the content of a `config.json`.

    Args:
        model: the architecture.
        dtype: of the weights.

    Returns:
        JSON values by Hugging Face's names of settings; no id of an end token, which is the tokenizer's.
    """
    architecture = architecture_of(model)
    return {**architecture.raw, **_changes(architecture.raw, architecture, dtype)}
