"""Training on conversations of a real server and a real environment: R3 replays all of them, and the engines agree."""

import gzip
import json
import os
from pathlib import Path

import forking
import pytest
from conversation_runs import add_chat, conversation_settings
from family_runs import TOLERANCE, make_checkpoint, require_same_engines

from megatron_bai.monitor.samples.kept_sample import KeptSample

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
ENDS = [1, 2, 5, 6, 7, 9, 11, 13, 17, 19, 23]  # any of them ends a turn of random weights; the template's end is 1


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_both_engines_agree_on_every_sampled_token(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name, tmp_path / "published")
    add_chat(checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    command = [
        "-m", "megatron_bai", "train", *conversation_settings(tmp_path), "init=checkpoint",
        f"init.checkpoint={checkpoint}", "rollout.max_new_tokens=36", "rollout.max_total_tokens=1024",
        "trainer.steps=2", "trainer.learning_rate=1e-3", "replay.weights=server", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    done = forking.run_script(command, os.environ | {"OMP_NUM_THREADS": "1"}, 600)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    require_same_engines(steps)
    assert max(step["turns_mean"] for step in steps) > 1 and max(step["env_tokens_fraction"] for step in steps) > 0
    files = sorted((tmp_path / "run" / "samples").glob("*"))
    samples = [KeptSample.from_json(line) for file in files for line in gzip.open(file, "rt")]
    trained = [sample for sample in samples if sample.split == "train"]
    assert any(len(sample.turns) > 1 for sample in trained)
    inserted = 0
    for sample in trained:
        given, response = sample.from_environment, sample.tokens[sample.prompt_length :]
        assert [value is None for value in sample.token_discrepancies] == given and not given[-1]
        assert all(value < TOLERANCE for value in sample.token_discrepancies if value is not None)
        for turn in sample.turns[:-1]:
            assert response[turn["end"] - 1] in ENDS
            assert (response[turn["end"]] == 1) == (response[turn["end"] - 1] != 1)  # the template's end, once
            inserted += response[turn["end"]] == 1
    assert inserted
