"""Names that the documentation of earlier releases gave to users' code are still those of the same things."""

import numpy as np

from megatron_bai import config
from megatron_bai.monitor.detectors.run_monitor import Monitor
from megatron_bai.rl import objectives
from megatron_bai.rl.batches import batch
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.routing import missing


def test_functions() -> None:
    assert missing.settle is missing.apply_missing_policy and missing.of_last_version is missing.last_version_rows
    assert objectives.total is objectives.batch_loss


def test_what_an_objective_gets() -> None:
    text = batch.from_sft(np.zeros((1, 3), dtype=np.int64), np.array([[False, True, False]]))
    assert batch.Batch is TrainingBatch and isinstance(text, batch.Batch)
    assert text.mask.tolist() == text.loss_mask.tolist() == [[True, False, False]]


def test_the_state_of_a_monitor() -> None:
    def step(number: int) -> dict[str, float]:
        return {"step": number, "response_length_mean": 900.0 + number % 3}

    one, other = Monitor(config.Monitor()), Monitor(config.Monitor())
    for number in range(9):
        one.step(step(number))
    assert one.state() == one.state_dict() != other.state()
    other.restore(one.state())
    assert other.state_dict() == one.state_dict()
