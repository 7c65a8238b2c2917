"""A run of conversations, stopped in the midst of some and resumed, is the run that was never stopped."""

import base64
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import fake_sglang
import numpy as np
import pytest
from aiohttp import web
from command import megatron_bai, succeeded
from conversation_runs import add_chat, conversation_settings
from processes import TESTS

from megatron_bai.compat.releases import SGLANG
from megatron_bai.monitor.samples.store import read_step

LAYERS, EXPERTS, TOPK, EOS = 2, 3, 2, 1
CHECKPOINT = TESTS / "data" / "head-2fa74aa" / "merged"
TIMES = ("second", "memory", "mib", "gib")


class Server:
    """Draws tokens as a function of the seed and the place, and one of three ends a turn."""

    def __init__(self) -> None:
        self.version = "none"

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        if request.path == "/update_weight_version":
            self.version = body["new_version"]
        if request.path != "/generate":
            flags = dict.fromkeys(("enable_return_routed_experts", "enable_deterministic_inference"), True)
            return {"version": SGLANG, "weight_version": self.version, "success": True, **flags}
        ids, params = body["input_ids"], body["sampling_params"]
        if not params["max_new_tokens"]:
            return {"meta_info": {"input_token_logprobs": [[-4.0, token, None] for token in ids]}}
        if body.get("top_logprobs_num"):  # asked of a server before a run
            return {"meta_info": {"output_top_logprobs": [[[-i / params["temperature"], i, None] for i in range(4)]]}}
        output: list[int] = []
        while len(output) < params["max_new_tokens"] and EOS not in output:
            draw = Random(f"{params['sampling_seed']}/{len(ids) + len(output)}")
            output.append(EOS if draw.random() < 1 / 3 else draw.randrange(5, 20))
        rows = range(body.get("routed_experts_start_len", 0), len(ids) + len(output) - 1)
        routes = np.array([[[row % EXPERTS, (row + 1) % EXPERTS]] * LAYERS for row in rows], dtype="<i4")
        return {
            "output_ids": output,
            "meta_info": {
                "finish_reason": {"type": "stop" if output[-1] == EOS else "length"},
                "weight_versions": [{"version": self.version, "start": 0, "end": len(output)}],
                "output_token_logprobs": [[-2.0 - token / 20, token, None] for token in output],
                "routed_experts": base64.b64encode(routes.tobytes()).decode(),
            },
        }


def train(directory: Path, steps: int, *more: str) -> list[dict[str, Any]]:
    """The metrics of a run of so many steps, which continues the one that is in the directory."""
    directory.mkdir(exist_ok=True)
    checkpoint = directory / "initial"
    if not checkpoint.is_dir():
        shutil.copytree(CHECKPOINT, checkpoint)
        add_chat(checkpoint)
    with fake_sglang.serve(Server()) as url:
        words = [
            "train", "init=checkpoint", f"init.checkpoint={checkpoint}", *conversation_settings(directory),
            "backend.kind=cpu", f"rollout.urls=[{url}]", "rollout.sync=tensors", "rollout.sync_tolerance=10",
            "rollout.max_new_tokens=40", "rollout.partial_tokens=3", "rollout.prompts_in_progress=12",
            f"trainer.steps={steps}", "trainer.save_every=1", f"run.dir={directory}/run", *more,
        ]  # fmt: skip
        succeeded(megatron_bai(directory / "log", *words))
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.distributed
def test_a_run_stopped_amid_conversations_is_the_run_that_was_not(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    held = list((tmp_path / "parts" / "run" / "checkpoints").glob("step-00002/rollouts/*.npz"))
    about = [json.loads(np.load(file)["about"].tobytes()) for file in held]
    waiting = [entry for entries in about for entry in entries if entry["finish"] in ("partial", "turn")]
    assert any(entry["finish"] == "turn" for entry in waiting), "the test's premise: the environment is asked next"
    assert any(entry["turns"] and entry["finish"] == "partial" for entry in waiting), "and later turns are in progress"
    parts = train(tmp_path / "parts", 3)
    assert [step["step"] for step in parts] == [1, 2, 3]
    for one, other in zip(whole, parts, strict=True):
        differing = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        assert {name for name in differing if not any(time in name for time in TIMES)} == set()
    for step in (1, 2, 3):
        samples = read_step(tmp_path / "whole" / "run", step)
        assert samples == read_step(tmp_path / "parts" / "run", step)
        assert any(len(sample.turns) > 1 for sample in samples)
    assert all(step["route_coverage"] == 1.0 for step in whole)
    assert max(step["turns_mean"] for step in whole) > 1 and max(step["env_tokens_fraction"] for step in whole) > 0
    assert max(step["env_failed_fraction"] for step in whole) > 0
    lines = (tmp_path / "whole" / "log" / "err").read_text() + (tmp_path / "whole" / "log" / "out").read_text()
    assert "env=class in turn" in lines and "a turn of this length is too much" in lines
