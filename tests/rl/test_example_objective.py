"""The objective of examples/plugin: its formula, and that the entry point brings it to the command line."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outside import EXAMPLES, install_example
from policies import drawn

from megatron_bai.rl import objectives
from megatron_bai.rl.objectives import aggregate


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its module's, without adding it to this process's."""
    added: list[objectives.Objective] = []
    monkeypatch.setattr(objectives, "register", added.append)
    path = EXAMPLES / "plugin" / "my_package" / "weighted_reinforce.py"
    spec = importlib.util.spec_from_file_location("weighted_reinforce", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "weighted_reinforce", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return added[0]


def test_samples_above_the_mean_have_the_weight(objective: Any) -> None:
    case = drawn(9, 6, 3, 0.3)
    settings, batch = replace(objective.settings(), positive=0.25), case.batch()
    logprobs = torch.from_numpy(case.new.copy()).requires_grad_()
    loss, stats = objectives.batch_loss(objective, settings, logprobs, batch, None)
    (loss / aggregate.loss_denominator([batch], objective.mean(settings))).backward()
    weights = np.where(case.advantages > 0, 0.25, 1.0) * case.advantages
    wanted = -weights[:, None] * case.mask / case.mask.sum()
    np.testing.assert_allclose(logprobs.grad.numpy(), wanted, rtol=1e-12, atol=1e-300)
    positive = (case.advantages > 0)[:, None] & case.mask
    assert stats.values()["positive_fraction"] == pytest.approx(positive.sum() / case.mask.sum())


@pytest.mark.distributed
def test_the_command_line_has_it(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(install_example(tmp_path)), os.environ.get("PYTHONPATH")]))
    words = ["-m", "megatron_bai", "train", "--cfg", "job", "objective=weighted_reinforce", "objective.positive=0.5"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0 and "positive: 0.5" in done.stdout, done.stderr
