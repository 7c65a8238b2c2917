"""Settings of older runs and checkpoints against those of a release that has more, fewer, or others of another name."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_bai import config
from megatron_bai.rl import saved_settings, sft_fingerprint
from megatron_bai.rl.saved_settings import complete_settings, list_changes
from megatron_bai.utils.flatten import flatten

MODEL = config.Model(*[1] * 10)


@dataclass
class NewerTrainer(config.Trainer):
    extra: int = 3
    table: dict[str, float] = field(default_factory=lambda: {"a": 1.0})


@dataclass
class NewerGroup:
    checkpoint: str = "here"


@dataclass
class NewerConfig(config.Config):
    group: NewerGroup = field(default_factory=NewerGroup)


def flatten_settings(settings: config.Config) -> dict[str, str]:
    return flatten(dataclasses.asdict(settings))


def older(**changes: Any) -> config.Config:
    return config.Config(model=MODEL, **changes)


def newer(**changes: Any) -> NewerConfig:
    return NewerConfig(model=MODEL, trainer=NewerTrainer(**changes))


def test_equal_settings_do_not_differ() -> None:
    assert list_changes(flatten_settings(older()), older()) == []


def test_a_setting_or_group_that_did_not_exist_counts_as_its_default() -> None:
    saved = flatten_settings(older())
    assert list_changes(saved, newer()) == []
    assert complete_settings(saved, newer()) == flatten_settings(newer())
    assert list_changes(saved, newer(extra=4)) == ["trainer.extra was 3, is 4"]
    assert list_changes(saved, newer(table={})) == [
        "trainer.table was unknown, is {}",
        "trainer.table.a was 1.0, is unknown",
    ]
    assert list_changes(saved, newer(extra=4), lambda name: name == "trainer.extra") == []


def test_a_size_that_was_not_said_is_a_change() -> None:
    saved = {name: text for name, text in flatten_settings(older()).items() if name != "model.num_layers"}
    assert list_changes(saved, older()) == ["model.num_layers was 0, is 1"]
    assert list_changes({}, older())


def test_a_setting_that_no_longer_exists_is_named() -> None:
    gone = "and this release has no such setting"
    assert list_changes(flatten_settings(newer()), older()) == [
        f"group.checkpoint was here, {gone}",
        f"trainer.extra was 3, {gone}",
        f"trainer.table.a was 1.0, {gone}",
    ]


def test_a_renamed_setting_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = {"trainer.extra": "trainer.steps", "trainer.table": "monitor.actions"}
    monkeypatch.setattr(saved_settings, "RENAMED", renamed | {"group.checkpoint": "serve.checkpoint"})
    saved = flatten_settings(newer(extra=7))
    saved = {name: text for name, text in saved.items() if name not in renamed.values() and name != "serve.checkpoint"}
    now = older(serve=config.Serve("here"), monitor=config.Monitor(actions={"a": 1.0}))
    assert list_changes(saved, now) == ["trainer.steps was 7, is 10"]


def test_settings_of_another_kind_are_not_called_gone() -> None:
    changes = list_changes(flatten_settings(older(objective=config.Grpo())), older())
    assert "objective.name was grpo, is minirl" in changes and "objective.correction was none, is unknown" in changes


def supervised(**trainer: Any) -> config.Config:
    return older(objective=config.Sft(), trainer=config.Trainer(save="x", **trainer))


def noted(settings: config.Config) -> dict[str, Any]:
    """A manifest's info as it is read."""
    made_with, made_by = sft_fingerprint.describe_sft(settings), sft_fingerprint.sft_fingerprint(settings)
    return json.loads(json.dumps({"made_with": made_with, "made_by": made_by}))


def test_a_supervised_checkpoint_knows_the_settings_that_it_was_made_with() -> None:
    info = noted(supervised(steps=3))
    assert sft_fingerprint.list_differences(info, supervised(steps=3, keep=5, grace_s=1.0)) == []
    assert sft_fingerprint.list_differences(info, supervised(steps=4)) == ["trainer.steps was 3, is 4"]
    del info["made_with"]["settings"]["trainer.adam_beta2"]
    assert sft_fingerprint.list_differences(info, supervised(steps=3)) == []
    assert sft_fingerprint.list_differences(info, supervised(steps=3, adam_beta2=0.9)) == [
        "trainer.adam_beta2 was 0.999, is 0.9"
    ]
    info["made_with"]["init"] = "of others"
    assert sft_fingerprint.list_differences(info, supervised(steps=3)) == ["training started from other weights"]


def test_a_supervised_checkpoint_with_a_hash_alone_is_known_whatever_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if `adam_beta2` had not existed when the hash was computed."""
    original = sft_fingerprint._ORIGINAL[config.Trainer]
    before = tuple(name for name in original if name != "adam_beta2")
    with_it = {"made_by": sft_fingerprint.sft_fingerprint(supervised())}
    monkeypatch.setitem(sft_fingerprint._ORIGINAL, config.Trainer, before)
    hashed = {"made_by": sft_fingerprint.sft_fingerprint(supervised())}
    assert hashed != with_it
    assert sft_fingerprint.list_differences(hashed, supervised()) == []
    assert sft_fingerprint.list_differences(hashed, supervised(adam_beta2=0.9))
    assert sft_fingerprint.list_differences(hashed, supervised(steps=4))


def test_a_dataset_whose_rows_change_is_another(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    settings = dataclasses.replace(supervised(), data=config.Dataset(train=str(rows)))
    info = noted(settings)
    assert sft_fingerprint.list_differences(info, settings) == []
    rows.write_text('{"a": 1}\n')
    assert sft_fingerprint.list_differences(info, settings) == ["the rows in data.train or data.eval have changed"]
