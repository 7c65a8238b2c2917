"""Rows of a data set on local disk, by index: JSON Lines, Parquet, or what `datasets.save_to_disk` wrote.

Nothing here runs code from a file. A JSON Lines file is read once to find its lines, and then one line at a time.
"""

import codecs
import importlib
import os
from array import array
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_bai.data.plain_values import find_half_surrogate
from megatron_bai.errors import UserError
from megatron_bai.utils import strict_json

_NARROW = {"float": np.float32, "halffloat": np.float16}  # by Arrow's name


class Rows(Protocol):
    """Rows by index, each with its location in the file."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...

    def location(self, number: int) -> str:
        """Return, for messages, the file and the line or row in it, both counted from 1."""


def open_rows(path: str, setting: str) -> Rows:
    """Open the rows of a `.jsonl` file, of a `.parquet` file or a directory of such, or of a saved data set.

    Args:
        path: the file or directory.
        setting: name of the setting that gave the path, for messages.

    Raises:
        UserError: there is nothing, it cannot be read, or a line is not a JSON object; named with file and line.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{setting}={path}: there is no such file or directory")
    if place.is_file() and place.suffix in (".jsonl", ".json"):
        rows: Rows = JsonlRows(place)
    elif place.suffix == ".parquet" or (place.is_dir() and any(place.glob("*.parquet"))):
        rows = ParquetRows(place, setting)
    elif place.is_dir():
        rows = SavedDatasetRows(place, setting)
    else:
        raise UserError(f"{setting}={path} is neither .jsonl nor .parquet, nor a directory of datasets.save_to_disk")
    if not len(rows):
        raise UserError(f"{setting}={path} has no rows")
    return rows


class JsonlRows:
    """One JSON object a line; blank lines do not count."""

    def __init__(self, path: Path):
        self._path = path
        self._starts, self._lines = array("q"), array("q")
        self._file = open(path, "rb")  # stays open: a file that takes its place is another one
        self._seen = self._state()
        start = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                self._starts.append(start)
                self._lines.append(number)
                self._parsed(line, number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if self._state() != self._seen:
            raise UserError(f"{self._path} was changed while the run reads it: start the run again")
        self._file.seek(self._starts[number])
        return self._parsed(self._file.readline(), self._lines[number])

    def location(self, number: int) -> str:
        """Return the file and the line or row in it, counted from 1."""
        return f"{self._path}:{self._lines[number]}"

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # as Windows' editors and spreadsheets begin a file
        try:
            row = strict_json.parse(line.decode())
        except ValueError as error:  # of JSON or of UTF-8
            hint = "; a file of JSON Lines has one object a line" if number == 1 else ""
            raise UserError(f"{self._path}:{number}: this line is no JSON: {error}{hint}") from None
        if b"\\u" in line and (text := find_half_surrogate(row)) is not None:
            raise UserError(
                f"{self._path}:{number}: {ascii(text[:60])} has half of a surrogate pair, which is no text that can be "
                "encoded: mend or remove the row"
            )
        if not isinstance(row, dict):
            raise UserError(f"{self._path}:{number}: a row must be a JSON object, this is a {type(row).__name__}")
        return row

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


class ParquetRows:
    """Parquet, kept in memory."""

    def __init__(self, path: Path, setting: str):
        parquet = _import_package("pyarrow.parquet", path, setting)
        self._path = path
        try:
            self._table = parquet.read_table(path)
        except Exception as error:  # pyarrow raises many kinds
            raise UserError(f"{setting}={path} is no Parquet that can be read: {error}") from None

    def __len__(self) -> int:
        rows: int = self._table.num_rows
        return rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        return _read_arrow_row(self._table.slice(number, 1), self.location(number))

    def location(self, number: int) -> str:
        """Return the file and the line or row in it, counted from 1."""
        return f"{self._path}: row {number + 1}"


class SavedDatasetRows:
    """A directory of Hugging Face `datasets`, mapped into memory."""

    def __init__(self, path: Path, setting: str):
        datasets = _import_package("datasets", path, setting)
        self._path = path
        try:
            self._rows = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever datasets finds wrong
            raise UserError(f"{setting}={path} is no data set that datasets can load: {error}") from None
        if isinstance(self._rows, datasets.DatasetDict):
            splits = sorted(self._rows)
            raise UserError(f"{setting}={path} has the splits {', '.join(splits)}: name one, e.g. {path / splits[0]}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self._rows[number]
        except Exception as error:  # of a feature that datasets decodes, such as an image
            raise UserError(f"{self.location(number)} cannot be read: {error}") from None
        schema = self._rows.features.arrow_schema
        return {name: _shorten_floats(value, schema.field(name).type) for name, value in row.items()}

    def location(self, number: int) -> str:
        """Return the file and the line or row in it, counted from 1."""
        return f"{self._path}: row {number + 1}"


def _read_arrow_row(table: Any, location: str) -> dict[str, Any]:
    """Return the one row of an Arrow table, whose values may be such as Python does not have.

    Raises:
        UserError: names the row and the column that cannot be read.
    """
    row = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            value = column[0].as_py()
        except Exception as error:  # of dates beyond Python's, texts that are not UTF-8 …
            raise UserError(f"{location}: the column {name!r} cannot be read: {error}") from None
        row[name] = _shorten_floats(value, column.type)
    return row


def _shorten_floats(value: Any, arrow_type: Any) -> Any:
    """Return a value with the numbers that narrow floats were written as: 0.1, as float32 0.10000000149.

    Args:
        value: of the row.
        arrow_type: its type, whose fields and elements are looked at, too.
    """
    kind = str(arrow_type)
    if kind.startswith("dictionary"):
        return _shorten_floats(value, arrow_type.value_type)
    if isinstance(value, float) and kind in _NARROW:
        return float(str(_NARROW[kind](value)))
    if "float" not in kind:
        return value
    if isinstance(value, dict) and kind.startswith("struct"):
        return {name: _shorten_floats(item, arrow_type.field(name).type) for name, item in value.items()}
    if isinstance(value, list) and hasattr(arrow_type, "value_type"):
        return [_shorten_floats(item, arrow_type.value_type) for item in value]
    return value


def _import_package(name: str, path: Path, setting: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{setting}={path} is read with the package datasets, which is missing ({error}): pip install "
            "'megatron-bai[datasets]', or give a .jsonl file"
        ) from None
