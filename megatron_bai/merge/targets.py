"""What a format must do to be written: begin, any number of units on any ranks, finish."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch


Shape = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor to write: key, dtype and global shape


@dataclass(frozen=True, slots=True)
class Written:
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


class Writer(ABC):
    """Writes the items of one unit; `written` says where each lies."""

    written: list[Written]

    @abstractmethod
    def tensor(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Write a contiguous box of a tensor."""

    @abstractmethod
    def blob(self, key: str, data: memoryview) -> None:
        """Write an object that is no tensor."""


class Target(ABC):
    """A checkpoint to write into an empty directory."""

    @abstractmethod
    def begin(self, directory: Path) -> None:
        """Before the units, on one rank."""

    @abstractmethod
    def unit(self, directory: Path, name: str) -> AbstractContextManager[Writer]:
        """A writer for the unit of this name, on the rank that owns it."""

    @abstractmethod
    def finish(self, directory: Path, tensors: Iterable[Shape], written: Iterable[Written]) -> None:
        """After all units, on one rank: whatever makes the directory loadable.

        Args:
            tensors: every tensor.
            written: what all units wrote.
        """
