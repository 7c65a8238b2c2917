"""Megatron-Core's save of a sharded state into a directory that is committed when complete, now or in the background.

In the background a forked process writes what this one had at the moment of the fork. Megatron-Core brings the results
back through a server process, which would outlive a trainer that is killed, and which nothing here needs: they come
through anonymous memory instead, and so do the checksums, which the process that wrote the files computes.
"""

import logging
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
from megatron_bai.compat.releases import megatron_release
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.utils.child_processes import set_forks_die_with_parent

# All that `torch.save` says of the system's error, at times behind another one about the end of the file.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error")
_BEFORE_CAUSE = "encountered an error: "  # in what Megatron-Core logs of a writer that failed


class CheckpointSave:
    """A checkpoint that is being written into `target`. Every method but `abort` is *collective*."""

    def __init__(
        self,
        state: dict[str, Any],
        target: Path,
        write_metadata: Callable[[Path], None],
        info: dict[str, Any],
        in_background: bool = False,
        write_rank_files: Callable[[Path], None] | None = None,
    ):
        """Write beside `target`, or start to.

        Args:
            state: Megatron's sharded state dict. What is done to its tensors after this returns is not saved.
            target: directory of the checkpoint.
            write_metadata: adds the other files to the directory it is given; called on rank 0.
            info: kept in the manifest.
            in_background: return before all is written.
            write_rank_files: writes files of each rank into the directory it is given; called on every rank, before
                this
                returns.

        Raises:
            UserError: the directory cannot be written, or another process writes it; the target is unchanged.
        """
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.target, self._write_metadata, self._info, self._ranks = target, write_metadata, info, current_ranks()
        self._calls, self._crcs, self._lock = AsyncCallsQueue(), _ForkQueue(), ExitStack()
        with ExitStack() as stack:
            self._ranks.run_on_first(lambda: stack.enter_context(atomic_dir.lock(target)))
            self._stage = self._ranks.run_on_first(lambda: manifest.make_staging_dir(target))
            if write_rank_files:
                self._ranks.run_on_all(lambda: write_rank_files(self._stage), self._stage)
            with _as_user_error(self._stage), _writers_die_with_us():
                request = self._request(state)
                if in_background:
                    self._calls.schedule_async_request(request)
                else:
                    request.execute_sync()
            self._lock = stack.pop_all()

    def _request(self, state: dict[str, Any]) -> Any:
        """Return Megatron-Core's request, extended to compute the CRC-32 of each file it has written."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        arguments = megatron_release().save_arguments
        queue_of_others = filesystem_async._results_queue
        filesystem_async._results_queue = _ForkQueue()
        try:
            request = dist_checkpointing.save(state, str(self._stage), async_sharded_save=True, **arguments)
        finally:  # another save of this process would find our results in it, and write them into its index
            filesystem_async._results_queue = queue_of_others
        if request.async_fn is None:  # this rank has nothing to write
            return request
        return request._replace(async_fn=partial(_write_and_checksum, request.async_fn, self._stage, self._crcs))

    def finalize(self, wait: bool = True) -> bool:
        """Commit the checkpoint, once all of it is written. Returns whether it is committed.

        Args:
            wait: until it is; otherwise call again later.

        Raises:
            UserError: it could not be written; the target is unchanged.
        """
        with self._lock as lock:
            with _as_user_error(self._stage):
                self._calls.maybe_finalize_async_calls(blocking=wait)
            if self._calls.get_num_unfinalized_calls():
                self._lock = lock.pop_all()
                return False
            gathered = self._ranks.run_on_all(self._crcs.get)
            crcs = {name: crc for share in gathered for name, crc in share.items()}

            def commit() -> None:
                self._write_metadata(self._stage)
                manifest.finalize(self._stage, self.target, self._info, crcs)

            self._ranks.run_on_first(commit, self._stage)
        return True

    def abort(self) -> None:
        """End the processes that still write. The target is unchanged."""
        for call in self._calls.async_calls:
            call.async_caller.close(abort=True)
        self._lock.close()


class _ForkQueue:
    """A queue of one object from a forked process, which may end before it is read and send more than a pipe holds."""

    def __init__(self) -> None:
        self._file = open(os.memfd_create("saving"), "w+b")

    def put(self, content: Any) -> None:
        """Send the object."""
        self._file.write(pickle.dumps(content))
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the object, or raise `queue.Empty`."""
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        return pickle.loads(data)

    def get(self) -> dict[str, Any]:
        """Return the object, which is a dict; an empty one where none was sent."""
        content: dict[str, Any] = {}
        with suppress(queue.Empty):
            content = self.get_nowait()
        return content


def _write_and_checksum(
    write: Callable[..., None], stage: Path, crcs: _ForkQueue, rank: int, buckets: list[Any], results: _ForkQueue
) -> None:
    """Write this rank's files and send their CRC-32."""
    with _logged_errors() as logged:
        write(rank, buckets, _NamedCauses(results, logged))
    with suppress(UserError):  # one that could not be written: `results` say why
        crcs.put(manifest.compute_crcs(stage, [name for _, name, _ in buckets]))


class _NamedCauses:
    """A queue into which Megatron-Core puts the results of a write; of an exception, the cause that it logged.

    From 0.17 on the exception itself names the cause's class alone.
    """

    def __init__(self, results: _ForkQueue, logged: list[str]):
        self._results, self._logged = results, logged

    def put(self, content: Any) -> None:
        """Send the results, or an exception with the first error that was logged."""
        if isinstance(content, Exception) and self._logged:
            content = RuntimeError(self._logged[0].rpartition(_BEFORE_CAUSE)[2])
        self._results.put(content)


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collect, and keep off the terminal, the errors that Megatron-Core's writer logs during a block."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(filesystem_async.__name__)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield logged
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


@contextmanager
def _as_user_error(stage: Path) -> Iterator[None]:
    """Raise what Megatron-Core and torch say of a file that cannot be written as a UserError of one line."""
    try:
        yield
    except CheckpointException as error:
        raise UserError(f"{stage} cannot be written: {first_cause(error)}") from None
    except RuntimeError as error:
        said = f"{error} {error.__context__}"
        if not any(word in said for word in _TORCH_CANNOT_WRITE):
            raise
        raise UserError(f"{stage} cannot be written: the disk is full or failed") from None
    except OSError as error:  # a limit on files' sizes holds for what brings the results back, too
        raise UserError(f"{stage} cannot be written: {error.strerror or error}") from None


def first_cause(error: CheckpointException) -> object:
    """Return why a rank could not read or write; only the coordinator is told."""
    return next((cause for cause, _ in error.failures.values()), "another rank failed")


@contextmanager
def _writers_die_with_us() -> Iterator[None]:
    """Bind Megatron-Core's writers to this process, which they do not outlive."""
    set_forks_die_with_parent(True)
    try:
        yield
    finally:
        set_forks_die_with_parent(False)
