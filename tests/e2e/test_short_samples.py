"""Runs on prompts and responses of one token, one prompt, one group: as short as they can be, and valid."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import fake_sglang
import numpy as np
import pytest
import reference
import torch
from aiohttp import web
from command import megatron_bai, succeeded
from processes import TESTS

from megatron_bai.compat.releases import SGLANG
from megatron_bai.model.hf_checkpoint import read_config
from megatron_bai.monitor.samples.store import read_step
from megatron_bai.rl.experience.inference_engine import make_probe
from megatron_bai.rollout.client import sampling_seed

LAYERS, EXPERTS, TOPK = 2, 3, 2  # of the checkpoint
CHECKPOINT = TESTS / "data" / "head-2fa74aa" / "merged"
MODEL = [
    f"model.num_layers={LAYERS}", "model.hidden_size=8", "model.num_attention_heads=2", "model.num_query_groups=1",
    "model.head_dim=4", f"model.num_experts={EXPERTS}", f"model.moe_topk={TOPK}", "model.moe_ffn_hidden_size=8",
    "model.vocab_size=64", "model.max_position_embeddings=64", "backend.kind=cpu",
]  # fmt: skip
SMALLEST = ["trainer.prompts_per_step=1", "trainer.mini_batches=1", "trainer.micro_batch_size=2", "data.eval_prompts=1"]


def test_every_probe_has_a_token_to_predict() -> None:
    long = [[5, 6, 7], [8, 9]]
    assert make_probe(long) == long
    assert make_probe([[5]]) == [[5, 5, 5, 5]]
    assert make_probe([[5], [6], [7, 8]]) == [[5, 5, 6, 7], [6, 5, 6, 7], [7, 8]]


class Server:
    """Answers with as many random tokens as asked for, with weights of the version it was told last."""

    def __init__(self) -> None:
        self.version, self.prompts = "none", set()
        self.temperatures: dict[int | None, float] = {}  # by seed

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        if request.path == "/update_weight_version":
            self.version = body["new_version"]
        if request.path != "/generate":
            flags = dict.fromkeys(("enable_return_routed_experts", "enable_deterministic_inference"), True)
            return {"version": SGLANG, "weight_version": self.version, "success": True, **flags}
        ids, params = body["input_ids"], body["sampling_params"]
        length = params["max_new_tokens"]
        if not length:
            return {"meta_info": {"input_token_logprobs": [[-4.0, token, None] for token in ids]}}
        if body.get("top_logprobs_num"):  # asked of a server before a run
            return {"meta_info": {"output_top_logprobs": [[[-i / params["temperature"], i, None] for i in range(4)]]}}
        self.prompts.add(len(ids))
        assert self.temperatures.setdefault(params["sampling_seed"], params["temperature"]) == params["temperature"]
        drawn = random.Random(params["sampling_seed"])
        output = [drawn.randrange(5, 15) for _ in range(length)]
        rows = len(ids) + length - 1 - body.get("routed_experts_start_len", 0)
        routes = [drawn.sample(range(EXPERTS), TOPK) for _ in range(LAYERS * rows)]
        return {
            "output_ids": output,
            "meta_info": {
                "finish_reason": {"type": "length"},
                "weight_versions": [{"version": self.version, "start": 0, "end": length}],
                "output_token_logprobs": [[-4.0, token, None] for token in output],
                "routed_experts": base64.b64encode(np.array(routes, dtype="<i4").tobytes()).decode(),
            },
        }


@pytest.mark.distributed
@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["objective=grpo", "objective.advantage=centred", *SMALLEST], id="one prompt"),
        pytest.param(["objective=minirl", "trainer.tokens_per_micro_batch=8"], marks=pytest.mark.long, id="packed"),
        pytest.param(["objective=ppo", "trainer.group_size=1", "replay.mode=r2"], marks=pytest.mark.long, id="ppo"),
        pytest.param(
            ["objective=gspo", "objective.correction=sequence_mask", "rollout.partial_tokens=1"],
            marks=pytest.mark.long, id="partial",
        ),
        pytest.param(
            ["objective=dapo", "objective.drop_uniform_groups=true", "objective.refill_rounds=2"],
            marks=pytest.mark.long, id="refilled",
        ),
    ],
)  # fmt: skip
def test_prompts_of_one_token_train(settings: list[str], length: int, tmp_path: Path) -> None:
    if length == 1 and "rollout.partial_tokens=1" in settings:
        pytest.skip("a whole rollout")
    server = Server()
    with fake_sglang.serve(server) as url:
        trained(url, settings, length, tmp_path)
    assert min(server.prompts) == 1
    held_out = {sampling_seed("eval/0", prompt, 0) for prompt in range(2)}
    assert held_out & server.temperatures.keys()
    for seed, temperature in server.temperatures.items():
        assert temperature == (0.2 if seed in held_out else 0.7)


@pytest.mark.distributed
def test_the_training_engine_scores_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    """At 0.7, not at evaluation's 0.2 or at 1: with another one it learns, and the KL is that of two temperatures."""
    checkpoint = TESTS / "data" / "head-2fa74aa" / "converted"
    with fake_sglang.serve(Server()) as url:
        trained(url, ["objective=minirl", "replay.mode=none", f"init.checkpoint={checkpoint}"], 3, tmp_path)
    weights, model = reference.load(checkpoint), read_config(checkpoint)
    samples = [sample for sample in read_step(tmp_path / "run", 1) if sample.split == "train"]
    assert samples
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        wanted = reference.next_logprobs(reference.logits(weights, model, ids) / 0.7, ids)[0].detach()
        np.testing.assert_allclose(sample.logprobs_training, wanted[sample.prompt_length - 1 :], atol=1e-5)


def trained(url: str, settings: list[str], length: int, tmp_path: Path) -> None:
    rows = [{"prompt": str(i % 10), "answer": str(i % 7)} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train", *MODEL, "init=checkpoint", f"init.checkpoint={CHECKPOINT}", "data=dataset",
        f"data.train={tmp_path}/rows.jsonl", "data.chat_template=false", "data.hold_out=0.3", "data.eval_prompts=2",
        f"rollout.urls=[{url}]", "rollout.sync=tensors", "rollout.sync_tolerance=10", "trainer.steps=2",
        "rollout.temperature=0.7", "trainer.eval_temperature=0.2",
        f"rollout.max_new_tokens={length}", "trainer.prompts_per_step=4", "trainer.group_size=2",
        "trainer.micro_batch_size=2", "trainer.eval_every=1", "reward=exact", "monitor.tensorboard=false",
        f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    succeeded(megatron_bai(tmp_path / "log", *words, *settings))
    (metrics,) = tmp_path.glob("run/**/metrics.jsonl")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["response_length_mean"] == length and step["sync_gap"] < 10
        assert step["grad_norm"] is not None
