"""With truncated draws, and with end tokens held back, both engines compute one policy in every step of a real run."""

import json
import math
import os
from pathlib import Path

import forking
import pytest
from family_runs import REWARD

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
STEPS, TOP_K = 3, 6
SETTINGS = [
    "init=random", "model=tiny", "model.init_std=0.15", "reward=function", "reward.function=family_reward:mixed",
    f"trainer.steps={STEPS}", "trainer.mini_batches=2", "trainer.learning_rate=1e-3", "trainer.prompts_per_step=4",
    "trainer.group_size=4", "trainer.micro_batch_size=4", "data.max_terms=3", "data.eval_prompts=2",
    "rollout.max_new_tokens=24", "rollout.max_total_tokens=2048", f"rollout.top_k={TOP_K}", "rollout.top_p=0.9",
    "rollout.temperature=0.8", "objective.kl_penalty=0.01", "objective.entropy_bonus=0.01",
]  # fmt: skip
MORE = {
    "truncated": [
        "trainer.tokens_per_micro_batch=96", "rollout.sync=tensors", "rollout.min_new_tokens=5",
        "rollout.stop_token_ids=[7,8]", "objective=dppo", "trainer.eval_every=3",
    ],
    "held back": ["rollout.top_k=0", "rollout.top_p=1.0", "rollout.min_new_tokens=24"],
}  # fmt: skip
TOLERANCE = 1e-9  # of a KL: nats squared of float32 in two engines


@pytest.mark.parametrize("name", MORE)
def test_the_engines_agree_on_what_was_sampled(name: str, tmp_path: Path) -> None:
    (tmp_path / "family_reward.py").write_text(REWARD)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    words = [f"run.dir={tmp_path}/run", *SETTINGS, *MORE[name]]
    done = forking.run_script(["-m", "megatron_bai", "train", *words], os.environ | {"PYTHONPATH": path}, 600)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        print(
            {
                k: step[k]
                for k in (
                    "kl_k3",
                    "kl_k3_live",
                    "discrepancy_ratio_max",
                    "entropy",
                    "kl_reference",
                    "ess",
                    "divergence_mean",
                )
                if k in step
            }
        )
        assert step["grad_norm"] > 0 and step["route_coverage"] == 1.0 and step["entropy"] > 0.1
        assert abs(step["kl_k3"]) < TOLERANCE and abs(step["kl_k3_live"]) < TOLERANCE, step
        assert abs(step["discrepancy_ratio_max"] - 1) < 1e-3 and abs(step["kl_reference"]) < 1
        if name == "truncated":
            assert step["entropy"] < math.log(TOP_K)
        else:
            assert step["truncated_fraction"] == 1  # no token may be an end
