"""Megatron-Core's save of a sharded state into a directory that counts once it is whole, at once or in the background.

In the background a forked process writes what this one had at the moment of the fork. Megatron-Core brings the results
back through a server process, which a kill -9 of the trainer would leave behind for good, and which nothing here needs:
they come through anonymous memory instead, and so do the checksums, which the process that wrote the files takes.
"""

import os
import pickle
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.distributed.rank_group import joined
from megatron_bai.errors import UserError
from megatron_bai.utils.child_processes import forks_die_with_us

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error")  # all that `torch.save` says of the system's error


class Saving:
    """A checkpoint on its way into `target`. Every method but `abandon` is collective."""

    def __init__(
        self,
        state: dict[str, Any],
        target: Path,
        describe: Callable[[Path], None],
        info: dict[str, Any],
        background: bool = False,
        more: Callable[[Path], None] | None = None,
    ):
        """Write beside `target`, or begin to.

        Args:
            state: Megatron's sharded state dict. What is done to its tensors after this returns is not saved.
            describe: adds the other files to the directory it is given; called on rank 0.
            info: kept in the manifest.
            background: return before all is written.
            more: writes files of each rank into the directory it is given; called on every rank, before this returns.

        Raises:
            UserError: the directory cannot be written, or another process writes it; the target is as it was.
        """
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.target, self._describe, self._info, self._group = target, describe, info, joined()
        self._calls, self._sums, self._lock = AsyncCallsQueue(), _Mailbox(), ExitStack()
        with ExitStack() as stack:
            self._group.first(lambda: stack.enter_context(atomic_dir.lock(target)))
            self._stage = self._group.first(lambda: manifest.staging(target))
            if more:
                self._group.together(lambda: more(self._stage), self._stage)
            with _in_one_line(self._stage), _children_end_with_us():
                request = self._request(state)
                if background:
                    self._calls.schedule_async_request(request)
                else:
                    request.execute_sync()
            self._lock = stack.pop_all()

    def _request(self, state: dict[str, Any]) -> Any:
        """Megatron-Core's, which sums each file it has written."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._results_queue = _Mailbox()
        request = dist_checkpointing.save(state, str(self._stage), async_sharded_save=True)
        if request.async_fn is None:  # this rank has nothing to write
            return request
        return request._replace(async_fn=partial(_write_and_sum, request.async_fn, self._stage, self._sums))

    def finish(self, wait: bool = True) -> bool:
        """Put the checkpoint in place, once all of it is written. Returns whether it is in place.

        Args:
            wait: until it is; otherwise come again.

        Raises:
            UserError: it could not be written; the target is as it was.
        """
        with self._lock as held:
            with _in_one_line(self._stage):
                self._calls.maybe_finalize_async_calls(blocking=wait)
            if self._calls.get_num_unfinalized_calls():
                self._lock = held.pop_all()
                return False
            shares = self._group.together(self._sums.get)
            sums = {name: crc for share in shares for name, crc in share.items()}

            def place() -> None:
                self._describe(self._stage)
                manifest.seal(self._stage, self.target, self._info, sums)

            self._group.first(place, self._stage)
        return True

    def abandon(self) -> None:
        """End what still writes. The target stays as it was."""
        for call in self._calls.async_calls:
            call.async_caller.close(abort=True)
        self._lock.close()


class _Mailbox:
    """One object from a forked process, which may have ended before it is read and sent more than a pipe holds."""

    def __init__(self) -> None:
        self._file = open(os.memfd_create("saving"), "w+b")

    def put(self, content: Any) -> None:
        self._file.write(pickle.dumps(content))
        self._file.flush()

    def get_nowait(self) -> Any:
        """As a queue's."""
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        return pickle.loads(data)

    def get(self) -> dict[str, Any]:
        """What was sent, or nothing."""
        found: dict[str, Any] = {}
        with suppress(queue.Empty):
            found = self.get_nowait()
        return found


def _write_and_sum(
    write: Callable[..., None], stage: Path, sums: _Mailbox, rank: int, buckets: list[Any], results: _Mailbox
) -> None:
    write(rank, buckets, results)
    with suppress(UserError):  # one that could not be written: `results` say why
        sums.put(manifest.checksums(stage, [name for _, name, _ in buckets]))


@contextmanager
def _in_one_line(stage: Path) -> Iterator[None]:
    """What Megatron-Core and torch say of a file that cannot be written."""
    try:
        yield
    except CheckpointException as error:
        raise UserError(f"{stage} cannot be written: {first_cause(error)}") from None
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_CANNOT_WRITE):
            raise
        raise UserError(f"{stage} cannot be written: the disk is full or failed") from None


def first_cause(error: CheckpointException) -> object:
    """Why a rank could not read or write; only the coordinator is told."""
    return next((cause for cause, _ in error.failures.values()), "another rank failed")


@contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Megatron-Core's writers do not outlive the process that started them."""
    forks_die_with_us(True)
    try:
        yield
    finally:
        forks_die_with_us(False)
