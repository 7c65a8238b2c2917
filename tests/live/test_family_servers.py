"""SGLang on a CPU serves every family as Megatron-Core computes it: two steps of reinforcement learning with R3.

Each step samples from the real server and scores what it sampled with live routes as well as with replayed ones; the
second follows a weight sync. A family is `tests/model/families/configs/NAME.json`.
"""

import gzip
import json
from itertools import cycle
from pathlib import Path

import pytest
from family_runs import TOLERANCE, make_checkpoint, reinforce, require_same_engines
from tiers import tiered

FAMILIES = [
    "bailing_moe",
    "bailing_moe_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "kimi_k2",
    "minimax_m2",
    "mixtral",
    "moonlight",
    "olmoe",
    "qwen2_moe",
    "qwen2_moe_mixed_tied",
    "qwen3_moe_mixed_tied_yarn",
]  # those that are served on a CPU; docs/families.md has the others
# The ways of weight sync take turns: that each of them gives a server the same bits is test_server_weights's.
CASES = [f"{name}-{sync}" for name, sync in zip(FAMILIES, cycle(("disk", "tensors", "group")), strict=False)]
pytestmark = [pytest.mark.live, pytest.mark.usefixtures("forked_servers")]


@pytest.mark.parametrize("case", tiered(CASES, ["mixtral-tensors"]))
def test_two_steps_replay_the_routes_of_a_server_that_computes_the_same(case: str, tmp_path: Path) -> None:
    name, _, sync = case.rpartition("-")
    steps = reinforce(make_checkpoint(name, tmp_path / "published"), tmp_path / "run", sync)
    require_same_engines(steps)
    files = sorted((tmp_path / "run" / "samples").glob("*"))
    samples = [json.loads(line) for file in files for line in gzip.open(file, "rt")]
    trained = [sample for sample in samples if sample.get("logprobs_training")]
    assert {sample["step"] for sample in trained} == {1, 2}
    for sample in trained:
        pairs = zip(sample["logprobs_inference"], sample["logprobs_training"], strict=True)
        assert max(abs(one - other) for one, other in pairs) < TOLERANCE
