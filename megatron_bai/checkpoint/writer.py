"""What a format must do to be written: begin, any number of units on any ranks, finish."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bai.checkpoint import crc32, positional_io

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor to write: key, dtype and global shape


@dataclass(frozen=True, slots=True)
class WrittenItem:
    """An item that was written: a chunk (`offsets` and `sizes` set, in elements) or an object.

    It fills `length` bytes at `start` of the file, which have the checksum `crc32`.
    """

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    file: str
    start: int
    length: int
    crc32: int


@dataclass(slots=True)
class ItemWriter:
    """A box of a tensor on its way into a file: its elements are written in order, in parts, by one thread.

    Attributes:
        key, offsets, sizes: the box.
        file: its name; `descriptor`: the file, open to write; `start`: where the item begins in it.
        head: what the format puts before the elements.
        tail: what it puts behind them, made of their CRC-32; None: nothing.
        left: bytes of elements yet to be written.
        crc: of those before.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    fd: int
    start: int
    remaining: int
    head: bytes = b""
    make_tail: Callable[[int], bytes] | None = None
    crc: int = 0
    _length: int = 0  # so far, with the head
    _written: WrittenItem | None = None

    @property
    def offset(self) -> int:
        """The byte of the file that is next."""
        return self.start + self._length

    def advance(self, count: int, crc: int) -> None:
        """The next `count` bytes of elements were written, behind the head; `crc` is of all so far."""
        self._length += count
        self.remaining -= count
        self.crc = crc

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes of the elements. None: the head alone, or once nothing is left what comes behind.

        Raises:
            OSError: as the system says.
        """
        parts: list[bytes | memoryview] = [data] if self._length else [self.head, data]
        self.crc = crc32.compute(data, self.crc)
        self.remaining -= len(data)
        if self.remaining == 0:
            parts.append(self.make_tail(self.crc) if self.make_tail else b"")
        positional_io.pwrite_all(self.fd, parts, self.offset)
        self._length += sum(map(len, parts))
        if self.remaining == 0:
            elements = self._length - len(self.head) - len(parts[-1])
            crc = crc32.combine(crc32.compute(self.head), self.crc, elements)
            crc = crc32.compute(parts[-1], crc)
            self._written = WrittenItem(self.key, self.offsets, self.sizes, self.file, self.start, self._length, crc)

    @property
    def written(self) -> WrittenItem:
        assert self._written is not None, f"{self.key} {self.offsets}: {self.remaining} bytes were not written"
        return self._written


class UnitWriter(ABC):
    """Writes the items of one unit."""

    def __init__(self) -> None:
        self._items: list[ItemWriter | WrittenItem] = []

    @property
    def written_items(self) -> list[WrittenItem]:
        """Where each item lies, in the order in which they were asked for, once all are complete."""
        return [item.written if isinstance(item, ItemWriter) else item for item in self._items]

    def add_item(self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> ItemWriter:
        """The place for a box of a tensor, to be written before the unit ends, by any thread."""
        item = self._allocate(key, offsets, dtype, sizes)
        self._items.append(item)
        return item

    @abstractmethod
    def _allocate(self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> ItemWriter: ...

    @abstractmethod
    def write_object(self, key: str, data: bytes) -> None:
        """Write an object that is no tensor."""


class CheckpointWriter(ABC):
    """A checkpoint to write into an empty directory."""

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Before the units, on one rank."""

    @abstractmethod
    def open_unit(self, directory: Path, name: str) -> AbstractContextManager[UnitWriter]:
        """A writer for the unit of this name, on the rank that owns it."""

    @abstractmethod
    def finalize(self, directory: Path, tensors: Iterable[TensorSpec], written: Iterable[WrittenItem]) -> None:
        """After all units, on one rank: whatever makes the directory loadable.

        Args:
            tensors: every tensor.
            written: what all units wrote.
        """
