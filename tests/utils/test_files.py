"""Small files that are replaced in one step, and locks between processes."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bai.utils import atomic_file, file_lock


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for durable in (False, True):
        atomic_file.write_text(path, "old\n")
        atomic_file.write_text(path, "π\n", durable)
        assert path.read_bytes() == "π\n".encode() and list(tmp_path.iterdir()) == [path]
    atomic_file.write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'


def test_what_is_no_file_of_its_own_stays_what_it_is(tmp_path: Path) -> None:
    """A report to `/dev/stdout` or `/dev/null` must not leave a file in its place."""
    target, link, dangling, pipe = (tmp_path / name for name in ("target", "link", "dangling", "pipe"))
    target.write_text("old")
    link.symlink_to("target")
    dangling.symlink_to("new")
    atomic_file.write_text(link, "through", durable=True)
    atomic_file.write_text(dangling, "made")
    assert link.is_symlink() and target.read_text() == "through"
    assert dangling.is_symlink() and (tmp_path / "new").read_text() == "made"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_file.write_text(pipe, "read")
    assert pipe.is_fifo() and os.read(reader, 9) == b"read"
    os.close(reader)
    with pytest.raises(IsADirectoryError) as refused:
        atomic_file.write_text(tmp_path, "x")
    assert refused.value.filename == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "new", "pipe", "target"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        atomic_file.write_text(path, "new", durable=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def in_child(function: Callable[[], Any]) -> Any:
    """Return what a forked process makes of `function`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(function()))
    child.start()
    result = here.recv()
    child.join()
    return result


def is_refused(path: Path) -> bool:
    try:
        with file_lock.lock_file(path):
            return False
    except BlockingIOError:
        return True


def open_file_is_refused(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        file_lock.lock_open_file(fd)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_a_lock_file_refuses_other_processes_and_goes_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "directory" / "lock"
    with file_lock.lock_file(path):
        assert in_child(lambda: is_refused(path))  # so a forked child does not have its parent's lock
    assert not path.exists() and not in_child(lambda: is_refused(path))


def test_an_open_files_lock_outlives_another_reader_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    file_lock.lock_open_file(fd)
    path.read_bytes()
    assert open_file_is_refused(path) and in_child(lambda: open_file_is_refused(path))
    os.close(fd)
    assert not open_file_is_refused(path)


def test_where_there_are_no_locks_no_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(file_lock.fcntl, "lockf", none)
    with file_lock.lock_file(tmp_path / "lock"):
        pass
    monkeypatch.setattr(file_lock.fcntl, "lockf", lambda *_: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"), file_lock.lock_file(tmp_path / "lock"):
        pass
