"""The tokens of a checkpoint's tokenizer: which text each id stands for, read from its files without building it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.carried_files import TOKENIZER_DIRECTORY
from megatron_bai.errors import UserError
from megatron_bai.utils.strict_json import parse

_MAX_BYTES = 256 << 20
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def has_chat_template(directory: Path) -> bool:
    """Return whether a checkpoint has a chat template, in a file of its own or in `tokenizer_config.json`."""
    for place in (directory, directory / TOKENIZER_DIRECTORY):
        if any((place / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
            return True
        if _read_object(place / "tokenizer_config.json").get("chat_template"):
            return True
    return False


def read_token_texts(directory: Path) -> dict[int, str]:
    """Return the text of every token by its id; empty where the directory has no tokenizer that can be read.

    The files are taken as transformers does: `tokenizer.json`, else `vocab.json` or `vocab.txt`, else a SentencePiece
    model; where there are none, likewise those in `tokenizer/`. Added tokens stand over those of the vocabulary.

    Raises:
        UserError: a file is damaged.
    """
    return _read_texts(directory) or _read_texts(directory / TOKENIZER_DIRECTORY)


def _read_texts(directory: Path) -> dict[int, str]:
    """Return the text of every token of the files in one directory."""
    file = directory / "tokenizer.json"
    if file.is_file():
        content = _read_object(file)
        model = content.get("model")
        texts = _texts_of_vocabulary(file, model.get("vocab") if isinstance(model, dict) else {})
        added: Any = content.get("added_tokens") or []
        return texts | dict(_added(file, ((token["id"], token["content"]) for token in added)))
    texts = _read_vocabulary(directory)
    if not texts:
        return {}
    named = ((index, text) for text, index in _read_object(directory / "added_tokens.json").items())
    decoder = _read_object(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    numbered = ((int(index), token["content"]) for index, token in decoder.items())
    texts |= dict(_added(directory / "added_tokens.json", named))
    return texts | dict(_added(directory / "tokenizer_config.json", numbered))


def _read_vocabulary(directory: Path) -> dict[int, str]:
    """Return the tokens of the forms before `tokenizer.json`, without those that were added."""
    if (directory / "vocab.json").is_file():
        return _texts_of_vocabulary(directory / "vocab.json", _read_object(directory / "vocab.json"))
    if (directory / "vocab.txt").is_file():
        text = _read_bytes(directory / "vocab.txt").decode(errors="replace")
        return dict(enumerate(text.replace("\r\n", "\n").removesuffix("\n").split("\n")))
    for name in _SENTENCEPIECE:
        if (directory / name).is_file():
            data = _read_bytes(directory / name)
            try:
                pieces = [_field(piece, 1) for piece in _fields(data, 1)]
            except (IndexError, ValueError):  # of another kind, such as tiktoken's: compared as a whole
                return {-1: f"{name} of {len(data)} bytes with the SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"}
            return {index: piece.decode(errors="replace") for index, piece in enumerate(pieces)}
    return {}


def _texts_of_vocabulary(file: Path, vocabulary: Any) -> dict[int, str]:
    """Convert a vocabulary, texts with their ids or a list of texts with scores."""
    if isinstance(vocabulary, dict):
        return dict(_added(file, ((index, text) for text, index in vocabulary.items())))
    return dict(_added(file, ((index, entry[0]) for index, entry in enumerate(vocabulary or []))))


def _added(file: Path, tokens: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield ids and texts, or raise a UserError where an entry is none."""
    try:
        for index, text in tokens:
            if type(index) is not int or not isinstance(text, str):
                raise ValueError(f"{index!r} and {text!r} are no id and text")
            yield index, text
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): restore it from a copy") from None


def _read_object(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = parse(_read_bytes(file))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): restore it from a copy") from None
    return content


def _read_bytes(file: Path) -> bytes:
    """Return a file's bytes, within a bound."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UserError(f"{file} has more than {_MAX_BYTES:,} bytes: it is no tokenizer's")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _fields(data: bytes, number: int) -> Iterator[bytes]:
    """Yield the values of a length-delimited field of a protocol-buffer message; raise ValueError where it is none."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            _, at = _varint(data, at)
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field ends behind the message")
            if tag >> 3 == number:
                yield data[at : at + length]
            at += length
        else:
            raise ValueError("no protocol buffer")


def _field(data: bytes, number: int) -> bytes:
    """Return the first value of a length-delimited field."""
    return next(_fields(data, number), b"")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number of variable length at a position, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if not byte & 128:
            return value, at
        shift += 7


def with_token_ids(text: str, ids: dict[str, Any]) -> str:
    """Return a `config.json` with other begin, end and padding tokens.

    Args:
        text: of the file.
        ids: by key; they also replace those of a `text_config`, where it has them.

    Returns:
        The new text; all other keys are unchanged.
    """
    config = json.loads(text)
    config |= ids
    section = config.get("text_config")
    if isinstance(section, dict):
        section |= {key: value for key, value in ids.items() if key in section}
    return json.dumps(config, indent=2) + "\n"
