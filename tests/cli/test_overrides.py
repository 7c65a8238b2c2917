"""A path is a text as typed, in every verb; unknown names get the nearest; what a verb never reads is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai import config
from megatron_bai.cli import entry_point, multirun
from megatron_bai.cli.compose import compose
from megatron_bai.cli.overrides import for_hydra, quote, setting_choices, setting_types
from megatron_bai.cli.verbs import VERBS
from megatron_bai.errors import UserError

NAMES = [
    "20251128_0931", "1e5", "0x10", "1_000", "1:30", "007", ".5", "true", "null", "nan", "off", "~x", "ü/ö ä", "a=b",
    "it's", 'a"b', "'q", "[final]", "[/b]", "{x}", "(y", "a b", "a,b", "$HOME", "a#b", "50%", "a\\b", "a\\", "a@b",
    "x|y&z;", "choice(a,b)", "int(3)", "-", "!t", "*", "&a", "日本", "a: b", "- a",
]  # fmt: skip
TEXTS = [name for name, kind in setting_types().items() if kind == "str" and not name.endswith(".name")]
LISTS = [name for name, kind in setting_types().items() if kind == "list[str]"]
CHOICES = [  # the groups' choices that have all texts between them
    ["data=dataset", "init=checkpoint", "objective=ppo", "reward=model", "env=class"],
    ["data=arithmetic", "init=random", "objective=dapo", "reward=function", "env=calculator"],
    ["reward=code"],
]


@pytest.fixture(autouse=True)
def schema() -> None:
    config.register_schema()


def value_of(words: list[str], setting: str) -> Any:
    group, _, key = setting.partition(".")
    return getattr(getattr(compose(words), group), key)


def hydra_reads(word: str) -> Any:
    """The value of an override as Hydra's parser reads what we make of it."""
    ((line,), _) = for_hydra([word])
    return OverridesParser.create().parse_override(line).value()


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_as_typed(name: str) -> None:
    assert hydra_reads(f"merge.output={name}") == hydra_reads(f"merge.output={quote(name)}") == name
    assert hydra_reads(f"report.runs=[{quote(name)}, b]") == [name, "b"]
    if not set(name) & set(",'\"()[]{}"):
        assert hydra_reads(f"merge.members=[{name}, {name}x]") == [name, f"{name}x"]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_any_text_is_as_typed(name: str) -> None:
    if name != "???" and "${" not in name:
        assert hydra_reads(f"convert.source={quote(name)}") == name
        assert hydra_reads(f"convert.source=x{name}") == f"x{name}"


def test_every_text_and_list_is_as_typed() -> None:
    """In the settings, where OmegaConf has had its say. Those with choices refuse it as typed: `'1_0'`, not `'10'`."""
    limits = setting_choices()
    plain, lists = ({name for name in names if name not in limits} for names in (TEXTS, LISTS))
    for choices in CHOICES:
        kinds = compose(choices)
        own = [name for name in sorted(plain) if hasattr(getattr(kinds, name.split(".")[0]), name.split(".")[1])]
        plain -= set(own)
        values = compose([*choices, *(f"{name}=1_0" for name in own), *(f"{name}=[1_0,'a,b',0x10]" for name in lists)])
        for name in own:
            assert getattr(getattr(values, name.split(".")[0]), name.split(".")[1]) == "1_0", name
        for name in lists:
            assert getattr(getattr(values, name.split(".")[0]), name.split(".")[1]) == ["1_0", "a,b", "0x10"], name
    assert not plain
    for name in limits:
        if setting_types()[name] == "str":
            assert hydra_reads(f"{name}=1_0") == "1_0"
    with pytest.raises(UserError, match=r"merge.members is a list: write 'merge.members=\[a\]'"):
        for_hydra(["merge.members=a"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("merge.output=${x}", r"merge.output: .*'x' not found; a text that has `\$\{` in it is written with `\\\$\{`$"),
        ("merge.members=[a,${x}]", r"merge.members\[1\]: .*'x' not found; a text"),
        ("run.dir=${run.dir}/x", "run.dir: Recursive"),
        ("init.checkpoint=${env:HOME}", "init.checkpoint: Unsupported interpolation type env"),
        ("merge.output=${", r"merge.output: in \$\{ `\$\{` begins a reference"),
        ("merge.output=a${}", "merge.output: in .* begins a reference"),
        ("merge.members=[a,b${]", r"merge.members\[1\]: in b\$\{ .* begins a reference"),
        ("report.runs=[???]", r"report.runs\[0\] is \?\?\?, which means that it is not given"),
    ],
)
def test_a_reference_to_nothing_is_refused_by_the_name_of_its_setting(word: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        compose(["init=checkpoint", word])


def test_a_dollar_and_a_brace_are_a_text_after_a_backslash() -> None:
    assert value_of([r"merge.output=\${x}"], "merge.output") == "${x}"
    assert value_of([r"merge.members=[\${x}]"], "merge.members") == ["${x}"]


def test_a_leading_tilde_is_the_home_directory() -> None:
    home = os.path.expanduser("~")
    assert value_of(["run.dir=~/r", "merge.output=${run.dir}/m"], "merge.output") == f"{home}/r/m"
    assert value_of(["merge.members=[~/a,b~]"], "merge.members") == [f"{home}/a", "b~"]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [("20251128_0931", False), ("1e5", False), ("0x10", False), ("1:30", False), ("true", False), ("010", False),
     ("20251128", True), ("'1e5'", True), ("a b", True), ("${run.name}/x", True)],
)  # fmt: skip
def test_a_text_of_an_experiment_file_is_as_written_or_refused(
    typed: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    for child in config.conf_dir().iterdir():
        (conf / child.name).symlink_to(child) if child.name != "experiment" else (conf / child.name).mkdir()
    text = f"# @package _global_\nrun: {{name: n}}\nmerge:\n  output: {typed}\n  members:\n  - {typed}\n  - x\n"
    (conf / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(config, "conf_dir", lambda: conf)
    if kept:
        wanted = typed.strip("'").replace("${run.name}", "n")
        assert value_of(["experiment=mine"], "merge.output") == wanted
        assert value_of(["experiment=mine"], "merge.members") == [wanted, "x"]
    else:
        with pytest.raises(UserError, match="experiment/mine.yaml: YAML reads merge.output: .* write it in quotes"):
            compose(["experiment=mine"])


def test_multirun_lists_texts_as_typed() -> None:
    jobs = multirun.combinations(["merge.output=20251128_0931,'a,b',[x,y]", "replay.mode=r2,r3"])
    values = [overrides[0] for _, overrides in jobs]
    assert [value_of([word], "merge.output") for word in values[::2]] == ["20251128_0931", "a,b", "[x,y]"]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("merge.alpha_for={experts:0.9}", {"experts": 0.9}),
        ("+merge.alpha_for={'layers.0-11': 1, \"a,b\":0}", {"layers.0-11": 1.0, "a,b": 0.0}),
        (r"merge.alpha_for={layers\.(0|1)\..{2,3}: 1}", {r"layers\.(0|1)\..{2,3}": 1.0}),
        ("merge.alpha_for.experts=.5", {"experts": 0.5}),
        ("merge.weights_for={embeddings:[1,0]}", {"embeddings": [1.0, 0.0]}),
        ("monitor.actions={length_collapse: stop}", {"length_collapse": "stop"}),
        ("monitor.actions.length_collapse=stop", {"length_collapse": "stop"}),
        ("data.template_options={a: 1}", {"a": 1}),
        ("merge.t_for={}", {}),
    ],
)
def test_mappings_are_read(word: str, value: dict[str, Any]) -> None:
    setting = ".".join(word.lstrip("+").partition("=")[0].split(".")[:2])
    assert value_of([*(["data=dataset"] if setting.startswith("data") else []), word], setting) == value


@pytest.mark.parametrize(
    ("verb", "words", "says"),
    [
        ("train", ["trainer.lr=1"], "there is no setting trainer.lr: did you mean trainer.learning_rate?"),
        ("train", ["+trainer.lr=1"], "did you mean trainer.learning_rate?"),
        ("train", ["trainer.temperature=1"], "did you mean rollout.temperature?"),
        ("train", ["traner.steps=1"], "did you mean trainer.steps?"),
        ("train", ["learning_rate=1"], "did you mean trainer.learning_rate?"),
        ("train", ["objectiv=sft"], "did you mean objective?"),
        ("train", ["objective=sftt"], "sapo, sequence, sft or tis; did you mean sft"),
        ("train", ["data=jsonl"], "choose arithmetic, dataset or tools"),
        ("train", ["experiment=dem"], "did you mean demo?"),
        ("train", ["data.train=x"], "add data=dataset"),
        ("train", ["monitor.actions={lenght_collapse:stop}"], "did you mean length_collapse?"),
        ("train", ["replay.mode=r2,r3"], "lists several values: --multirun"),
        ("train", ["trainer.steps=1,2"], "trainer.steps=1,2 lists several values: --multirun"),
        ("train", ["--dry-run"], "'--dry-run' is no setting"),
        ("inspect", ["runs/demo"], "is no setting: write group.key=value, as in `megatron-bai inspect inspect.path="),
        ("merge", ["merge.output=???"], "merge.output is ???"),
        ("merge", ["merge.output=${run.dir"], "begins a reference"),
        ("merge", ["merge.alpha_for={experts:x}"], "merge.alpha_for[experts] is 'x': give a number"),
        ("merge", ["merge.alpha_for=0.5"], "merge.alpha_for is a mapping: write"),
        ("merge", ["merge.alpha_for={experts: .5, 'experts': 1}"], "merge.alpha_for names 'experts' twice: give each"),
        ("merge", ["merge.output=\udcff"], "is no text in this locale's encoding"),
        ("report", ["trainer.steps=1"], "trainer.steps is given, and the verb report never reads it"),
        ("merge", ["convert.source=x"], "(it is for convert)"),
        ("merge", ["objective=sft"], "objective is given, and the verb merge never reads it"),
        ("train", ["report.runs=[a]"], "(it is for report)"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_a_line(verb: str, words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        compose(words, VERBS[verb])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("merge", ["run.dir=x", "merge.output=${run.dir}/y"]),
        ("merge", ["experiment=demo", "trainer.steps=3", "parallel.tensor=1"]),
        ("merge", ["merge.output=${trainer.save}", "trainer.save=1e5"]),
        ("serve", ["merge.output=x", "rollout.port=1"]),
        ("plan", ["objective=sft", "supervised.rows=3"]),
        ("doctor", ["backend.kind=cpu"]),
        ("convert", ["backend.dtype=bfloat16", "init=merge"]),
    ],
)
def test_what_is_read_in_some_way_is_accepted(verb: str, words: list[str]) -> None:
    compose(words, VERBS[verb])


def test_a_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="there is no verb 'trian': choose merge, train.*did you mean train"):
        entry_point._dispatch(["trian"])


def test_the_configuration_is_printed_with_texts_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    entry_point._dispatch(["merge", "--cfg", "job", "merge.output=1e5", "merge.alpha_for={'a b':1}"])
    printed = capsys.readouterr().out
    assert "output: '1e5'" in printed and "a b: 1.0" in printed
