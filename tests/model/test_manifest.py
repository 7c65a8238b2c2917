"""A checkpoint directory is complete or is not read, at whatever point its writer died."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bai.errors import UserError
from megatron_bai.model import manifest


def write(target: Path, word: str) -> Path:
    """Stage and seal a checkpoint of two files, one below a folder."""
    stage = manifest.staging(target)
    (stage / "deep").mkdir()
    (stage / "weights").write_text(word * 100)
    (stage / "deep" / "more").write_text(word)
    return manifest.seal(stage, target, {"word": word})


def test_what_was_sealed_is_read_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = write(tmp_path / "a" / "checkpoint", "one")
    assert manifest.read(target) == manifest.require(target) == {"word": "one"}
    assert write(target, "two") == target
    assert manifest.read(target) == {"word": "two"} and (target / "weights").read_text() == "two" * 100
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]


class Killed(BaseException):
    """The process ended here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Die before the `step`-th flush, rename or deletion. Returns the list that steps are noted in."""
    done: list[str] = []

    def dying(name: str, inner):
        def call(*args, **kwargs):
            if len(done) == step:
                raise Killed
            done.append(name)
            return inner(*args, **kwargs)

        return call

    monkeypatch.setattr(manifest, "sync", dying("sync", manifest.sync))
    monkeypatch.setattr(manifest.shutil, "rmtree", dying("rmtree", manifest.shutil.rmtree))
    for name in ("rename", "write_text", "mkdir"):
        monkeypatch.setattr(Path, name, dying(name, getattr(Path, name)))
    return done


@pytest.mark.parametrize("replacing", [False, True])
def test_a_writer_that_dies_at_any_step_leaves_the_old_checkpoint_the_new_or_none(
    replacing: bool, tmp_path: Path
) -> None:
    seen = set()
    for step in range(100):
        target = tmp_path / str(step) / "checkpoint"
        if replacing:
            write(target, "old")
        with pytest.MonkeyPatch.context() as patch:
            done = killed_at(patch, step)
            try:
                write(target, "new")
                died = False
            except Killed:
                died = True
        found = manifest.read(target) if target.exists() else None
        if found is not None:
            assert (target / "weights").read_text() == found["word"] * 100
            assert (target / "deep" / "more").read_text() == found["word"]
        else:
            with pytest.raises(UserError):
                manifest.require(target)
        seen.add(found and found["word"])
        assert write(target, "again") and manifest.require(target) == {"word": "again"}  # the remains are in no way
        if not died:
            break
    assert done.count("rename") == 1 + replacing and step > 8
    assert seen == ({None, "old", "new"} if replacing else {None, "new"})


def test_a_process_killed_between_writing_and_sealing_leaves_nothing_to_read(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from megatron_bai.model import manifest\n"
        "stage = manifest.staging(sys.argv[1]); (stage / 'weights').write_text('x' * 100)\n"
        "print('written', flush=True); time.sleep(600)"
    )
    target = tmp_path / "checkpoint"
    writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with pytest.raises(UserError, match="no checkpoint at"):
        manifest.require(target)
    stage, = tmp_path.iterdir()
    with pytest.raises(UserError, match="has no manifest.json: it was never finished"):
        manifest.require(stage)
    assert manifest.read(stage) is None


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    target = write(tmp_path / "checkpoint", "one")
    (target / "weights").write_text("one" * 99)
    with pytest.raises(UserError, match=r"weights has 297 bytes instead of 300: the checkpoint is damaged"):
        manifest.read(target)
    (target / "weights").write_text("one" * 100)
    (target / "deep" / "more").unlink()
    with pytest.raises(UserError, match="deep/more is missing"):
        manifest.require(target)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is damaged"),
        ('{"version": 1, "files": {}', "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 1}', "is damaged"),
        (json.dumps({"version": 2, "files": {}, "info": {}}), "has version 2, this release reads version 1"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json.*{named}"):
        manifest.read(tmp_path)
