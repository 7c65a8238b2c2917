"""What a format does to write a checkpoint: prepare it, write any number of units on any ranks, finalise it."""

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
    """Writes the item of one box of a tensor: its elements in order, in any number of calls, by one thread.

    Attributes:
        key, offsets, sizes: the box.
        file: its name; `fd`: the file, open to write; `start`: where the item begins in it.
        head: what the format puts before the elements.
        make_tail: returns what it puts behind them, given their CRC-32; None: nothing.
        remaining: bytes of elements yet to be written.
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
        """The position of the next byte in the file."""
        return self.start + self._length

    def advance(self, count: int, crc: int) -> None:
        """Count bytes of elements, behind the head, that the caller wrote itself.

        Args:
            count: the next bytes, which were written.
            crc: of all elements so far.
        """
        self._length += count
        self.remaining -= count
        self.crc = crc

    def write(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the elements: after the head if they are the first, before the tail if the last.

        Args:
            data: the bytes. Empty: the head alone, or the tail where no elements remain.

        Raises:
            OSError: the system refuses.
        """
        buffers: list[bytes | memoryview] = [data] if self._length else [self.head, data]
        self.crc = crc32.compute(data, self.crc)
        self.remaining -= len(data)
        if self.remaining == 0:
            buffers.append(self.make_tail(self.crc) if self.make_tail else b"")
        if any(map(len, buffers)):
            positional_io.pwrite_all(self.fd, buffers, self.offset)
        self._length += sum(map(len, buffers))
        if self.remaining == 0:
            num_element_bytes = self._length - len(self.head) - len(buffers[-1])
            crc = crc32.combine(crc32.compute(self.head), self.crc, num_element_bytes)
            crc = crc32.compute(buffers[-1], crc)
            self._written = WrittenItem(self.key, self.offsets, self.sizes, self.file, self.start, self._length, crc)

    @property
    def written(self) -> WrittenItem:
        """The item, once it is complete."""
        assert self._written is not None, f"{self.key} {self.offsets}: {self.remaining} bytes were not written"
        return self._written


class UnitWriter(ABC):
    """Writes the items of one unit."""

    def __init__(self) -> None:
        self._items: list[ItemWriter | WrittenItem] = []

    @property
    def written_items(self) -> list[WrittenItem]:
        """The items in the order in which they were added, once all are complete."""
        return [item.written if isinstance(item, ItemWriter) else item for item in self._items]

    def add_item(self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> ItemWriter:
        """Return the writer of a box of a tensor, which any thread may use until the unit ends.

        Args:
            key: of the tensor.
            offsets: of the box.
            dtype: of the tensor.
            sizes: of the box.
        """
        item = self._allocate(key, offsets, dtype, sizes)
        self._items.append(item)
        return item

    @abstractmethod
    def _allocate(
        self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]
    ) -> ItemWriter: ...

    @abstractmethod
    def write_object(self, key: str, data: bytes) -> None:
        """Write an object that is no tensor.

        Args:
            key: of the object.
            data: its bytes.

        Raises:
            OSError: the system refuses.
        """


class CheckpointWriter(ABC):
    """Writes a checkpoint into an empty directory."""

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Prepare the directory for the units. Called on one rank, before them."""

    @abstractmethod
    def open_unit(self, directory: Path, name: str) -> AbstractContextManager[UnitWriter]:
        """Open a unit on the rank that writes it.

        Args:
            directory: of the checkpoint.
            name: of the unit, no other's.
        """

    @abstractmethod
    def finalize(self, directory: Path, tensors: Iterable[TensorSpec], written: Iterable[WrittenItem]) -> None:
        """Write whatever makes the directory loadable. Called on one rank, after all units.

        Args:
            directory: of the checkpoint.
            tensors: every tensor.
            written: the items of all units.
        """
