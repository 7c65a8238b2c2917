"""The files beside the weights that belong to a model, and go with it into another directory: one list for every verb.

A checkpoint's directory is often one that somebody worked in: it holds weights of other formats, optimizers, logs, a
repository. So what is carried is what this list allows; the rest is left out and named. A link is followed, as in
Hugging Face's cache, where every file is one.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.common_state import COMMON
from megatron_bai.checkpoint.not_checkpoints import require_directory, require_downloaded
from megatron_bai.errors import UserError
from megatron_bai.utils.strict_json import parse, read_bounded

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PROVENANCE = "provenance.json"  # of a merge: written anew, never carried
# What a tokenizer consists of, with its chat template, and how responses are sampled and ended.
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
        "chat_template.json", GENERATION_CONFIG,
    }
)  # fmt: skip
TOKENIZER_DIRECTORY = "tokenizer"  # where some Megatron checkpoints have it
_TOKENIZER_DIRECTORIES = ("additional_chat_templates", TOKENIZER_DIRECTORY)
_TEXTS = (".json", ".txt", ".jinja", ".md", ".model", ".tiktoken", ".py", ".vocab", ".bpe")  # .py is never run
_PLAIN = re.compile(r"(licen[cs]e|notice|copying|readme|use_policy)\b", re.IGNORECASE)
_MAX_BYTES = 256 << 20  # tokenizers of large vocabularies have tens of MiB
_MAX_OTHER_BYTES = 1 << 20  # of a text that has no meaning known here
_MAX_PROVENANCE_BYTES = 256 << 20  # some 150 a tensor
# Texts that are about weights, or about how they were trained.
_NOT_CARRIED = re.compile(
    r".*\.index(\.[\w-]+)?\.json|adapter_.*\.json|quantize_config\.json|(trainer|optimizer|scheduler)_state.*\.json"
    r"|(all|train|eval|predict)_results.*\.json|events\..*|.*log.*\.txt|" + re.escape(manifest.NAME)
    + "|" + re.escape(PROVENANCE) + r"|metadata\.json|latest_checkpointed_iteration\.txt"
)  # fmt: skip
_FORMAT_FILES = frozenset({COMMON})  # of Megatron-Core's checkpoints: carried within that format


@dataclass(frozen=True)
class CarriedFiles:
    """What of a directory is carried, and what is left out; paths are relative to it.

    Attributes:
        names: files to copy.
        left_out: files and directories that are not, without the weights that were read; directories end in `/`.
    """

    names: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def describe_left_out(self, directory: Path) -> str:
        """Say in one line what was left out; empty where nothing was.

        Args:
            directory: where it lies.
        """
        if not self.left_out:
            return ""
        shown = ", ".join(self.left_out[:5])
        more = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
        return f"not carried of {directory}: {shown}{more}"


def list_carried_files(directory: Path, weights: Iterable[str] = (), same_format: bool = False) -> CarriedFiles:
    """List the files that go with the weights of a checkpoint.

    Args:
        directory: of the checkpoint. Its subdirectories are not searched but for a tokenizer's.
        weights: files that hold the weights that are read, or their index; they are neither carried nor left out.
        same_format: whether the files are for a checkpoint of the same format.
    """
    names: list[Path] = []
    left_out = []
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and entry.name in _TOKENIZER_DIRECTORIES:
            files = [path for path in sorted(entry.iterdir()) if path.is_file() and path.suffix in _TEXTS]
            names += (path.relative_to(directory) for path in files)
        elif entry.is_file() and (_is_carried(entry) or (same_format and entry.name in _FORMAT_FILES)):
            names.append(Path(entry.name))
        elif entry.name not in (manifest.NAME, PROVENANCE, *weights) or _is_foreign(entry):
            left_out.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    return CarriedFiles(names, left_out)


def _is_carried(file: Path) -> bool:
    """Return whether a file at the top of a checkpoint is carried."""
    size = file.stat().st_size
    if file.name in TOKENIZER_FILES or file.name == CONFIG:
        return size <= _MAX_BYTES
    if file.name.startswith(".") or _NOT_CARRIED.fullmatch(file.name):
        return False
    if file.suffix in (".model", ".tiktoken", ".vocab", ".bpe") or file.name.endswith("processor_config.json"):
        return size <= _MAX_BYTES
    return size <= _MAX_OTHER_BYTES and bool(file.suffix in _TEXTS or _PLAIN.match(file.name))


def _is_foreign(entry: Path) -> bool:
    """Return whether a file has the name of one of ours, but is another tool's."""
    if entry.name == manifest.NAME:
        return not manifest.has_manifest(entry.parent)
    return entry.name == PROVENANCE and not has_provenance(entry.parent)


def require_tokenizer(directory: str | Path) -> None:
    """Refuse a directory without a tokenizer that transformers can load.

    Args:
        directory: of a checkpoint, or of a tokenizer alone.

    Raises:
        UserError: there is no such directory, no `tokenizer.json` in it, or a git-LFS pointer in its place.
    """
    directory = Path(directory)
    require_directory(directory)
    require_downloaded(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} holds no tokenizer.json: copy the model's tokenizer files there")


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file, relative to its checkpoint, belongs to the tokenizer or says how responses end."""
    return path.as_posix() in TOKENIZER_FILES or path.parts[0] in _TOKENIZER_DIRECTORIES


def has_provenance(directory: Path) -> bool:
    """Return whether a directory holds the provenance of a merge: ours, damaged or not, and no other tool's file."""
    try:
        text = read_bounded(directory / PROVENANCE, _MAX_PROVENANCE_BYTES)
    except (OSError, ValueError):
        return False
    try:
        content = parse(text)
    except ValueError:
        return not text.lstrip() or b'"fingerprint"' in text or set(text) <= {ord("{")}
    return isinstance(content, dict) and len({"fingerprint", "recipe", "sources", "tensors"} & content.keys()) > 1


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's content, which is not read whole into memory.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def read_end_tokens(directory: Path) -> list[int]:
    """Return the ids at any of which a response ends, of `config.json`, `generation_config.json` and the tokenizer.

    A model that ends a chat's turn with another token than a text has both; its tokenizer names one of them.

    Args:
        directory: of a checkpoint.
    """
    tokens: list[Any] = []
    for name in (CONFIG, GENERATION_CONFIG):
        value = read_json_object(directory / name).get("eos_token_id")
        tokens += value if isinstance(value, list) else [value]
    return sorted({token for token in (*tokens, _tokenizer_end(directory)) if type(token) is int and token >= 0})


def _tokenizer_end(directory: Path) -> Any:
    """Return the id of the tokenizer's end token, read from its files; None where they do not say."""
    end: Any = read_json_object(directory / "tokenizer_config.json").get("eos_token")
    end, added = end.get("content") if isinstance(end, dict) else end, read_json_object(directory / "tokenizer.json")
    tokens = added["added_tokens"] if isinstance(added.get("added_tokens"), list) else []
    return next((t.get("id") for t in tokens if isinstance(t, dict) and t.get("content") == end is not None), None)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none, or none that can be read."""
    try:
        content = json.loads(read_bounded(file, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
