"""With `rollout.exact` the KL between SGLang and Megatron-Core is zero, in every step of a run of the real command.

It is shown for the demo's model, and for one whose every size is another: no power of two, and experts that the server
pads.
"""

import json
import os
from pathlib import Path

import forking
import pytest
from family_runs import REWARD

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
STEPS = 3
SETTINGS = [
    "init=random", "model=tiny", "model.init_std=0.15", "reward=function", "reward.function=family_reward:mixed",
    f"trainer.steps={STEPS}", "trainer.mini_batches=2", "trainer.learning_rate=1e-3", "trainer.prompts_per_step=4",
    "trainer.group_size=4", "trainer.micro_batch_size=4", "data.max_terms=3", "data.eval_prompts=2",
    "rollout.max_new_tokens=24", "rollout.max_total_tokens=2048", "rollout.exact=true",
]  # fmt: skip
PACKED = ["trainer.tokens_per_micro_batch=96", "rollout.sync=tensors", "parallel.recompute=full"]
SIZES = [
    f"model.{size}" for size in (
        "num_layers=3", "hidden_size=60", "num_attention_heads=6", "num_query_groups=3", "head_dim=12",
        "num_experts=10", "moe_topk=3", "moe_ffn_hidden_size=44", "vocab_size=72", "rope_theta=1e6",
        "norm_epsilon=1e-5",
    )
]  # fmt: skip
# Discrepancies of tokens are 0 and ratios 1, and not within a tolerance
ZERO = ("kl_k1", "kl_k3", "f_1.5", "route_mismatch", "discrepancy")
ONE = ("perplexity_ratio", "perplexity_ratio_max", "ess_discrepancy", "discrepancy_ratio_mean", "discrepancy_ratio_max")


@pytest.mark.parametrize("more", [[], PACKED + SIZES], ids=["demo model, padded", "other sizes, packed"])
def test_the_engines_log_probabilities_are_the_same_in_every_step(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "family_reward.py").write_text(REWARD)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    words = [f"run.dir={tmp_path}/run", *SETTINGS, *more]
    done = forking.run_script(["-m", "megatron_bai", "train", *words], os.environ | {"PYTHONPATH": path}, 600)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert step["grad_norm"] > 0 and step["route_coverage"] == 1.0 and step["entropy"] > 0.1
        assert [step[name] for name in ZERO] == [0.0] * len(ZERO), step
        assert [step[name] for name in ONE] == [1.0] * len(ONE), step
        assert [step[f"{name}_live"] for name in ("kl_k1", "kl_k3")] == [0.0, 0.0]
    assert steps[0]["staleness"] != 0  # the second update of a step: the policy moves, and the engines with it
