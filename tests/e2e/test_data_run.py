"""Rows from a file through real runs: supervised, then RL with two replicas, a reward function and refill."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import all_succeeded, megatron_bai, succeeded, torchrun

from megatron_bai.checkpoint import manifest

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.usefixtures("forked_servers")]
# Fails for one sample of every group, whatever it is, where a replica has one worker.
REWARD = """
seen = set()


def odd(prompt, response, answer, extra):
    print("rewarding", prompt)
    if extra["number"] not in seen:
        seen.add(extra["number"])
        raise ValueError("the first")
    return len(response) % 2
"""
SUPERVISED = ["objective=sft", "trainer.micro_batch_size=8", "supervised.rows=8", "supervised.length=64"]


def rows(count: int) -> list[dict[str, Any]]:
    terms = [(i % 9 + 1, i // 9 % 9 + 1, i // 81 % 9 + 1) for i in range(count)]
    text = "<user>{}+{}+{}<assistant>"
    return [
        {"prompt": text.format(*t), "answer": str(sum(t)), "text": f"answer:{sum(t)}", "number": i}
        for i, t in enumerate(terms)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained on rows, the rows, and a reward function."""
    place = tmp_path_factory.mktemp("data")
    (place / "my_rewards.py").write_text(REWARD)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(300)))
    first = ["train", *SUPERVISED, "trainer.steps=2", f"trainer.save={place}/first", f"run.dir={place}/run-1"]
    data = ["data=dataset", f"data.train={place}/rows.jsonl", "data.response=text", "data.chat_template=false"]
    more = ["trainer.steps=3", "init=checkpoint", f"init.checkpoint={place}/first", f"trainer.save={place}/actor"]
    second = ["train", *SUPERVISED, *data, *more, f"run.dir={place}/run-2"]
    all_succeeded(place / "log-1", {"first": first, "second": second})
    return place


def test_supervised_training_on_rows_says_which(place: Path) -> None:
    lines = (place / "run-2" / "actor-log" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)
    assert manifest.read_info(place / "actor")["data"]["train"] == str(place / "rows.jsonl")


def test_reinforcement_on_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=":")
    data = ["data=dataset", f"data.train={place}/rows.jsonl", "data.hold_out=0.1", "data.eval_prompts=6"]
    reward = ["data.chat_template=false", "reward=function", "reward.function=my_rewards:odd", "reward.workers=1"]
    refill = ["objective.drop_uniform_groups=true", "objective.refill_rounds=3"]
    sizes = ["trainer.prompts_per_step=8", "trainer.group_size=4", "trainer.mini_batches=1", "trainer.steps=2"]
    more = ["trainer.micro_batch_size=4", "rollout.max_new_tokens=12", "trainer.eval_every=1", "trainer.eval_samples=3"]
    where = ["init=checkpoint", f"init.checkpoint={place}/actor", f"run.dir={place}/run-3"]
    command = ["-m", "megatron_bai", "train", *data, *reward, *refill, *sizes, *more, *where]
    done = succeeded(torchrun(place / "log-3", 2, *command))
    steps = [json.loads(line) for line in (place / "run-3" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["reward_failed_fraction"] == 0.25  # no prompt comes twice
        assert step["refill_rounds"] <= 3 and step["prompts_tried"] >= 8
        assert step["eval_accuracy_low"] <= step["eval_accuracy"] <= step["eval_accuracy_high"]
        assert step["eval_best"] >= step["eval_accuracy"] and 0 < step["eval_length"] <= 12
        assert step["route_coverage"] == 1.0
    assert "rewards failed (reward=function), their samples are left out; first: ValueError: the first" in done.err
    assert "rewarding <user>" in (place / "run-3" / "reward.log").read_text()


def test_a_bad_row_stops_a_run_with_its_line(place: Path) -> None:
    bad = place / "bad.jsonl"
    bad.write_text((place / "rows.jsonl").read_text() + '{"prompt": "no answer"}\n')
    data = ["data=dataset", f"data.train={bad}", "data.chat_template=false"]
    init = ["init=checkpoint", f"init.checkpoint={place}/actor"]
    done = megatron_bai(place / "log-4", "train", *data, *init, f"run.dir={place}/run-4").wait()
    assert done.code == 2 and done.complaints == [f"{bad}:301: there is no 'answer', only 'prompt'"]
    assert not done.tracebacks and not done.orphans
