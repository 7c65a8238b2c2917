"""The output apart from its values: dtypes, the vocabulary's size, the sizes of chunks and of files."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.config import Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.recipe import resolve_sources
from megatron_bai.merge.recipe.sources_agree import choose_tokenizer
from megatron_bai.merge.tensor_names.param_groups import matches, param_group
from megatron_bai.utils.dataclass_defaults import drop_later_defaults

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ELSEWHERE = ("allow_different", "tokenizer", "format")  # in a fingerprint by what they choose, if at all
_ORIGINAL = ("dtype", "vocab_size", "chunk_bytes", "file_bytes")  # the fields that fingerprints always had
ROUTER_BIAS = re.compile(r"\b(expert_bias|e_score_correction_bias)$")  # which both engines keep in float32


@dataclass(frozen=True)
class OutputSpec:
    """How the output is written; the defaults take everything from the pretrained checkpoint.

    Attributes:
        dtype: of the tensors, or None.
        vocab_size: number of rows of the vocabulary's tensors that are a token's, or 0: what the checkpoints say.
        chunk_bytes: the largest `torch_dist` chunk, or 0.
        file_bytes: size to which output files are filled, or 0.
        keep: patterns of tensors that stay as they are in the pretrained checkpoint.
        allow_different: what sources may say differently; no part of fingerprints, as nothing is written otherwise.
        tokenizer: directory of the source whose tokenizer is taken, or None; its files' contents are in fingerprints.
        format: `hf` or `megatron`, or empty; the names of the tensors are in fingerprints.
    """

    dtype: torch.dtype | None = None
    vocab_size: int = 0
    chunk_bytes: int = 0
    file_bytes: int = 0
    keep: tuple[str, ...] = ()
    allow_different: tuple[str, ...] = ()
    tokenizer: Path | None = None
    format: str = ""

    def fingerprint_fields(self) -> tuple[Any, ...]:
        """Return what a fingerprint has of it: fields that came later only where they do not have their default."""
        names = (field.name for field in fields(self) if field.name not in _ELSEWHERE)
        values = {name: getattr(self, name) for name in names}
        kept = drop_later_defaults(values, type(self), _ORIGINAL)
        return (*(kept.pop(name) for name in _ORIGINAL), *sorted(kept.items()))


def make_output_spec(settings: Merge) -> OutputSpec:
    """Make the specification that the settings ask for.

    Raises:
        UserError: two settings contradict each other.
    """
    if 0 < settings.file_mib < settings.chunk_mib:
        raise UserError(
            f"merge.file_mib is {settings.file_mib} and merge.chunk_mib is {settings.chunk_mib}: a chunk lies in one"
            " file, so a file must not be smaller"
        )
    for pattern in settings.keep:
        try:
            matches(pattern, "")
        except re.error as error:
            raise UserError(f"merge.keep: {pattern!r} is neither a group nor a regular expression: {error}") from None
    pretrained, members = resolve_sources(settings.pretrained, settings.members)
    tokenizer = choose_tokenizer(settings.tokenizer, pretrained, members)
    sizes = settings.vocab_size, settings.chunk_mib << 20, settings.file_mib << 20
    return OutputSpec(
        DTYPES.get(settings.dtype),
        *sizes,
        tuple(settings.keep),
        tuple(settings.allow_different),
        tokenizer,
        settings.format,
    )


def choose_output_dtypes(
    tensors: Mapping[str, TensorInfo],
    requested: torch.dtype | None,
    members: Iterable[Mapping[str, TensorInfo]] = (),
) -> dict[str, torch.dtype]:
    """Return the dtype of every output tensor: `requested` for floating point, the base's for the rest.

    The pretrained checkpoint's dtype also stays where it is wider than that of the embeddings, such as float32 for a
    router's weights. A router's bias gets the widest of all sources' and `requested`: it is a sum of small steps.

    Args:
        tensors: of the pretrained checkpoint, by key.
        requested: `merge.dtype`, or None.
        members: the tensors of the other sources, by the same keys.
    """
    floating = {key: entry.dtype for key, entry in tensors.items() if entry.dtype.is_floating_point}
    dtypes = {key: entry.dtype for key, entry in tensors.items()}
    if requested is not None:
        embeddings = [dtype.itemsize for key, dtype in floating.items() if param_group(key) == "embeddings"]
        narrowest = min(embeddings or [dtype.itemsize for dtype in floating.values()], default=0)
        for key, dtype in floating.items():
            if dtype.itemsize <= narrowest and not ROUTER_BIAS.search(key):
                dtypes[key] = requested
    biases = [key for key in floating if ROUTER_BIAS.search(key)]
    wider = [{key: each[key].dtype for key in biases} for each in members]
    wider += [dict.fromkeys(biases, requested)] if requested is not None else []
    for key in biases:
        dtypes[key] = max((dtypes[key], *(each[key] for each in wider)), key=lambda dtype: dtype.itemsize)
    return dtypes


def config_with_dtype(text: str, dtype: torch.dtype) -> str:
    """Return a `config.json` with the dtype that the tensors have, in which transformers loads them.

    Args:
        text: of the file.
        dtype: of the tensors; it replaces `dtype` and `torch_dtype`, also in `text_config`, where the file has them.

    Returns:
        The new text; all other keys are unchanged.
    """
    config = json.loads(text)
    for section in (config, config.get("text_config") or {}):
        for name in ("dtype", "torch_dtype"):
            if name in section:
                section[name] = str(dtype).removeprefix("torch.")
    return json.dumps(config, indent=2) + "\n"
