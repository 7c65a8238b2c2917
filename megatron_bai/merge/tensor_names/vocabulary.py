"""The vocabulary's size without padding, and tied embeddings: what a checkpoint says beside its tensors.

Megatron pads the vocabulary to a multiple that depends on the tensor-parallel size, so the same model has embeddings of
different heights. Only `config.json` (Hugging Face's, which our Megatron checkpoints have too) or the arguments in
Megatron-LM saves tell how many rows are a token's.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.common_state import find_common_state, read_arguments
from megatron_bai.checkpoint.hf_config import CONFIG, read_raw_config
from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.checkpoint.weight_checks import EMBEDDING, OUTPUT, is_tied
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.canonical_names import canonical_box


@dataclass(frozen=True)
class VocabInfo:
    """What the files beside a checkpoint's tensors say; None where nothing does.

    Attributes:
        vocab_size: number of rows of the embedding that are a token's.
        origin: the file that says so.
        tied: whether the output layer is the embedding.
    """

    vocab_size: int | None = None
    origin: str = ""
    tied: bool | None = None


def read_vocab_info(path: Path) -> VocabInfo:
    """Read `config.json`, or else Megatron-LM's arguments as far as they are plain data.

    Raises:
        UserError: `config.json` is no JSON.
    """
    file = path / CONFIG
    if file.is_file():
        raw = read_raw_config(path)
        text = raw.get("text_config")
        size = {**raw, **(text if isinstance(text, dict) else {})}.get("vocab_size")
        return _make_vocab_info(file, size, is_tied(path))
    if not (arguments := read_arguments(path)):
        return VocabInfo()
    untied = arguments.get("untie_embeddings_and_output_weights")
    return _make_vocab_info(
        path / str(find_common_state(path)), arguments.get("vocab_size"), None if untied is None else not untied
    )


def _make_vocab_info(file: Path, size: Any, tied: Any) -> VocabInfo:
    """Make the info from values that may be of any type."""
    size = size if isinstance(size, int) and size > 0 else None
    return VocabInfo(size, str(file), tied if isinstance(tied, bool) else None)


@functools.lru_cache(maxsize=1 << 16)  # asked for each tensor of each source, several times
def is_vocab_tensor(key: str) -> bool:
    """Return whether a tensor has a row for each token."""
    return bool(EMBEDDING.search(key) or OUTPUT.search(key)) and not canonical_box(key, (1,)).axes


def unpadded_vocab_size(sources: dict[Path, dict[str, TensorInfo]], given: int) -> int | None:
    """Return the number of rows of the vocabulary's tensors that are a token's; None: all, since nothing says.

    Args:
        sources: the tensors to merge of each checkpoint, by its directory.
        given: `merge.vocab_size`, which decides where it is not 0; else the checkpoints do.

    Raises:
        UserError: they say different things, there are fewer rows than that, or the numbers of rows differ and nothing
            says how many count.
    """
    rows = {
        path: {entry.shape[0] for key, entry in tensors.items() if is_vocab_tensor(key) and entry.shape}
        for path, tensors in sources.items()
    }
    advice = "if the sources share a vocabulary, give its size as merge.vocab_size"
    if given:
        size, origin = given, "merge.vocab_size"
    else:
        infos = {path: info for path in rows if rows[path] and (info := read_vocab_info(path)).vocab_size}
        sizes: dict[int, str] = {}
        for info in infos.values():
            assert info.vocab_size is not None  # `infos` has only such
            sizes.setdefault(info.vocab_size, info.origin)
        if len(sizes) > 1:
            listed = " and ".join(f"{size} tokens ({file})" for size, file in sizes.items())
            raise UserError(f"the sources have different vocabularies, {listed}: {advice}")
        unknown = [path for path in rows if rows[path] and path not in infos]
        heights = set().union(*rows.values())
        if unknown and len(heights) > 1:
            raise UserError(
                f"the embeddings have {' and '.join(map(str, sorted(heights)))} rows, and nothing says how many of"
                f" {unknown[0]} are tokens and how many padding: {advice}"
            )
        if not sizes:
            return None
        size, origin = next(iter(sizes.items()))
    for path, heights in rows.items():
        if heights and min(heights) < size:
            raise UserError(f"{path} has {min(heights)} rows in its vocabulary, {origin} says {size} tokens: {advice}")
    return size
