"""A rank's threads: each writes a unit of its own, the remaining units are divided, and none goes on after an error."""

import threading
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing
from pathlib import Path

import checkpoints
import pytest

from megatron_bai.checkpoint import positional_io
from megatron_bai.config import Merge
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.merge import pipeline
from megatron_bai.merge.execution import executor, tiles
from megatron_bai.merge.execution.thread_pool import thread_map


def merge(settings: Merge, threads: int, unit_bytes: int = 512) -> dict[str, bytes]:
    """Merge in small units with so many threads; return the files with tensors."""
    jobs = pipeline.make_jobs(settings)
    with ExitStack() as stack:
        plan = pipeline.open_and_plan(jobs, stack, RankGroup(), unit_bytes=unit_bytes)
        pipeline.execute_jobs(plan, jobs, RankGroup(), "all", threads)
    return {path.name: path.read_bytes() for path in Path(settings.output).glob("*.distcp")}


def test_each_thread_writes_a_unit_of_its_own_and_the_rest_is_divided(three, tmp_path, monkeypatch):
    alone = merge(three, 1)
    threads_of: dict[str, set[int]] = {}
    merge_items = tiles.merge_items

    def record(plan, batch, buffers):
        names = {items[0].file for _, _, items in batch}
        assert len(names) == 1, "a batch is of one unit"
        threads_of.setdefault(names.pop(), set()).add(threading.get_ident())
        time.sleep(0.005)  # so that another thread would take the next batch of a unit that is divided
        return merge_items(plan, batch, buffers)

    monkeypatch.setattr(tiles, "merge_items", record)
    monkeypatch.setattr(executor, "BATCH_BYTES", 64)  # many batches
    three.output = str(tmp_path / "threads")
    num_threads = next(n for n in (2, 3, 4, 5) if len(alone) % n)
    assert merge(three, num_threads) == alone
    assert threading.get_ident() not in set().union(*threads_of.values())
    num_divided = len(alone) % num_threads
    assert num_divided and len(threads_of) > num_divided, "some units are divided, some are not"
    assert sum(len(idents) > 1 for idents in threads_of.values()) <= num_divided


def test_a_batch_may_be_of_more_files_than_stay_open(three, tmp_path, monkeypatch):
    """Each source has two files, and one stays open; the descriptor of the other is the next file's."""
    split = [checkpoints.write(tmp_path / f"{i}", checkpoints.model(i), checkpoints.experts) for i in (1, 2)]
    three.members = [str(path) for path in split]
    expected = merge(three, 1, 1 << 20)
    for module in (positional_io, tiles):
        monkeypatch.setattr(module, "OPEN_FILES", 1)
    three.output = str(tmp_path / "few")
    assert merge(three, 1, 1 << 20) == expected


def test_after_an_error_the_other_calls_stop():
    """… at the item they are at: a unit takes seconds, of which an error or Ctrl-C need not wait."""
    started, failed = threading.Event(), threading.Event()
    outcomes = []

    def items():
        yield from range(2)
        failed.wait(60)
        yield from range(2, 1000)

    def work(number: int) -> int:
        if number == 1:
            started.wait(60)
            raise ZeroDivisionError
        try:
            started.set()
            outcomes.extend(run.in_turn(lambda item: item, items()))
        except CancelledError:
            outcomes.append("stopped")
            raise
        return number

    with pytest.raises(ZeroDivisionError), thread_map(2) as run:
        failing = run(work, [1, 0])
        with closing(failing):
            threading.Timer(0.5, failed.set).start()
            list(failing)
    assert outcomes == [0, 1, "stopped"]
