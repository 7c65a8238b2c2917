"""A response may end at any of the model's end tokens, wherever the checkpoint names them, and each is asked for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sglang import NEW_TOKENS, SIGNATURE, good_reply, serve
from model.families import published

from megatron_bai import config
from megatron_bai.config import Arithmetic, Rollout
from megatron_bai.data.task import Prompt, Task
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.model import hf_checkpoint
from megatron_bai.model.architecture import read_architecture
from megatron_bai.rewards import open_scorer, score_samples
from megatron_bai.rl.run_task import make_task
from megatron_bai.rl.sample_sources import compute_sample_sources, list_changed_sources
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat

VOCAB = 64
# What a checkpoint's two files name, and at which a response ends
NAMED: dict[str, tuple[Any, Any, set[int]]] = {
    "the tokenizer alone": (None, None, {1}),
    "config.json, one": (60, None, {1, 60}),
    "config.json, several": ([60, 62, 61], None, {1, 60, 61, 62}),
    "generation_config.json, one": (None, 60, {1, 60}),
    "generation_config.json, several": (1, [1, 60], {1, 60}),
    "both, others": ([60], [61, 62], {1, 60, 61, 62}),
    "no ids": (None, [True, "1", None, -1, 1.0, VOCAB, [60]], {1}),
}


@pytest.fixture(params=NAMED)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, set[int]]]:
    in_config, in_generation, ends = NAMED[request.param]
    build_tokenizer(Arithmetic(), VOCAB).save_pretrained(tmp_path)
    described = published.read("qwen3_moe") | {"vocab_size": VOCAB}
    (tmp_path / "config.json").write_text(json.dumps(described | {"eos_token_id": in_config}))
    if in_generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    return tmp_path, ends


def tasks(directory: Path) -> list[Task]:
    """Both kinds, with the tokenizer of a checkpoint."""
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(60)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = read_architecture(directory).settings()
    data = [Arithmetic(), config.Dataset(train=str(directory / "rows.jsonl"), hold_out=0.3, chat_template=False)]
    settings = (config.Config(model=model, rollout=Rollout(max_new_tokens=NEW_TOKENS), data=each) for each in data)
    return [make_task(each, directory, print) for each in settings]


def test_a_response_ends_at_each_of_them_and_nowhere_else(checkpoint: tuple[Path, set[int]]) -> None:
    directory, ends = checkpoint
    for task in tasks(directory):
        assert task.end_tokens == ends
        prompt = Prompt([2], "1+1=", "2")
        text = task.tokenizer.encode("answer:2")
        others = {VOCAB - 1, task.tokenizer.pad_token_id} - ends
        assert [task.reward(prompt, [*text, end]) for end in ends] == [1.0] * len(ends)
        assert not any(task.reward(prompt, [*text, end]) for end in others)
        assert not any(task.reward(prompt, [*text, end, 1]) for end in ends), "an end within"
        assert not task.reward(prompt, text)


def test_each_is_asked_for_belongs_to_the_response_and_is_no_text(checkpoint: tuple[Path, set[int]]) -> None:
    directory, ends = checkpoint
    task = tasks(directory)[0]
    bodies: list[dict[str, Any]] = []

    def answer(request: Any, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        reply = good_reply(body["input_ids"])
        last = sorted(ends)[body["input_ids"][0] - 10]
        reply["output_ids"][-1] = reply["meta_info"]["output_token_logprobs"][-1][1] = last
        reply["meta_info"]["finish_reason"] = {"type": "stop", "matched": last}
        return reply

    asked = [[10 + number] for number in range(len(ends))]
    with serve(answer) as url:
        client = RolloutClient([url], Rollout(max_new_tokens=NEW_TOKENS, retries=0), RouteFormat(SIGNATURE), VOCAB, 64)
        samples = client.generate(asked, 1, 0, task.end_tokens)
        with pytest.raises(Exception, match=r"stopped at token .* and not at one of \[3\]"):
            client.generate(asked, 1, 0, [3])
    assert bodies[0]["sampling_params"]["stop_token_ids"] == sorted(ends)
    assert [(sample.finish, sample.response[-1]) for sample in samples] == [("stop", end) for end in sorted(ends)]
    assert {len(sample.logprobs) for sample in samples} == {NEW_TOKENS}, "the end token is trained, too"
    texts: list[str] = []

    def score(items: list[Any]) -> list[Any]:
        texts.extend(item.response for item in items)
        with open_scorer(config.Exact(), task, directory / "log") as scorer:
            return scorer(items)

    score_samples(score, task, [Prompt(ids, "", "1") for ids in asked], samples)
    assert texts == [task.tokenizer.decode([5] * (NEW_TOKENS - 1))] * len(ends)


def test_a_servers_checkpoint_names_all_of_them(checkpoint: tuple[Path, set[int]]) -> None:
    directory, ends = checkpoint
    copy = directory / "copy"
    copy.mkdir()
    hf_checkpoint.write_config(read_architecture(directory).settings(), torch.float32, directory, copy, True)
    found = json.loads((copy / "config.json").read_text())["eos_token_id"]
    found = set(found if isinstance(found, list) else [found])
    assert found - {VOCAB} == ends and not (copy / "generation_config.json").exists()


def test_another_one_is_seen_when_a_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    before, one, more = (compute_sample_sources(config.Config(), tmp_path, None, ends) for ends in ((), {1}, {1, 7}))
    assert list_changed_sources(before, one) == [] and list_changed_sources(one, more) == ["the end token"]
