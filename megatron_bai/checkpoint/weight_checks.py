"""What a checkpoint's tensors must be, beside complete, for a verb to use them: plain numbers, and an output layer."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megatron_bai.checkpoint.hf_config import CONFIG, read_hf_config, read_raw_config, require_plain_config
from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.errors import UserError

EMBEDDING = re.compile(r"(^|\.)(word_embeddings|embed_tokens)\.weight$")
OUTPUT = re.compile(r"(^|\.)(output_layer|lm_head)\.(weight|bias)$")
# Names of tensors in what packs weights into fewer bits.
_PACKED = {
    "float8 in blocks": re.compile(r"(\.weight|_)scale_inv$|\.(weight_scale_inv|input_scale)$"),
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx|scales)$"),
    "bitsandbytes": re.compile(
        r"\.(SCB|weight_scb|absmax|quant_map)$|\.(absmax|quant_map|nested_absmax|quant_state)\b"
    ),
    "compressed-tensors": re.compile(r"\.(weight_packed|weight_scale|weight_scale_2)$"),
    "MXFP4": re.compile(r"_(blocks|scales)$"),
}
_ANY_PACKED = re.compile("|".join(f"(?:{form.pattern})" for form in _PACKED.values()))
# Of optimizers, random-number generators and schedules, in Megatron-Core's checkpoints.
_STATE = re.compile(r"^(chained_\d+\.)?optimizer\b|^(rng_state|rerun_state_machine_state|opt_param_scheduler)\b")
_WEIGHT = re.compile(r"(^|\.)(weight|bias)\d*$")
_OTHER_HEAD = re.compile(r"(^|\.)(score|value_head|classifier|v_head|reward_head)\.")


def is_state(key: str) -> bool:
    """Return whether a tensor or object is of an optimizer, generator or schedule, which no model is filled from."""
    return bool(_STATE.search(key))


def require_plain_weights(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that are no plain numbers: quantised ones, which mean nothing without their scales, and complex.

    Args:
        path: of the checkpoint, whose `config.json` may say so, too.
        tensors: of the model, by key.

    Raises:
        UserError: names the first of them.
    """
    quantised = [key for key, entry in tensors.items() if _is_quantised(key, entry)]
    if quantised:
        dtype = str(tensors[quantised[0]].dtype).removeprefix("torch.")
        more = f", and {len(quantised) - 1} more" if len(quantised) > 1 else ""
        packing = next((f"; {name}" for name, form in _PACKED.items() if any(map(form.search, quantised))), "")
        raise UserError(
            f"{path} holds quantised tensors ({quantised[0]}, {dtype}{more}{packing}): dequantise it first, to a"
            " checkpoint of 16 bits or more, or take the one it was made from"
        )
    if key := next((key for key, entry in tensors.items() if entry.dtype.is_complex), None):
        raise UserError(f"{path} holds complex numbers ({key}): only real ones are computed with")
    if (path / CONFIG).is_file():
        require_plain_config(path, read_raw_config(path))


def _is_quantised(key: str, entry: TensorInfo) -> bool:
    """Return whether a tensor is packed, of float8, or a weight in whole numbers."""
    packed = bool(_ANY_PACKED.search(key))
    if entry.dtype.is_floating_point:
        return packed or entry.dtype.itemsize < 2
    return not entry.dtype.is_complex and (packed or bool(_WEIGHT.search(key)))


def is_tied(path: Path) -> bool | None:
    """Return whether `config.json` says, or its model type has by default, that the embedding is the output layer.

    Returns:
        None where there is no such file, or neither the file nor transformers knows.

    Raises:
        UserError: the file cannot be read.
    """
    if not (path / CONFIG).is_file():
        return None
    raw = read_raw_config(path)
    text = raw.get("text_config")
    tied = {**raw, **(text if isinstance(text, dict) else {})}.get("tie_word_embeddings")
    if not isinstance(tied, bool) and "model_type" in raw:  # transformers takes a second to import
        tied = read_hf_config(path, allow_unknown=True).get("tie_word_embeddings")
    return tied if isinstance(tied, bool) else None


def find_missing_output_layer(
    path: Path, keys: Iterable[str], read_tied: Callable[[Path], bool | None] = is_tied
) -> str | None:
    """Say what is wrong with a language model that has lost its output layer; None where it has one or needs none.

    Args:
        path: of the checkpoint.
        keys: of its tensors.
        read_tied: returns whether the checkpoint is tied, None where nothing says so.
    """
    keys = list(keys)
    embedding = next((key for key in keys if EMBEDDING.search(key)), None)
    if embedding is None or any(OUTPUT.search(key) or _OTHER_HEAD.search(key) for key in keys):
        return None
    if read_tied(path) is not False:
        return None
    architectures = read_raw_config(path).get("architectures") if (path / CONFIG).is_file() else None
    if isinstance(architectures, list) and not any("CausalLM" in str(name) for name in architectures):
        return None  # a model without an output layer
    name = "output_layer.weight" if "word_embeddings" in embedding else "lm_head.weight"
    return f"{path} has no {name} and is not tied (tie_word_embeddings is false, or is so by default)"


def require_output_layer(path: Path, keys: Iterable[str], read_tied: Callable[[Path], bool | None] = is_tied) -> None:
    """Refuse a language model that has lost its output layer: a loader would draw one at random.

    Args:
        path: of the checkpoint.
        keys: of its tensors.
        read_tied: as for `find_missing_output_layer`.

    Raises:
        UserError: names the tensor.
    """
    if problem := find_missing_output_layer(path, keys, read_tied):
        raise UserError(f"{problem}: restore its file, or say tie_word_embeddings=true in config.json if it is tied")
