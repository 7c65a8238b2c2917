"""A checkpoint directory is complete or is not read, at whatever point its writer died."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kills import at_step, in_child

from megatron_bai.checkpoint import atomic_dir, crc32, manifest
from megatron_bai.errors import UserError


def write(target: Path, word: str) -> Path:
    """Stage and seal a checkpoint of two files, one below a folder."""
    stage = manifest.make_staging_dir(target)
    (stage / "deep").mkdir()
    (stage / "a.distcp").write_text(word * 100)
    (stage / "deep" / "more").write_text(word)
    return manifest.finalize(stage, target, {"word": word})


def test_what_was_sealed_is_read_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = write(tmp_path / "a" / "checkpoint", "one")
    assert manifest.read_info(target) == manifest.require_info(target) == {"word": "one"}
    assert write(target, "two") == target
    assert manifest.read_info(target) == {"word": "two"} and (target / "a.distcp").read_text() == "two" * 100
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_writer_killed_at_any_step_leaves_the_old_checkpoint_or_the_new(
    replacing: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # a file system such as NFS
        monkeypatch.setattr(atomic_dir, "_exchange_dirs", lambda a, b: False)
    seen = set()
    for step in range(100):
        target = tmp_path / str(step) / "checkpoint"
        if replacing:
            write(target, "old")
        code = in_child(at_step, step, write, target, "new")
        found = manifest.read_info(target)
        if replacing or found:
            assert manifest.require_info(target) and manifest.verify_weights(target) == 1
            assert (target / "a.distcp").read_text() == found["word"] * 100
            assert (target / "deep" / "more").read_text() == found["word"]
        else:
            with pytest.raises(UserError):
                manifest.require_info(target)
        seen.add(found and found["word"])
        assert write(target, "again") and manifest.require_info(target) == {
            "word": "again"
        }  # the remains are in no way
        assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert seen == {"old" if replacing else None, "new"} and step > 10


def test_a_reader_finishes_the_replacement_of_a_killed_writer(tmp_path: Path) -> None:
    """Between the two renames, which only a file system that cannot exchange needs."""
    target = write(tmp_path / "checkpoint", "new")
    target.rename(atomic_dir.staging_path(target))
    write(target, "old").rename(tmp_path / ".checkpoint.replaced")  # `write` empties the place of the new one …
    write(tmp_path / "other", "new").rename(atomic_dir.staging_path(target))  # … so it comes back
    assert not target.exists()
    assert manifest.require_info(target) == {"word": "new"}


def test_a_relative_path_may_be_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "checkpoint", "one"))
    assert manifest.require_info(".") == {"word": "one"}


def hold(target: Path, held: Connection) -> None:
    with atomic_dir.lock(target):
        held.send(True)
        signal.pause()


def test_one_writer_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    target, context = tmp_path / "checkpoint", multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(target, theirs))
    holder.start()
    assert mine.recv()
    with pytest.raises(UserError, match=f"{target} is being written by another process"), atomic_dir.lock(target):
        pass
    holder.kill()
    holder.join()
    with atomic_dir.lock(target), atomic_dir.lock(tmp_path / "another"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_killed_between_writing_and_sealing_leaves_nothing_to_read(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from megatron_bai.checkpoint import manifest\n"
        "stage = manifest.make_staging_dir(sys.argv[1]); (stage / 'weights').write_text('x' * 100)\n"
        "print('written', flush=True); time.sleep(600)"
    )
    target = tmp_path / "checkpoint"
    writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with pytest.raises(UserError, match="no checkpoint at"):
        manifest.require_info(target)
    (stage,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="has no manifest.json: it was never finished"):
        manifest.require_info(stage)
    assert manifest.read_info(stage) is None


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    target = write(tmp_path / "checkpoint", "one")
    (target / "a.distcp").write_text("one" * 99)
    with pytest.raises(UserError, match=r"a\.distcp has 297 bytes instead of 300: the checkpoint is damaged"):
        manifest.read_info(target)
    (target / "a.distcp").write_text("one" * 100)
    (target / "deep" / "more").unlink()
    with pytest.raises(UserError, match="deep/more is missing"):
        manifest.require_info(target)


def test_other_content_of_the_same_size_is_named(tmp_path: Path) -> None:
    target = write(tmp_path / "checkpoint", "one")
    (target / "deep" / "more").write_text("two")
    with pytest.raises(UserError, match="deep/more is not what was written"):
        manifest.read_info(target)
    (target / "deep" / "more").write_text("one")
    (target / "a.distcp").write_text("one" * 99 + "oNe")
    assert manifest.read_info(target) == {"word": "one"}, "weights are left to `verify`"
    with pytest.raises(UserError, match=r"a\.distcp is not what was written"):
        manifest.verify_weights(target)
    assert manifest.verify_weights(target, rank=1, num_ranks=2) == 0, "the other rank's share"


def test_a_manifest_of_the_first_version_has_sizes_alone(tmp_path: Path) -> None:
    target = write(tmp_path / "checkpoint", "one")
    files = {"a.distcp": 300, "deep/more": 3}
    (target / "manifest.json").write_text(json.dumps({"version": 1, "files": files, "info": {"old": 1}}))
    assert manifest.require_info(target) == {"old": 1} and manifest.verify_weights(target) == 0
    os.truncate(target / "a.distcp", 299)
    with pytest.raises(UserError, match="299 bytes instead of 300"):
        manifest.read_info(target)


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 300), st.integers(0, 300))
def test_checksums_of_parts_and_of_their_whole(tmp_path_factory, a: bytes, b: bytes, start: int, length: int) -> None:
    assert crc32.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
    path = tmp_path_factory.getbasetemp() / "parts"
    path.write_bytes(a + b)
    assert crc32.compute_file(path) == zlib.crc32(a + b)
    assert crc32.compute_file(path, start, length) == zlib.crc32((a + b)[start : start + length])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is damaged"),
        ('{"version": 1, "files": {}', "is damaged"),
        ('{"version": 2, "files": {}, "info": {}}', "is damaged"),
        (json.dumps({"version": 3, "files": {}, "info": {}}), "has version 3, this release reads versions 1 and 2"),
        (json.dumps({"version": 2, "files": {}, "info": {}, "crc32": "00000000"}), "it is not what was written"),
        (json.dumps({"version": 1, "files": {"../x": 1}, "info": {}}), "outside the checkpoint"),
        (json.dumps({"version": 1, "files": {"x": "1"}, "info": {}}), "no size"),
        ('{"version": 1, "version": 1, "files": {}, "info": {}}', "the key 'version' stands twice"),
        ('{"files": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json.*{named}"):
        manifest.read_info(tmp_path)


@pytest.mark.parametrize("name", ["bytes", "crc32"])
def test_one_of_ours_with_a_damaged_name_is_named(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "one", "one") / manifest.NAME
    for text in (file.read_text().replace(f'"{name}"', '"byxes"', 1), file.read_text().replace(f'"{name}"', '"byxes"')):
        file.write_text(text)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            manifest.read_info(tmp_path / "one")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '"text"', "no JSON", "[" * 100_000, '{"version": 1}', '{"fileFormatVersion": "1.0.0"}',
        '{"version": "1.0", "files": ["a"], "info": {}}', '{"version": 2, "files": {"a": {"sha256": "0"}}, "info": {}}',
        '{"name": "web app", "icons": [], "start_url": "/"}',
    ],
)  # fmt: skip
def test_the_manifest_of_another_tool_is_not_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert manifest.read_info(tmp_path) is None
    assert manifest.recorded_crcs(tmp_path) == {} and manifest.verify_weights(tmp_path) == 0
