"""An objective from outside through a real run, with what any objective may be joined by."""

import json
from pathlib import Path

import pytest
from command import megatron_bai, succeeded
from outside import install

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("forked_servers")]


def test_it_trains_with_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "site")), prepend=":")
    objective = ["objective=reinforce", "objective.scale=2", "objective.mask_overlong=true"]
    options = ["objective.kl_penalty=0.1", "objective.kl_estimator=k2", "objective.entropy_bonus=0.01"]
    sizes = ["trainer.steps=2", "trainer.prompts_per_step=4", "trainer.group_size=4", "trainer.mini_batches=1"]
    small = ["trainer.micro_batch_size=4", "rollout.max_new_tokens=16", f"run.dir={tmp_path / 'run'}"]
    succeeded(megatron_bai(tmp_path / "logs", "train", *objective, *options, *sizes, *small))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    for values in (first, second):
        assert {"surprise", "staleness", "discrepancy", "discrepancy_ratio_max", "staleness_ratio_max"} <= values.keys()
        assert 0 < values["left_out_fraction"] < 1 and values["left_out_fraction"] == values["truncated_fraction"]
        assert values["entropy_update"] == pytest.approx(values["entropy"], rel=0.05)  # of the samples that count
    # The weights of the start are the reference: one update lies between the two steps.
    assert abs(first["kl_reference"]) < 1e-9 < 1e-5 < second["kl_reference"]
    assert first["sync_gap"] < 1e-5 and second["sync_gap"] < 1e-5
