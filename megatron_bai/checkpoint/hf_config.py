"""What a checkpoint's `config.json` means: the values transformers makes of what it says and of what it leaves out.

A model is loaded with transformers' defaults for missing keys, which differ from model type to model type, and with its
reading of older spellings (`rope_scaling.type`, `torch_dtype`). So the file is parsed here within bounds, and then
given to transformers' `AutoConfig`, from local files and without the checkpoint's own code. SGLang reads it likewise.
"""

import codecs
import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.utils.strict_json import parse

CONFIG = "config.json"
LFS_POINTER = b"version https://git-lfs"  # how the text begins that stands for a file not yet downloaded
_MAX_BYTES = 16 << 20
_MAX_DEPTH = 16
_MAX_COUNT = 1 << 16
_COUNTED = re.compile(r"layers?(_per_stack)?$|^n_layer|num_labels$|num_blocks$|dense_replace$|depth$")
# transformers' key, an older one of compressed-tensors, MLX's
_QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")


def read_hf_config(directory: str | Path, allow_unknown: bool = False, read_as: str | None = None) -> dict[str, Any]:
    """Return the effective values of a checkpoint's `config.json`, by Hugging Face's names.

    Both names of a value that has two are there (`num_experts` and `num_local_experts`), `rope_theta` is beside
    `rope_parameters` where the layers share it, `dtype` is a name, `head_dim` is computed where it is missing or null,
    and the values of a `text_config` stand beside those of the whole.

    Args:
        directory: of the checkpoint.
        allow_unknown: whether a model type that transformers does not have gives the file's own values; else it is
            refused.
        read_as: a model type that transformers has, with the same configuration as that of the file; None: the file's.

    Raises:
        UserError: no such file, one that transformers would not read, weights that are quantised, or a model type that
            only code in the checkpoint defines, which is never run.
    """
    path = Path(directory) / CONFIG
    raw = read_raw_config(directory)
    require_plain_config(directory, raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        if allow_unknown:
            return _with_text_values(raw)
        raise UserError(f"{path}: model_type is {model_type!r}: it must name the kind of model, such as 'qwen3_moe'")
    from transformers import CONFIG_MAPPING  # transformers takes a second to import

    if model_type not in CONFIG_MAPPING and read_as is None:
        if allow_unknown:
            return _with_text_values(raw)
        code = ", which auto_map defines in code of the checkpoint's: such code is not run" if "auto_map" in raw else ""
        raise UserError(f"{path}: model_type is {model_type!r}, which transformers does not have{code}")
    return _effective_values(path, raw, None if model_type in CONFIG_MAPPING else read_as)


def read_raw_config(directory: str | Path) -> dict[str, Any]:
    """Parse `config.json` within bounds and return what it says, without defaults.

    Raises:
        UserError: no such file, or no JSON object of a reasonable size.
    """
    path = Path(directory) / CONFIG
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        if text.startswith(LFS_POINTER):
            raise ValueError("it is a git-LFS pointer: download the file itself (`git lfs pull`)")
        if text.startswith(codecs.BOM_UTF8):
            raise ValueError("it begins with a byte-order mark, which transformers refuses: save it as UTF-8 without")
        content = parse(text.decode())  # UTF-8 alone, as transformers reads it
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        _validate(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return content


def _validate(content: dict[str, Any]) -> None:
    """Raise a ValueError where a file's values are none that a model could have, or would fill the memory."""
    if "configuration_files" in content:
        raise ValueError("configuration_files names other files in its place: make the one that is meant config.json")
    if not isinstance(content.get("text_config", {}), dict | None):
        raise ValueError("text_config is no object")
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(_MAX_DEPTH):
        for key, value in level:
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{key} is NaN")
            # transformers makes a list of as many entries
            if isinstance(value, int) and value > _MAX_COUNT and _COUNTED.search(key):
                raise ValueError(f"{key} is {value:,}, more than {_MAX_COUNT:,}")
        level = [
            child
            for key, parent in level
            if isinstance(parent, dict | list)
            for child in (parent.items() if isinstance(parent, dict) else ((key, item) for item in parent))
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def require_plain_config(directory: str | Path, raw: dict[str, Any]) -> None:
    """Refuse quantised weights, whose numbers mean nothing without their scales.

    Args:
        directory: of the checkpoint.
        raw: what its `config.json` says.

    Raises:
        UserError: it says that the weights are quantised.
    """
    path, text = Path(directory) / CONFIG, raw.get("text_config")
    for section in (raw, text if isinstance(text, dict) else {}):
        for key in _QUANTISED_KEYS:
            if quantization := section.get(key):
                method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
                raise UserError(
                    f"{path}: the weights are quantised ({key}, {method}): dequantise the checkpoint to bfloat16"
                    f" first, and remove {key}"
                )


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep transformers' warnings about a configuration off the terminal: what matters is refused by name."""
    logger = logging.getLogger("transformers")
    disabled, level = logger.disabled, logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
        logger.setLevel(level)


def _effective_values(path: Path, raw: dict[str, Any], read_as: str | None) -> dict[str, Any]:
    """Return what transformers makes of a file whose model type it has; of another's content as of `read_as`."""
    from transformers import CONFIG_MAPPING, AutoConfig

    with _silenced():
        try:
            if read_as is not None:
                loaded: Any = CONFIG_MAPPING[read_as].from_dict({**raw, "model_type": read_as})
            else:
                loaded = AutoConfig.from_pretrained(
                    os.path.abspath(path.parent), local_files_only=True, trust_remote_code=False
                )
            whole, text = loaded.to_dict(), loaded.get_text_config(decoder=True)
            names = dict(loaded.attribute_map)
            if text is not loaded:
                whole, names = {**whole, **text.to_dict(), "model_type": whole["model_type"]}, dict(text.attribute_map)
        except Exception as error:  # whatever the file's values made it stumble over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: transformers cannot read it: {reason[:300]}") from None
    values = {name: value for name, value in whole.items() if not name.startswith("_")}
    values |= {alias: values[name] for alias, name in names.items() if name in values}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and type(hidden) is int and type(heads) is int and heads > 0:
        values["head_dim"] = hidden // heads
    return values


def _with_text_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a file's own values, those of its `text_config` beside them."""
    text = raw.get("text_config")
    return {**raw, **(text if isinstance(text, dict) else {})}
