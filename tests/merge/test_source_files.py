"""The files of sources and of the output: what is carried, what is another tool's, what is replaced meanwhile."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest

from megatron_bai.checkpoint import carried_files
from megatron_bai.checkpoint.output_paths import resolve_output, validate_directory
from megatron_bai.cli import inspect_verb
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect
from megatron_bai.errors import UserError
from megatron_bai.merge import compare

CARRIED = [
    "config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "added_tokens.json", "preprocessor_config.json",
    "LICENSE", "modeling_x.py", "common.pt",
]  # fmt: skip
LEFT_OUT = [
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "optimizer.pt", "training_args.bin",
    "trainer_state.json", "consolidated.00.pth", "checkpoint-500/optimizer.pt", ".git/config", "original/params.json",
    "runs/events.out.tfevents.1", "train.log", ".gitattributes", "model.onnx", "extra.npz", "notes.txt",
]  # fmt: skip


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        if not (directory / name).exists():
            (directory / name).write_text("{}")


def test_what_belongs_to_the_model_is_carried_and_the_rest_is_named(three, capsys, monkeypatch):
    base = Path(three.pretrained)
    fill(base, CARRIED + LEFT_OUT)
    (base / "notes.txt").write_text("x" * (2 << 20))
    blob = base.parent / "blob"  # as in Hugging Face's cache
    (base / "tokenizer.json").rename(blob)
    (base / "tokenizer.json").symlink_to("../blob")
    (base / "vocab.txt").symlink_to("nowhere")
    merge_verb.run(Config(merge=dataclasses.replace(three, dry_run=True)))
    assert "not carried of" in capsys.readouterr().out
    monkeypatch.setattr(Path, "read_bytes", _bounded_read_bytes)
    merge_verb.run(Config(merge=three))
    out = Path(three.output)
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in CARRIED)
    assert not (out / "tokenizer.json").is_symlink()
    assert not [name for name in LEFT_OUT if (out / name).exists()]
    left_out = checkpoints.provenance(out)["files_left_out"]
    tops = {f"{name.split('/')[0]}/" if "/" in name else name for name in LEFT_OUT}
    assert set(left_out) == tops | {"vocab.txt"}


def _bounded_read_bytes(path: Path) -> bytes:
    """What is left out is never read."""
    assert not {path.name, *path.parts} & {Path(name).parts[0] for name in LEFT_OUT}, path
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"fileFormatVersion": "1.0.0"}'),
        ("manifest.json", "[]"),
        ("provenance.json", '{"of": "another tool"}'),
        ("provenance.json", "plain text"),
    ],
)
@pytest.mark.parametrize("role", ["pretrained", "member"])
def test_a_file_of_another_tool_under_our_name_does_not_matter(three, name, text, role, capsys):
    source = Path(three.pretrained if role == "pretrained" else three.members[0])
    (source / name).write_text(text)
    merge_verb.run(Config(merge=three))
    inspect_verb.run(Config(inspect=Inspect(path=str(source))))
    assert "not the output of a merge" in capsys.readouterr().out
    note = json.loads((Path(three.output) / "provenance.json").read_text())
    assert (name in note["files_left_out"]) == (role == "pretrained")


def test_a_directory_with_another_tools_provenance_is_not_overwritten(three):
    out = Path(three.output)
    out.mkdir()
    (out / "provenance.json").write_text('{"of": "another tool"}')
    with pytest.raises(UserError, match="exists and is no merge's output"):
        merge_verb.run(Config(merge=three))
    assert (out / "provenance.json").read_text() == '{"of": "another tool"}'


def test_files_are_hashed_in_parts(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(b"x" * (3 << 20))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read whole"))
    assert len(carried_files.hash_file(tmp_path / "large")) == 64
    with pytest.raises(UserError, match="cannot be read"):
        carried_files.hash_file(tmp_path / "none")


def replace_during(monkeypatch, settings, source: Path, how: str) -> None:
    """Replace a file of a source once the first unit is written."""
    from megatron_bai.merge.execution import executor

    write_unit = executor._write_unit

    def write_and_replace(*arguments, **named):
        results = write_unit(*arguments, **named)
        file = next(iter(sorted(source.glob("*.distcp"))))
        other = source.parent / "other"
        if how == "carried":
            (source / "config.json").write_text('{"other": 1}')
        elif how == "state":
            shutil.copy2(source / "common.pt", other)
            other.replace(source / "common.pt")
        elif how == "directory":
            shutil.copytree(source, other)
            source.rename(source.parent / "moved")
            other.rename(source)
        elif how == "renamed":
            shutil.copy2(file, other)
            other.replace(file)
        else:
            with open(file, "r+b") as stream:
                stream.write(stream.read(4)[::-1])
        monkeypatch.setattr(executor, "_write_unit", write_unit)
        return results

    monkeypatch.setattr(executor, "_write_unit", write_and_replace)


@pytest.mark.parametrize("how", ["renamed", "directory", "written", "carried", "state"])
@pytest.mark.parametrize("role", ["pretrained", "member"])
def test_a_source_that_is_replaced_while_it_is_merged_gives_no_result(three, how, role, monkeypatch):
    source = Path(three.pretrained if role == "pretrained" else three.members[1])
    (source / "config.json").write_text("{}")
    replace_during(monkeypatch, three, source, how)
    with pytest.raises(UserError, match="was replaced or changed while it was read|are not those that were saved"):
        merge_verb.run(Config(merge=three))
    assert not Path(three.output).exists() and not list(Path(three.output).parent.glob(".out.unfinished"))


def test_a_source_of_which_the_output_has_the_tokenizer_alone_is_watched_too(three, monkeypatch):
    source = Path(three.members[0])
    tokenizer = '{"added_tokens": [], "model": {"vocab": {"a": 0}}}'
    (source / "tokenizer.json").write_text(tokenizer)
    copy_file = shutil.copyfile

    def copy_and_replace(path, target):
        copy_file(path, target)
        if path == source / "tokenizer.json":
            (source / "new").write_text(tokenizer)
            (source / "new").replace(path)

    monkeypatch.setattr(shutil, "copyfile", copy_and_replace)
    without = dataclasses.replace(three, weights=[0.0, 1.0], tokenizer="1")
    with pytest.raises(UserError, match="tokenizer.json was replaced or changed while it was read"):
        merge_verb.run(Config(merge=without))
    assert not Path(three.output).exists()


def test_a_source_that_is_replaced_while_it_is_compared_is_named(three, monkeypatch):
    member = Path(three.members[0])
    compare_checkpoints = compare.compare_checkpoints

    def compare_and_replace(a, b):
        distances = compare_checkpoints(a, b)
        shutil.copy2(member / "__0_0.distcp", member / "new")
        (member / "new").replace(member / "__0_0.distcp")
        return distances

    monkeypatch.setattr(compare, "compare_checkpoints", compare_and_replace)
    with pytest.raises(UserError, match="was replaced or changed while it was read"):
        inspect_verb.run(Config(inspect=Inspect(path=three.pretrained, other=three.members[0])))


@pytest.mark.parametrize("how", ["link", "parent link", "dots", "inside", "holds", "linked files"])
def test_an_output_that_is_a_source_by_another_path_is_refused(three, how, tmp_path):
    merge_verb.run(Config(merge=three))
    before = checkpoints.read(tmp_path / "out")
    source = tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "parent").symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    pretrained, output = {
        "link": (tmp_path / "link", source),
        "parent link": (source, tmp_path / "parent" / "out"),
        "dots": (source, tmp_path / "deep" / ".." / "out"),
        "inside": (tmp_path / "link", source / "new"),
        "holds": (source / "inner", tmp_path / "link"),
        "linked files": (tmp_path / "snapshot", source),
    }[how]
    if how == "holds":
        shutil.copytree(three.pretrained, source / "inner")
    if how == "linked files":
        (tmp_path / "snapshot").mkdir()
        for file in source.iterdir():
            (tmp_path / "snapshot" / file.name).symlink_to(file)
    again = dataclasses.replace(three, pretrained=str(pretrained), output=str(output), alpha=0.1)
    with pytest.raises(UserError, match="merge.output .*(is one of the sources or lies inside|holds )"):
        merge_verb.run(Config(merge=again))
    after = checkpoints.read(source)
    assert all(after[key].equal(before[key]) for key in before)


def test_a_source_whose_files_are_the_outputs_own_stays_as_it_is(three, tmp_path):
    """A copy of hard links, as backups are made: the output is a new directory, and nothing is written in place."""
    merge_verb.run(Config(merge=three))
    shutil.copytree(three.output, tmp_path / "backup", copy_function=os.link)
    before = checkpoints.read(tmp_path / "backup")
    again = dataclasses.replace(three, pretrained=str(tmp_path / "backup"), alpha=0.1)
    merge_verb.run(Config(merge=again))
    after, found = checkpoints.read(tmp_path / "backup"), checkpoints.read(Path(three.output))
    assert all(after[key].equal(before[key]) for key in before)
    assert any(not found[key].equal(before[key]) for key in before)


def test_a_link_to_an_earlier_merge_works_each_time(three, tmp_path):
    merge_verb.run(Config(merge=three))
    (tmp_path / "link").symlink_to("out")
    for alpha in (0.1, 0.2, 0.3):
        merge_verb.run(Config(merge=dataclasses.replace(three, output=str(tmp_path / "link"), alpha=alpha)))
        assert (tmp_path / "link").is_symlink() and checkpoints.provenance(tmp_path / "out")["recipe"]["alpha"] == alpha
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("how", ["dangling", "file", "in a file", "working directory", "loop"])
@pytest.mark.parametrize("validate", [resolve_output, validate_directory])
def test_an_output_that_cannot_be_written_is_refused(how, validate, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    path = {"in a file": "../../file/out", "working directory": ".."}.get(how, f"../../{how}")
    if how == "working directory" and validate is validate_directory:
        return
    with pytest.raises(UserError, match="some.setting .*(link to|file|is no directory|working directory)"):
        validate(path, "some.setting")


def test_every_result_has_the_space_of_its_own_file_system(three, tmp_path, monkeypatch):
    import shutil as module

    from megatron_bai.merge.execution import output_dir

    class Stage:
        def __init__(self, path, device):
            self.parent, self.device = path, device

        def stat(self):
            return SimpleNamespace(st_dev=self.device)

    monkeypatch.setattr(output_dir, "bytes_left", lambda plan, stages: 10 * len(stages))
    free = {"a": 100, "b": 15}
    monkeypatch.setattr(module, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    output_dir.check_space(None, [Stage("a", 1), Stage("b", 2)])
    with pytest.raises(UserError, match="b has 15 bytes free, the merge needs 20"):
        output_dir.check_space(None, [Stage("a", 1), Stage("b", 2), Stage("b", 2)])
