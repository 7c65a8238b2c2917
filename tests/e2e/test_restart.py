"""A rank of a real run is killed -9; torchrun starts it again: it goes on with a new server and the samples it had."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import SERVER, succeeded, torchrun

from megatron_bai.monitor.samples import store

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.long]
STEPS = 4


def test_a_killed_rank_is_restarted_and_goes_on(tmp_path: Path, fault: Callable[..., None]) -> None:
    run = tmp_path / "run"
    words = [f"run.dir={run}", f"trainer.steps={STEPS}", "trainer.save_every=1", "trainer.save_async=true"]
    words += [
        "trainer.prompts_per_step=4",
        "trainer.group_size=4",
        "trainer.micro_batch_size=8",
        f"trainer.save={run}/result",
    ]
    words += ["rollout.partial_tokens=6", "rollout.overlap=true"]
    words += ["rollout.max_new_tokens=16", "objective.kl_penalty=0.01", "objective.entropy_bonus=0.1"]
    command = torchrun(tmp_path / "log", 1, "--max-restarts=1", "-m", "megatron_bai", "train", *words)
    command.until(lambda: (run / "checkpoints" / "step-00001").is_dir())
    command.processes(SERVER)[0].parent().kill()
    killed = time.monotonic()
    command.until(lambda: "going on from" in command.said())
    seconds = time.monotonic() - killed
    result = succeeded(command)
    assert f"going on from {run}/checkpoints/step-0000" in result.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] and len(summary["resumed"]) == 1 and summary["resumed"][0] in range(1, STEPS)
    assert [step["step"] for step in summary["steps"]] == list(range(1, STEPS + 1))
    assert [step["weight_version"] for step in summary["steps"]] == list(range(STEPS))
    assert store.list_steps(run) == list(range(1, STEPS + 1))
    kept = [sample for step in store.list_steps(run) for sample in store.read_step(run, step)]
    assert len({(s.step, s.prompt_index, s.member) for s in kept}) == len(kept) == 8 * STEPS
    assert all(len(s.logprobs_training) == s.length for s in kept)
    assert all(step["route_coverage"] == 1.0 and step["sync_gap"] <= 0.01 for step in summary["steps"])
    assert all(step["grad_norm"] > 0 for step in summary["steps"])
    first, again = summary["steps"][0], summary["resumed"][0]
    assert first["stale_fraction"] == 0 and all(0 < step["stale_fraction"] <= 1 for step in summary["steps"][1:])
    assert max(step["version_age_max"] for step in summary["steps"]) > 1
    measured = [step for step in summary["steps"][1:] if step["step"] != again + 1]
    assert all(step["kl_k3"] < 0.1 * step["kl_k3_stale"] for step in measured), "the engines differ less than versions"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00003", "step-00004"]
    assert not (run / "weights").exists() and (run / "result" / "manifest.json").is_file()
    line = next(line for line in result.out.splitlines() if "going on from" in line)
    lost = "steps since the last checkpoint: torchrun (`--restarts`) starts all ranks again"
    fault("a trainer rank killed", lost, line, seconds)
