"""The command line: every mistake is one line on stderr and exit code 2, every verb explains itself."""

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_bai import config
from megatron_bai.cli import compose, entry_point
from megatron_bai.cli.compose import config_subclasses
from megatron_bai.cli.help_text import verb_help
from megatron_bai.cli.verbs import VERBS
from megatron_bai.errors import UserError

PARSER = OverridesParser.create()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_bai", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--cfg", "job"]])
def test_a_full_disk_behind_the_standard_output_is_one_line(words: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megatron_bai", *words]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.endswith("such as the standard output: No space left on device\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Call the command line in this process, in an empty directory; gives the exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["megatron-bai", *arguments])
        monkeypatch.setattr(entry_point.signal, "signal", lambda *args: None)
        try:
            entry_point.main()
        except SystemExit as end:
            return end.code
        return 0

    return call


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], ["no verb 'trian'", "merge, train"]),
        (["train", "trainer.stepz=3"], ["trainer.stepz", "did you mean trainer.steps"]),
        (["train", "foo.bar=1"], ["foo.bar"]),
        (["train", "--cfg", "job", "trainer.stepz=3"], ["trainer.stepz", "did you mean trainer.steps"]),
        (["train", "init.checkpoint=x"], ["init.checkpoint", "add init=checkpoint, which has it"]),
        (
            ["train", "objective=grpo", "objective.is_max=3"],
            ["add objective=minirl or objective=sequence or objective=dppo, which has it"],
        ),
        (["train", "init=merge", "merge.sweep=[0.1]"], ["merge.sweep"]),
        (["train", "init=none"], ["init/none"]),
        (["train", "trainer.steps=many"], ["trainer.steps", "many", "Integer"]),
        (["train", "trainer.steps"], ["trainer.steps"]),
        (["train", "trainer.steps=[1"], ["'trainer.steps=[1'"]),
        (["train", "experiment=nothing"], ["experiment/nothing"]),
        (["train", "run.name=${no.such}"], ["no.such"]),
        (["train", "replay.mode=r4"], ["replay.mode is 'r4'"]),
        (["train", "trainer.mini_batches=5"], ["trainer.mini_batches (5)"]),
        (["train", "objective=sft"], ["trainer.save is empty"]),
        (["convert"], ["convert.source"]),
        (["convert", "convert.source=none", "convert.target=x"], ["none"]),
        (["convert", "convert.source=none", "convert.target=x", "convert.to=gguf"], ["'gguf'"]),
        (["serve", "serve.checkpoint=none"], ["no checkpoint at none"]),
        (["merge"], ["merge."]),
        (["inspect", "inspect.path=none"], ["none"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], named: list[str], here: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(*arguments) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("megatron-bai: error: ") and out == "", err
    assert all(part in err for part in named), err


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["train", "trainer.stepz=3"], "trainer.stepz"), (["train", "parallel.tensor=2"], "parallel.tensor")],
)
def test_so_it_is_in_a_process_of_its_own(arguments: list[str], named: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("megatron-bai: error: ") and named in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "--help"],
        ["doctor"],
        ["report", "report.runs=[nothing]"],
        ["samples", "samples.run=nothing"],
        ["train", "trainer.stepz=3"],
    ],
    ids=" ".join,
)
def test_what_needs_no_tensors_does_not_wait_for_torch(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    listed = re.findall(r"^import time:.*\| +(\w+)", run(*arguments, cwd=tmp_path).stderr, re.M)
    assert "megatron_bai" in listed
    assert not {"torch", "numpy", "transformers", "megatron", "sglang", "aiohttp", "numba"} & set(listed)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_what_a_verb_does_and_every_setting_it_reads(verb: str) -> None:
    text = verb_help(verb, VERBS[verb])
    assert VERBS[verb].summary in text and VERBS[verb].example in text
    for group in VERBS[verb].groups:
        for name in getattr(config, group.capitalize()).__dataclass_fields__:
            assert re.search(rf"^  {group}\.{name}(=|  \()", text, re.M), name


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_default_as_the_command_line_reads_it(verb: str) -> None:
    """Help is taken from the source, so a field that a formatter breaks over two lines is shown in pieces."""
    printed = set(re.findall(r"^  (\w+\.\w+)=(.*?)  \(", verb_help(verb, VERBS[verb]), re.M))
    for group in VERBS[verb].groups:
        for kind in config_subclasses(getattr(config, group.capitalize())):
            for name in inspect.get_annotations(kind):
                setting = kind.__dataclass_fields__[name]
                factory = setting.default_factory
                default = setting.default if factory is dataclasses.MISSING else factory()
                texts = [text for key, text in printed if key == f"{group}.{name}"]
                read = [override.value() for override in PARSER.parse_overrides([f"key={text}" for text in texts])]
                assert default in read, f"{group}.{name}: {texts}"


def test_help_is_printed_whatever_else_is_asked(tmp_path: Path) -> None:
    done = run("train", "no.such=1", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.rstrip() == verb_help("train", VERBS["train"])
    overview = run(cwd=tmp_path)
    assert overview.returncode == 0 and all(verb.summary in overview.stdout for verb in VERBS.values())
    assert list(tmp_path.iterdir()) == []


def test_every_verbs_code_exists_and_every_group_is_read_by_a_verb() -> None:
    read = {group for verb in VERBS.values() for group in verb.groups}
    assert read == set(config.Config.__dataclass_fields__)


def test_the_whole_configuration_can_be_printed(tmp_path: Path) -> None:
    """Every setting of every group, as the overrides left it; nothing else happens."""
    done = run("train", "experiment=qwen3_30b_minirl", "trainer.steps=3", "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    printed = yaml.safe_load(done.stdout)
    config.register_schema()
    assert printed["trainer"]["steps"] == 3 and printed["cluster"]["processes"] == 16
    settings = asdict(compose.compose(["experiment=qwen3_30b_minirl", "trainer.steps=3"]))
    assert {name: set(printed[name]) for name in printed} == {name: set(settings[name]) for name in settings}


def test_a_reason_is_the_first_line_with_its_cause_and_no_advice() -> None:
    try:
        try:
            raise ValueError("Key 'x' is not in struct\nfull_key: a.x")
        except ValueError as cause:
            raise RuntimeError("Could not override 'a.x'.\nTo append, use +a.x=1") from cause
    except RuntimeError as error:
        assert compose.summarize_hydra_error(error) == "Could not override 'a.x'. (Key 'x' is not in struct)"
    assert compose.summarize_hydra_error(KeyError()) == "KeyError"
    outer = RuntimeError("Key 'x' is missing")
    outer.__cause__ = ValueError("Key 'x' is missing")
    assert compose.summarize_hydra_error(outer) == "Key 'x' is missing"  # said once


def test_a_later_rank_names_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(entry_point.time, "sleep", lambda seconds: None)
    entry_point._print_error(UserError("a\n b"))
    assert capsys.readouterr().err == "megatron-bai: error [rank 3]: a b\n"


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry_point, "_dispatch", interrupted)
    monkeypatch.setattr(entry_point.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    assert end.value.code == 130 and capsys.readouterr().err == "megatron-bai: interrupted\n"
