"""A store of routes survives its writer's death, finds damage, and is read while it grows."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import TESTS
from routing.recordings import recording, same

from megatron_bai.errors import UserError
from megatron_bai.routing.store.codec import encode
from megatron_bai.routing.store.route_store import RecordEntry, RouteStore, StoreWriter, is_store, truncate_store


def fill(directory: Path, name: str = "a", step: int = 0, count: int = 5) -> list[RecordEntry]:
    """Records of samples 0 … count − 1, sample i with i + 3 rows."""
    with StoreWriter(directory, name) as writer:
        return [writer.append(step, i, "r3", encode(recording(i + 3, seed=i))) for i in range(count)]


def held(directory: Path, skip_damaged: bool = True) -> list[tuple[int, int]]:
    """(step, sample) of what can be read, each proven to be what was written."""
    found = []
    with RouteStore(directory) as store:
        for entry, read in store.iter_records(skip_damaged):
            assert same(read, recording(entry.sample + 3, seed=entry.sample), ordered=True)
            found.append((entry.step, entry.sample))
    return found


def test_records_of_all_files_come_by_step_and_sample(tmp_path: Path) -> None:
    assert not is_store(tmp_path / "s")
    with StoreWriter(tmp_path / "s", "b") as b, StoreWriter(tmp_path / "s", "a") as a:
        for writer, step, sample in [(b, 0, 2), (a, 0, 0), (b, 1, 0), (a, 0, 1), (a, 1, 1)]:
            writer.append(step, sample, "r2", encode(recording(sample + 3, seed=sample)))
    assert is_store(tmp_path / "s") and held(tmp_path / "s") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with RouteStore(tmp_path / "s") as store:
        assert {entry.source for entry in store.entries} == {"r2"} and store.damage == []


def test_a_store_that_is_opened_again_goes_on_where_it_ended(tmp_path: Path) -> None:
    fill(tmp_path, step=0)
    fill(tmp_path, step=1)
    assert held(tmp_path) == [(step, i) for step in (0, 1) for i in range(5)]


def test_a_store_is_cut_to_the_steps_before_one(tmp_path: Path) -> None:
    for step in range(3):
        fill(tmp_path, step=step, count=2)
    with open(tmp_path / "a.routes", "ab") as file:
        file.write(b"MBR")  # and what a kill left
    truncate_store(tmp_path, 1)
    assert held(tmp_path, skip_damaged=False) == [(0, 0), (0, 1)]
    fill(tmp_path, step=1, count=1)
    assert held(tmp_path, skip_damaged=False) == [(0, 0), (0, 1), (1, 0)]
    truncate_store(tmp_path, 0)
    assert held(tmp_path) == []


def test_a_store_that_is_not_by_step_is_not_cut(tmp_path: Path) -> None:
    fill(tmp_path, step=1)
    fill(tmp_path, step=0)
    before = (tmp_path / "a.routes").read_bytes()
    with pytest.raises(
        UserError, match="a.routes does not hold its records by step: it cannot be cut to those before 1"
    ):
        truncate_store(tmp_path, 1)
    assert (tmp_path / "a.routes").read_bytes() == before


def test_every_length_a_killed_writer_may_leave_is_read_up_to_the_last_whole_record(tmp_path: Path) -> None:
    entries = fill(tmp_path / "whole", count=2)
    data = entries[0].file.read_bytes()
    ends = [0, *(entry.offset + entry.length for entry in entries)]
    for size in range(len(data)):
        directory = tmp_path / str(size)
        directory.mkdir()
        file = directory / "a.routes"
        file.write_bytes(data[:size])
        whole = max(number for number, end in enumerate(ends) if end <= size)
        assert held(directory, skip_damaged=False) == [(0, i) for i in range(whole)]
        with RouteStore(directory) as store:
            torn = [(damage.start, damage.end) for damage in store.damage]
            assert torn == ([(ends[whole], size)] if size > ends[whole] else [])
            assert all("an unfinished record at the end" in str(damage) for damage in store.damage)
        with StoreWriter(directory, "a") as writer:
            assert writer.num_bytes_cut == size - ends[whole] and len(writer.entries) == whole
            writer.append(0, 4, "r3", encode(recording(7, seed=4)))
        assert held(directory, skip_damaged=False) == [(0, i) for i in (*range(whole), 4)]


def test_every_flipped_byte_costs_one_record_and_is_named(tmp_path: Path) -> None:
    entries = fill(tmp_path, count=3)
    file = entries[0].file
    data = file.read_bytes()
    second = entries[1]
    for at in range(second.offset - 32, second.offset + second.length):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        assert held(tmp_path) == [(0, 0), (0, 2)]
        with pytest.raises(UserError, match=rf"{file}.*restore the file from a copy") as error:
            held(tmp_path, skip_damaged=False)
        assert str(second.offset - 32) in str(error.value).replace(",", "")
        with RouteStore(tmp_path) as store:
            list(store.iter_records(skip_damaged=True))
            (damage,) = store.damage
            assert not damage.tail and damage.start <= at < damage.end
    assert StoreWriter(tmp_path, "a").num_bytes_cut == 0  # it is not at the end: nothing is thrown away


def test_headers_that_arrived_without_their_data_are_cut(tmp_path: Path) -> None:
    """A power cut may keep a file's length and headers, and not what lies between."""
    entries = fill(tmp_path, count=4)
    file = entries[0].file
    data = bytearray(file.read_bytes())
    for entry in entries[2:]:
        data[entry.offset : entry.offset + entry.length] = bytes(entry.length)
    file.write_bytes(data)
    assert held(tmp_path) == [(0, 0), (0, 1)]
    with StoreWriter(tmp_path, "a") as writer:
        assert writer.num_bytes_cut == len(data) - entries[1].offset - entries[1].length
    assert held(tmp_path, skip_damaged=False) == [(0, 0), (0, 1)]


def test_damage_over_many_blocks_is_passed_over(tmp_path: Path) -> None:
    big = encode(replace(recording(4000), token_hash=bytes(16)))
    with StoreWriter(tmp_path, "a") as writer:
        for sample in range(150):
            writer.append(0, sample, "r3", big)
    file = writer.path
    data = bytearray(file.read_bytes())
    first, last = writer.entries[0], writer.entries[-1]
    assert last.offset - first.offset > 3 << 20
    data[first.offset : last.offset - 32] = bytes(last.offset - 32 - first.offset)
    data[first.offset - 30] ^= 1
    file.write_bytes(data)
    with RouteStore(tmp_path) as store:
        assert [entry.sample for entry in store.entries] == [149]
        assert [(damage.start, damage.end) for damage in store.damage] == [(0, last.offset - 32)]


def test_a_header_across_two_blocks_of_the_search_is_found(tmp_path: Path) -> None:
    (entry,) = fill(tmp_path, count=1)
    record = entry.file.read_bytes()
    for shift in range(-4, 3):  # the search begins at byte 1 and reads blocks of 1 MiB
        entry.file.write_bytes(bytes((1 << 20) + 1 + shift) + record)
        assert held(tmp_path) == [(0, 0)]


_WRITER = """
import sys
from routing.recordings import recording
from megatron_bai.routing.store.codec import encode
from megatron_bai.routing.store.route_store import StoreWriter
with StoreWriter(sys.argv[1], "a") as writer:
    step = len(writer.entries)
    while True:
        writer.append(step, step % 7, "r3", encode(recording(step % 7 + 3, seed=step % 7)))
        print(step, flush=True)
        step += 1
"""


def test_a_writer_killed_at_any_time_loses_nothing_it_had_appended(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS / "routing"), *sys.path])
    appended = -1
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        for _ in range(40):
            appended = int(process.stdout.readline())
        with pytest.raises(UserError, match="another process writes to"):
            StoreWriter(tmp_path, "a")
        growing = held(tmp_path, skip_damaged=False)  # while it is written
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        appended = max([appended, *map(int, rest.split())])
        found = held(tmp_path, skip_damaged=False)
        assert found == [(step, step % 7) for step in range(len(found))]
        assert len(growing) <= appended + 1 <= len(found) <= appended + 2  # one may have come before its word of it
        appended = len(found) - 1


def test_two_records_of_one_sample_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a", count=1)
    fill(tmp_path, "b", count=1)
    with pytest.raises(UserError, match="two recordings of one sample: step 0 sample 0 .*a.routes.* and .*b.routes"):
        RouteStore(tmp_path)


def test_what_is_no_store_is_neither_read_nor_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no routes in .*: give a directory that replay.store named"):
        RouteStore(tmp_path)
    other = tmp_path / "a.routes"
    other.write_bytes(b"MBR\x02 of a later release")
    with pytest.raises(UserError, match="holds no routes that this release knows"):
        StoreWriter(tmp_path, "a")
    assert other.read_bytes() == b"MBR\x02 of a later release"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write routes to"):
        StoreWriter(tmp_path / "file", "a")


def test_a_file_that_may_not_grow_is_left_as_it_was(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "a")
    writer.append(0, 0, "r3", encode(recording(3)))
    size = writer.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))  # part of a record still goes in
    try:
        with pytest.raises(UserError, match="cannot write routes to .*: File too large"):
            writer.append(0, 1, "r3", encode(recording(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.path.stat().st_size == size
    writer.append(0, 1, "r3", encode(recording(4, seed=1)))
    writer.close()
    assert held(tmp_path, skip_damaged=False) == [(0, 0), (0, 1)]
