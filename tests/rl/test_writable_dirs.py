"""A directory that a run could not write is refused by its setting's name, before anything is made."""

import subprocess
from pathlib import Path

import pytest
from moe import MODEL

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.errors import UserError
from megatron_bai.rl import session
from megatron_bai.rl.writable_dirs import require_results_apart, require_writable, require_writable_dirs

CASES = {
    "file": "Not a directory",
    "file/below": "Not a directory",
    "dangling": "Not a directory",
    "n" * 300: "File name too long",
    f"none/{'n' * 300}/run": "File name too long",
    "full/none": "No space left on device",
    "read-only": "Read-only file system",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


def mount(path: Path, options: str) -> None:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_written_is_one_line(name: str, directory: Path) -> None:
    disk = directory / name.split("/")[0]
    on_disk = name.startswith(("full", "read-only"))
    if on_disk:
        mount(disk, "ro" if name == "read-only" else "size=4k")
    try:
        if name.startswith("full"):
            (disk / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(UserError, match=CASES[name]) as caught:
            require_writable("run.dir", directory / name)
        assert str(caught.value).startswith(f"run.dir={directory / name} cannot be written: ")
    finally:
        if on_disk:
            subprocess.run(["umount", str(disk)], check=False)


def test_what_can_be_written_is_not_made(directory: Path) -> None:
    before = sorted(directory.rglob("*"))
    for path in (directory, directory / "a" / "b"):
        require_writable("run.dir", path)
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("name", ["run.dir", "trainer.save", "objective.critic_save", "replay.store"])
def test_a_run_names_the_setting_before_it_starts(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.Config(model=MODEL, run=config.Run(dir=str(directory / "run")), objective=config.Ppo())
    group, _, key = name.partition(".")
    setattr(getattr(settings, group), key, str(directory / "file"))
    monkeypatch.setattr(session, "validate_settings", lambda _: None)
    monkeypatch.setattr(session, "require_packages", lambda _: None)
    monkeypatch.setattr(session.backend, "init_backend", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=f"^{name}=.*/file cannot be written: Not a directory"):  # noqa: SIM117
        with session.open_session(settings):
            pass


def settings_of(directory: Path, **given: str) -> config.Config:
    """A run in `directory/run` from `directory/start` with data, whose settings `given` names are changed."""
    trainer = config.Trainer(save=str(directory / given.get("save", "run/actor")))
    init = config.CheckpointInit(checkpoint=str(directory / given.get("checkpoint", "start")))
    objective = config.Ppo(critic_save=str(directory / given["critic"])) if "critic" in given else config.Minirl()
    data = config.Dataset(train=str(directory / "data" / "train.jsonl"))
    run = config.Run(dir=str(directory / "run"))
    return config.Config(run=run, trainer=trainer, init=init, objective=objective, data=data)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"save": "start"}, "trainer.save .*/start is init.checkpoint or lies inside it"),
        ({"save": "start/actor"}, "trainer.save .* is init.checkpoint or lies inside it"),
        ({"save": "link"}, "trainer.save .*/link is init.checkpoint"),
        ({"checkpoint": "link", "save": "start"}, "trainer.save .*/start is init.checkpoint"),
        ({"save": "deep/../start"}, "is init.checkpoint"),
        ({"save": "data"}, "trainer.save .*/data holds data.train"),
        ({"checkpoint": "linked", "save": "start"}, "holds what .*/linked/config.json is a link to"),
        ({"save": "run"}, "trainer.save .*/run is run.dir or holds it"),
        ({"checkpoint": "../start", "save": "."}, "holds data.train"),
        ({"save": "run/checkpoints"}, "is where the run keeps its own files"),
        ({"save": "run/tensorboard"}, "is where the run keeps its own files"),
        ({"save": "run/weights/3"}, "is where the run keeps its own files"),
        ({"save": "own"}, "trainer.save .*/own exists and is no checkpoint"),
        ({"critic": "start"}, "objective.critic_save .*/start is init.checkpoint"),
        ({"critic": "run/actor/critic"}, "objective.critic_save .* is trainer.save or lies inside it"),
        ({"save": "run/actor"}, ""),
        ({"save": "before"}, ""),
        ({"save": "empty"}, ""),
        ({"checkpoint": "run/first", "save": "run/second"}, ""),
    ],
)
def test_a_result_replaces_nothing_but_an_earlier_one(given: dict[str, str], said: str, tmp_path: Path) -> None:
    for name in ("start", "linked", "data", "own", "empty", "deep", "run/first"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "start" / "config.json").write_text("{}")
    (tmp_path / "linked" / "config.json").symlink_to("../start/config.json")
    (tmp_path / "link").symlink_to("start")
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    (tmp_path / "own" / "thesis.tex").write_text("years of work")
    manifest.finalize(manifest.make_staging_dir(tmp_path / "before"), tmp_path / "before", {})
    settings = settings_of(tmp_path, **given)
    if not said:
        return require_writable_dirs(settings)
    with pytest.raises(UserError, match=said):
        require_writable_dirs(settings)
    if "exists" not in said:
        with pytest.raises(UserError, match=said):
            require_results_apart(settings)  # as `plan` asks
    return None
