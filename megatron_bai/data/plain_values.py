"""Values of rows as JSON has them: what Parquet, numpy and pandas have beside is turned into texts and numbers."""

import base64
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any


def make_plain(value: Any) -> Any:
    """Return a value of a row as JSON's.

    Dates and times become texts of ISO 8601, decimals texts, bytes the text that they are in UTF-8 or else in base64,
    arrays lists, numpy's scalars numbers, pandas' missing values None, keys texts; what else there is, its `str`.

    Args:
        value: as a reader of rows gives it; unchanged where JSON has it.
    """
    if value is None or isinstance(value, str | bool | int | float) and type(value).__module__ == "builtins":
        return value
    if isinstance(value, Mapping):
        return {str(key): make_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [make_plain(item) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return base64.b64encode(data).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat() if value == value else None  # pandas' NaT differs from itself
    if isinstance(value, timedelta):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return make_plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else str(value)


def require_text(value: Any) -> None:
    """Refuse bytes that are no text where one is needed: their base64 would stand in its place.

    Args:
        value: a text, a list of messages, or anything else, which is left alone.

    Raises:
        ValueError: it, or the role or content of a message, is bytes that are not UTF-8.
    """
    if isinstance(value, list | tuple):
        value = [message.get(key) for message in value if isinstance(message, Mapping) for key in ("role", "content")]
    for data in value if isinstance(value, list) else [value]:
        if isinstance(data, bytes | bytearray | memoryview):
            try:
                bytes(data).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"bytes that are no text in UTF-8 ({error.reason})") from None


def find_half_surrogate(value: Any) -> str | None:
    """Return a text in a JSON value that has half of a surrogate pair, which no encoding can hold; or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value
        return None
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((text for text in map(find_half_surrogate, value) if text is not None), None)
    return None
