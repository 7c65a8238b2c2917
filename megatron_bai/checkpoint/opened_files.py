"""The files of a checkpoint as they were when it was opened, so that one that is replaced meanwhile is noticed.

A file is what it was if it has the same device, inode, size and time of modification. It is looked at whenever it is
opened again, and at the end by every process that read, before what came of it counts.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_bai.errors import PermanentError


class OpenedFiles:
    """The state of files when they were opened; those that are missing are not watched.

    Attributes:
        stats: by name, relative to the directory.
    """

    def __init__(self, directory: Path, names: Iterable[str], known: Mapping[str, os.stat_result] | None = None):
        """Look at the files.

        Args:
            directory: of the files.
            names: of the files, relative to it.
            known: state of files that were read already, as it was then.
        """
        self._directory = directory
        self.stats = dict(known or {})
        for name in names:
            if name not in self.stats and (directory / name).is_file():
                self.stats[name] = os.stat(directory / name)

    def require_same(self, name: str, stat: os.stat_result | None) -> None:
        """Raise unless a file is the one that was opened.

        Args:
            name: of the file.
            stat: its state now; None: it is gone.

        Raises:
            PermanentError: it is another one, or has changed.
        """
        opened = self.stats.get(name)
        if opened is not None and (stat is None or _identity(opened) != _identity(stat)):
            raise PermanentError(
                f"{self._directory / name} was replaced or changed while it was read: run again when nothing writes"
                f" {self._directory}"
            )

    def require_unchanged(self) -> None:
        """Raise unless every file is still the one that was opened.

        Raises:
            PermanentError: one is not.
        """
        for name in self.stats:
            try:
                stat = os.stat(self._directory / name)
            except OSError:
                stat = None
            self.require_same(name, stat)


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
