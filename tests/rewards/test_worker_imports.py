"""A worker process imports its reward and little else: there is one for each core, beside a trainer that has it all."""

import re
from pathlib import Path
from typing import Any

import pytest
from outside import install

from megatron_bai import config
from megatron_bai.rewards.worker_pool import RewardPool

HEAVY = {"torch", "numpy", "transformers", "megatron", "sglang", "aiohttp", "psutil", "hydra"}
SAMPLE = ["1+2", r"\boxed{3}", "3", {"tests": ["pass"]}]
CODE = {"cases": "tests", "pay": "all", "timeout_s": 60.0, "case_timeout_s": 30.0, "memory_mib": 512}
# name → function, settings, and what the reward itself needs of the above
KINDS: dict[str, tuple[str, dict[str, Any] | None, set[str]]] = {
    "code": ("megatron_bai.rewards.code_reward:score", CODE, set()),
    "function": ("functions:length", None, set()),
    "math_verify": ("megatron_bai.rewards.math_verify_reward:score", {}, set()),
    "from outside": ("outside:score", {"bonus": 0.5}, {"hydra"}),  # where it registers its settings
}


def imported(function: str, settings: dict[str, Any] | None, log: Path) -> set[str]:
    """Packages that a worker imported until it had scored a sample, as Python itself lists them on stderr."""
    with RewardPool(function, settings, 1, 60.0, log) as pool:
        (score,) = pool.scores([SAMPLE])
        assert score.value is not None, score.failure
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\w+)", log.read_text(), re.M))


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_imports_nothing_heavy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "math_verify":
        pytest.importorskip("math_verify")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "site", "data.md")), prepend=":")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    function, settings, own = KINDS[kind]
    found = imported(function, settings, tmp_path / "reward.log")
    assert "megatron_bai" in found  # so the list is one
    assert found & HEAVY <= own, found & HEAVY


def test_every_reward_that_runs_in_workers_is_looked_at() -> None:
    """Of those built in."""
    names = {kind.name for kind in config.PerSample.__subclasses__() if kind.__module__.startswith("megatron_bai.")}
    assert names == KINDS.keys() - {"from outside"}
