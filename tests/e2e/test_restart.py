"""A rank of a real run is killed -9; torchrun starts it again, and it goes on with a new server."""

import json

import pytest
from command import SERVER, succeeded, torchrun
from pipeline import ONE_PROCESS, Demo

pytestmark = [pytest.mark.live, pytest.mark.distributed]
STEPS = 4


def test_a_killed_rank_is_restarted_and_goes_on(demo: Demo) -> None:
    run = demo.logs / "restarted" / "run"
    words = ["train", "experiment=demo", f"run.dir={run}", f"init.checkpoint={demo.actor}", *ONE_PROCESS]
    words += ["trainer.save_every=1", f"trainer.steps={STEPS}", "trainer.prompts_per_step=4", "trainer.micro_batch_size=16"]
    words += ["trainer.save_async=true", f"trainer.save={run}/result", "objective.kl_penalty=0.01"]
    command = torchrun(demo.logs / "restarted", 1, "--max-restarts=1", "-m", "megatron_bai", *words)
    command.until(lambda: (run / "checkpoints" / "step-00001").is_dir())
    command.processes(SERVER)[0].parent().kill()
    result = succeeded(command)
    assert f"going on from {run}/checkpoints/step-0000" in result.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] and len(summary["resumed"]) == 1 and summary["resumed"][0] in range(1, STEPS)
    assert [step["step"] for step in summary["steps"]] == list(range(1, STEPS + 1))
    assert [step["weight_version"] for step in summary["steps"]] == list(range(STEPS))
    assert all(step["route_coverage"] == 1.0 and step["sync_gap"] <= 0.1 for step in summary["steps"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00003", "step-00004"]
    assert not (run / "weights").exists() and (run / "result" / "manifest.json").is_file()
