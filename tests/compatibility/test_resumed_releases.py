"""A run goes on with another release of Megatron-Core, there and back, to the bits of one that was not interrupted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_releases
import pytest
from engine_releases import TABLE, Engines
from make_head import ROLLOUTS, URL, answering
from processes import TESTS
from training_states import same

from megatron_bai.checkpoint.common_state import COMMON_OBJECT, find_common_state

pytestmark = [pytest.mark.distributed, pytest.mark.long]
TOKENIZER = TESTS / "data" / "head-2fa74aa" / "merged"
NEWEST = TABLE["megatron-core"][-1]
STEPS = 3
OBJECTIVES = {
    "minirl": ["objective=minirl", "objective.kl_penalty=0.01", "replay.mode=r3", "trainer.tokens_per_micro_batch=64"],
    "ppo": ["objective=ppo", "replay.mode=r2", "trainer.save_async=true", "backend.dtype=bfloat16"],
}


def train(run: str, objective: str, steps: int) -> list[str]:
    """The command of a run, which goes on if it has steps already."""
    return [
        "train", *ROLLOUTS, *OBJECTIVES[objective], "init=checkpoint", "init.checkpoint=merged", f"run.dir={run}",
        f"replay.store={run}/routes", "trainer.mini_batches=2", f"trainer.steps={steps}", "trainer.save_every=1",
        "trainer.keep=9",
    ]  # fmt: skip


def run(directory: Path, engines: Engines, commands: dict[str, list[str]]) -> None:
    """Commands with a release, one after the other, in forks of one process."""
    environment = engine_releases.environment(engines)
    path = [str(TESTS), str(TESTS / "e2e"), environment["PYTHONPATH"]]
    environment |= {"PYTHONPATH": ":".join(path), "PYTHONWARNINGS": "ignore"}
    with answering(directory) as url:
        words = {name: [word.replace(URL, url) for word in command] for name, command in commands.items()}
        command = [sys.executable, str(TESTS / "e2e" / "forks.py"), str(directory), json.dumps(words)]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-4000:]
    codes = json.loads((directory / "codes.json").read_text())
    assert not {name: (directory / f"{name}.err").read_text()[-2000:] for name, code in codes.items() if code}


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """Of each step, without times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if not k.startswith("seconds_") and k != "tokens_per_second"}
        for record in records
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose first and third step are trained with the installed release, their second with the newest."""
    path = tmp_path_factory.mktemp("resumed")
    shutil.copytree(TOKENIZER, path / "merged")

    def resumed(steps: int) -> dict[str, list[str]]:
        return {f"{name}-{steps}": train(f"{name}-resumed", name, steps) for name in OBJECTIVES}

    run(path, Engines(), {name: train(f"{name}-unbroken", name, STEPS) for name in OBJECTIVES} | resumed(1))
    run(path, Engines(megatron_core=NEWEST), resumed(2))
    for name in OBJECTIVES:
        found = summary(path / f"{name}-resumed")
        assert found["versions"]["megatron-core"] == NEWEST and found["resumed"] == [1]
    run(path, Engines(), resumed(STEPS))
    return path


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_goes_on_with_another_release_and_back(name: str, directory: Path) -> None:
    """Weights, moments, master weights, generators and metrics, of every step, bit for bit."""
    unbroken, resumed = directory / f"{name}-unbroken", directory / f"{name}-resumed"
    assert summary(resumed)["resumed"] == [1, 2] and not summary(unbroken)["resumed"]
    assert metrics(resumed) == metrics(unbroken) and len(metrics(resumed)) == STEPS
    for step in range(1, STEPS + 1):
        checkpoint = f"checkpoints/step-{step:05}"
        assert same(unbroken / checkpoint, resumed / checkpoint), step
    assert find_common_state(resumed / "checkpoints/step-00002") == COMMON_OBJECT, "the newest release wrote it"
