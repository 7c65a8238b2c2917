"""A group of ranks that work together: those torchrun started, or this process alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_bai.distributed.hosts import set_network_interface
from megatron_bai.errors import UserError, from_os_error

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """Ranks that call its methods together.

    Attributes:
        rank: this process's.
        num_ranks: in the group.
        group: torch's process group; None: all processes.
    """

    rank: int = 0
    num_ranks: int = 1
    group: Any = None  # torch's; None: all processes

    def run_on_all(self, function: Callable[[], T], location: object = "") -> list[T]:
        """Run `function` on every rank and return all results, by rank, on every rank. *Collective*.

        An error on one rank is an error on all: none continues, none waits for one that stopped.

        Args:
            function: what each rank does; its result is pickled.
            location: what an error of the system is about, unless it says so itself.

        Raises:
            UserError: that of the first rank that had one, on every rank; an error of the system becomes one.
            Exception: unchanged on the rank where it happened; a RuntimeError naming that rank on the others.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = function()
        except OSError as caught:
            error = caught if caught.errno is None else from_os_error(caught, location)
        except Exception as caught:
            error = caught
        if self.num_ranks == 1:
            if error is not None:
                raise error
            return [cast(T, result)]  # no error: `work` returned it
        user = error if isinstance(error, UserError) else None
        outcomes: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(outcomes, (result, user, None if error is None else repr(error)), group=self.group)
        if error is not None and user is None:
            raise error
        for _, theirs, _ in outcomes:
            if theirs is not None:
                raise theirs
        for rank, (_, _, text) in enumerate(outcomes):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")
        return [result for result, _, _ in outcomes]

    def run_on_first(self, function: Callable[[], T], location: object = "") -> T:
        """Run `function` on rank 0 and return its result on every rank. *Collective*; errors as in `run_on_all`.

        Args:
            function: what rank 0 does; its result is pickled where there are several ranks.
            location: what an error of the system is about, unless it says so itself.
        """
        return cast(T, self.run_on_all(lambda: function() if self.rank == 0 else None, location)[0])


def current_ranks() -> RankGroup:
    """Return the group of all processes in which this one is, or of this one alone."""
    return RankGroup(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else RankGroup()


def cores_per_rank(limit: int = 8) -> int:
    """Return this rank's share of the cores that this host's ranks may use, at most `limit`."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    return min(max(len(os.sched_getaffinity(0)) // local, 1), limit)


@contextmanager
def merge_ranks() -> Iterator[RankGroup]:
    """Open the group that shares a merge: a gloo group of its own where there are several ranks.

    Yields:
        All ranks of the run, or those that torchrun started, or this process alone.
    """
    timeout = timedelta(days=1)  # a collective waits for the slowest rank's work; torchrun ends the rest when one dies
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=timeout)
        try:
            yield RankGroup(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
    elif dist.is_torchelastic_launched():
        set_network_interface()
        dist.init_process_group("gloo", timeout=timeout)
        try:
            yield current_ranks()
        finally:
            dist.destroy_process_group()
    else:
        yield RankGroup()
