"""Whatever goes wrong in a merge, the target is as it was or complete, and nothing that was finished is done again."""

import dataclasses
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from kills import after_bytes, at_step, die, in_child
from test_command import content, merge_in_small_units, peer, spoil
from test_safetensors import hf  # noqa: F401, a fixture

from megatron_bai.checkpoint import manifest, positional_io
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import executor, journal


@pytest.fixture(params=["torch_dist", "safetensors"])
def settings(request) -> Merge:
    """A merge in each format, with small units, to be compared with an unbroken one."""
    return request.getfixturevalue({"torch_dist": "three", "safetensors": "hf"}[request.param])


@pytest.fixture
def unbroken(settings, tmp_path) -> dict[str, bytes]:
    whole = dataclasses.replace(settings, output=str(tmp_path / "unbroken"))
    merge_in_small_units(whole)
    return content(Path(whole.output))


def together(
    settings: Merge, ranks: int, store: Path, rank_0: Callable = lambda run: run(), unit_bytes: int = 512
) -> list[int]:
    """Merge in forks; rank 0 runs it through `rank_0`. If one dies the others are killed, as torchrun does."""
    store.unlink(missing_ok=True)

    def run(rank: int) -> None:
        work = functools.partial(peer, rank, ranks, str(store), settings, unit_bytes)
        rank_0(work) if rank == 0 else work()

    context = multiprocessing.get_context("fork")
    group = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in group:
        process.start()
    group[0].join(60)
    for process in group[1:]:
        if group[0].exitcode:
            process.kill()
        process.join(60)
    return [process.exitcode for process in group]


def moments() -> Iterator[tuple[Callable, int]]:
    """Some of the steps and some of the bytes at which to die; the last of the steps are after the end."""
    yield from ((at_step, step) for step in (*range(0, 40, 7), *range(40, 260, 20), 1000))
    yield from ((after_bytes, count) for count in (0, 1, 700, 2500, 5003))


@pytest.mark.parametrize("before", ["nothing", "an earlier merge"])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(settings, unbroken, tmp_path, before, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow, and of use only where the power is cut
    ended = set()
    some = list(moments())[:: 3 if before == "an earlier merge" else 1]
    for number, (kind, at) in enumerate(some):
        mine = dataclasses.replace(settings, output=str(tmp_path / f"out{number}"))
        target = Path(mine.output)
        if before == "an earlier merge":
            merge_in_small_units(dataclasses.replace(mine, alpha=0.25))
            earlier = content(target)
        code = in_child(kind, at, merge_in_small_units, mine)
        assert code in (0, -signal.SIGKILL)
        if before == "an earlier merge" or target.exists():
            assert (
                manifest.require_info(target)
                and manifest.verify_weights(target)
                and content(target) in (earlier, unbroken)
            )
        merge_in_small_units(mine)
        assert content(target) == unbroken and manifest.require_info(target) and manifest.verify_weights(target)
        assert not list(target.parent.glob(f".{target.name}.*")), "no remains"
        ended.add((kind, code))
        earlier = unbroken
    assert ended >= {(at_step, 0), (at_step, -signal.SIGKILL), (after_bytes, -signal.SIGKILL)}


@pytest.mark.parametrize("kind, at", [(at_step, 8), (at_step, 31), (after_bytes, 1500)])
def test_killed_with_two_ranks_it_goes_on_and_ends_the_same(settings, unbroken, tmp_path, kind, at):
    store = tmp_path / "store"
    codes = together(settings, 2, store, functools.partial(kind, at))
    assert codes[0] == -signal.SIGKILL and not Path(settings.output).exists()
    assert together(settings, 2, store) == [0, 0]
    assert content(Path(settings.output)) == unbroken and manifest.verify_weights(settings.output)


def test_only_unfinished_work_is_done_again(settings, tmp_path, monkeypatch):
    """Killed between the journal's end and the last rename there is nothing left to do but that."""
    monkeypatch.setattr(manifest.atomic_dir, "commit", die)
    assert in_child(merge_in_small_units, settings) == -signal.SIGKILL
    monkeypatch.undo()
    monkeypatch.setattr(executor, "execute_plan", die)
    assert in_child(merge_in_small_units, settings) == 0
    assert manifest.require_info(settings.output) and manifest.verify_weights(settings.output)


@pytest.mark.parametrize("what", ["weights", "journal"])
def test_what_was_damaged_since_is_written_again(settings, unbroken, tmp_path, what):
    assert in_child(dying_after_units, 4, settings) == -signal.SIGKILL
    stage = tmp_path / ".out.unfinished"
    if what == "weights":
        file = next(file for file in sorted(stage.glob("*.*")) if file.suffix in manifest.WEIGHT_SUFFIXES)
        flip(file, file.stat().st_size - 40 if settings.pretrained.endswith("base") else 700)
    else:
        flip(sorted((stage / journal.DIRECTORY).glob("*.json"))[0], 30)
    merge_in_small_units(settings, counted=tmp_path / "rest")
    assert content(Path(settings.output)) == unbroken


def after_units(count: int, happen: Callable[[], object]) -> Callable:
    """`merge_in_small_units` with something happening before the unit of that number."""
    write_unit, done = executor._write_unit, []

    def write(*arguments):
        if len(done) == count:
            happen()
        done.append(None)
        return write_unit(*arguments)

    def merge(settings: Merge) -> None:
        executor._write_unit, before = write, executor._write_unit
        try:
            merge_in_small_units(settings)
        finally:
            executor._write_unit = before

    return merge


def dying_after_units(count: int, settings: Merge) -> None:
    after_units(count, die)(settings)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def refused(merge: Callable, settings: Merge, message: str, kept: bool) -> None:
    with pytest.raises(UserError, match=message) as caught:
        merge(settings)
    assert "\n" not in str(caught.value)
    stage = Path(settings.output).with_name(".out.unfinished")
    assert not Path(settings.output).exists() and stage.exists() == kept
    assert bool(kept) == ("are finished and kept: run the merge again, it goes on with the other" in str(caught.value))


def test_a_source_that_vanishes_costs_nothing_that_is_finished(settings, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(
        positional_io, "OPEN_FILES", 1
    )  # so that files are opened again, as those of large checkpoints are
    member = Path(settings.members[1])
    gone = member.with_name("gone")
    refused(
        after_units(3, lambda: member.rename(gone)), settings, f"{member}/.* cannot be read: No such file", kept=True
    )
    gone.rename(member)
    merge_in_small_units(settings, counted=tmp_path / "rest")
    assert content(Path(settings.output)) == unbroken
    assert len((tmp_path / "rest").read_text().split(",")) > 3


def test_a_byte_that_flips_in_a_source_voids_what_was_merged_of_it(three, tmp_path):
    """A record is proven when all of it was read, which may be after units that hold parts of it were finished."""
    whole = dataclasses.replace(three, output=str(tmp_path / "unbroken"))
    merge_in_small_units(whole)
    with TorchDistReader(three.members[0]) as source:
        entry = source.tensors["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
        record, file = source.locate_record(entry, entry.chunks[0]), Path(three.members[0], entry.chunks[0].file)
    good = file.read_bytes()
    merge = after_units(3, lambda: flip(file, record.start + 5))
    refused(merge, three, f"{file}: the bytes of {entry.key} are not those", kept=False)
    file.write_bytes(good)
    merge_in_small_units(three)
    assert content(Path(three.output)) == content(Path(whole.output))


def test_what_an_earlier_process_read_is_proven_too(three, tmp_path):
    """Damage that all units have read before the kill; no time of change tells."""
    file = Path(three.members[0], "__0_0.distcp")
    with TorchDistReader(three.members[0]) as source:
        entry = next(e for e in source.tensors.values() if e.chunks[0].file == file.name and e.dtype.itemsize == 2)
        record = source.locate_record(entry, entry.chunks[0])
    flip(file, record.start + 2)

    def die_before_the_proof() -> None:
        TorchDistReader._require_crc = lambda *arguments: None
        TorchDistReader.verify_records = die
        merge_in_small_units(three)

    assert in_child(die_before_the_proof) == -signal.SIGKILL
    refused(merge_in_small_units, three, f"{file}: the bytes of {entry.key} are not those", kept=False)


def test_what_can_never_be_merged_is_not_kept(settings, monkeypatch):
    spoil(monkeypatch, 1 + 2**-5)
    refused(merge_in_small_units, settings, "is not what merge.method=bai makes of its sources", kept=False)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_costs_nothing_that_is_finished(settings, unbroken, tmp_path, small_disk):
    mine = dataclasses.replace(settings, output=str(small_disk / "out"))

    def fill() -> None:
        with open(small_disk / "ballast", "wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 10)):
                    pass
            except OSError:
                pass

    message = "disk/.out.unfinished.* No space left on device.* bytes more than are free"
    refused(after_units(3, fill), mine, message, kept=True)
    refused(merge_in_small_units, mine, "bytes free, the merge needs .* are finished and kept", kept=True)
    (small_disk / "ballast").unlink()
    merge_in_small_units(mine, counted=tmp_path / "rest")
    assert content(Path(mine.output)) == unbroken


def limited(merge: Callable[[Merge], None], settings: Merge, bytes_a_file: int, said: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, hard))
    try:
        merge(settings)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said.write_text(f"{error}\n")


@pytest.mark.parametrize("limit", [0, 30, 900, 2500])
def test_any_file_that_cannot_be_written_is_one_line(settings, unbroken, tmp_path, limit):
    """A limit on a file's size stops the mark, the journal, the units or the provenance."""
    assert in_child(limited, merge_in_small_units, settings, limit, tmp_path / "said") == 0
    said = (tmp_path / "said").read_text()
    assert (
        str(tmp_path) in said
        and "File too large" in said
        and said.count("\n") == 1
        and not Path(settings.output).exists()
    )
    merge_in_small_units(settings)
    assert content(Path(settings.output)) == unbroken


def stopped(settings: Merge, held: Connection) -> None:
    def wait() -> None:
        held.send(True)
        signal.pause()

    after_units(2, wait)(settings)


def test_two_merges_into_one_target(settings, unbroken):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    first = context.Process(target=stopped, args=(settings, theirs))
    first.start()
    assert mine.recv()
    with pytest.raises(UserError, match="out is being written by another process"):
        merge_in_small_units(settings)
    first.kill()
    first.join()
    merge_in_small_units(settings)
    assert content(Path(settings.output)) == unbroken


def test_a_target_without_the_right_to_write_is_one_line(three, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="merge.output .*file is no directory"):
        merge_verb.run(Config(merge=dataclasses.replace(three, output=str(tmp_path / "file" / "out"))))
