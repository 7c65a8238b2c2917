"""With `rollout.exact` the KL between SGLang and Megatron-Core is zero, in every step of a run of the real command."""

import json
from pathlib import Path

import pytest
from family_runs import make_checkpoint, two_steps

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
STEPS = 3
SETTINGS = [f"trainer.steps={STEPS}", "trainer.mini_batches=2", "trainer.learning_rate=3e-3", "rollout.temperature=0.8"]
# Discrepancies of tokens are 0 and ratios 1, and not within a tolerance
ZERO = ("kl_k1", "kl_k3", "f_1.5", "route_mismatch", "discrepancy")
ONE = ("perplexity_ratio", "perplexity_ratio_max", "ess_discrepancy", "discrepancy_ratio_mean", "discrepancy_ratio_max")


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_the_engines_log_probabilities_are_the_same_in_every_step(way: str, tmp_path: Path) -> None:
    packed = ["trainer.tokens_per_micro_batch=96", "rollout.sync=tensors", "parallel.recompute=full"]
    settings = [*SETTINGS, *(packed if way == "packed" else []), "rollout.exact=true"]
    done = two_steps(make_checkpoint("qwen3_moe", tmp_path / "published"), tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert step["grad_norm"] > 0 and step["route_coverage"] == 1.0 and step["entropy"] > 0.1
        assert [step[name] for name in ZERO] == [0.0] * len(ZERO), step
        assert [step[name] for name in ONE] == [1.0] * len(ONE), step
        assert [step[f"{name}_live"] for name in ("kl_k1", "kl_k3")] == [0.0, 0.0]
    assert steps[0]["staleness"] != 0  # the second update of a step: the policy moves, and the engines with it
