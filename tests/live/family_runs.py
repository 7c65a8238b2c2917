"""Checkpoints of families, and two steps of reinforcement learning from them with a server of a run's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forking
from model.families import published

from megatron_bai import config
from megatron_bai.data.tokenizer import build_tokenizer

TOLERANCE = 1e-5  # nats, of float32 in two engines
REWARD = """
def mixed(prompt, response, answer, extra):
    return sum(map(ord, response)) % 97 / 97  # differs within every group, whatever a random model says
"""


def make_checkpoint(name: str, directory: Path) -> Path:
    """A family's checkpoint of random weights, as another tool leaves it, with a tokenizer of the arithmetic task."""
    published.make(name, directory)
    build_tokenizer(config.Arithmetic(), published.read(name)["vocab_size"]).save_pretrained(directory)
    return directory


def reinforce(checkpoint: Path, run: Path, sync: str, *first: Path) -> list[dict[str, Any]]:
    """Two steps; their metrics. All samples are kept in the run's directory. `first`: directories of packages that are
    taken before those installed."""
    done = two_steps(checkpoint, run, f"rollout.sync={sync}", "replay.weights=server", first=first)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def two_steps(
    checkpoint: Path, run: Path, *settings: str, first: tuple[Path, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """`train` for two steps, with more settings, whether it succeeds or not."""
    sizes = ["trainer.prompts_per_step=4", "trainer.group_size=2", "trainer.mini_batches=1", "trainer.steps=2"]
    more = ["trainer.micro_batch_size=4", "trainer.learning_rate=1e-3", "data.max_terms=3", "data.eval_prompts=2"]
    rollout = ["rollout.max_new_tokens=12", "rollout.max_total_tokens=1024", *settings]
    (run.parent / "family_reward.py").write_text(REWARD)
    more += ["reward=function", "reward.function=family_reward:mixed"]
    where = ["init=checkpoint", f"init.checkpoint={checkpoint}", f"run.dir={run}"]
    command = ["-m", "megatron_bai", "train", *sizes, *more, *rollout, *where]
    path = os.pathsep.join(filter(None, [*map(str, first), str(run.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if first:
        command.insert(0, sys.executable)
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    return forking.run_script(command, environment, 600)


def require_same_engines(steps: list[dict[str, Any]]) -> None:
    """Every route was replayed in both steps; a server computed the same as the training engine, live and forced, with
    the training engine's weights of experts and with its own."""
    assert [step["route_coverage"] for step in steps] == [1.0, 1.0]
    for step in steps:
        assert step["grad_norm"] > 0 and step["route_mismatch"] == 0
        assert step["sync_gap"] < TOLERANCE
        for ratio in ("perplexity_ratio_max", "perplexity_ratio_max_live", "perplexity_ratio_max_weights"):
            assert abs(step[ratio] - 1) < TOLERANCE
        assert step["route_weight_gap_max"] < TOLERANCE  # of weights up to the router's factor
