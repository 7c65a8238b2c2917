"""Which GPU a rank takes, whoever started it; shown by environments, since no machine here has one."""

import pytest
import torch

from megatron_bai.config import Backend
from megatron_bai.distributed import backend
from megatron_bai.distributed.devices import device_index
from megatron_bai.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("visible", "environment", "index"),
    [
        (8, {}, 0),
        (8, TORCHRUN | {"LOCAL_RANK": "7"}, 7),
        (1, TORCHRUN | {"LOCAL_RANK": "0"}, 0),
        (1, {"LOCAL_RANK": "5"}, 0),  # a task of Slurm that sees its own GPU alone
        (8, {"LOCAL_RANK": "5"}, 5),  # one that sees all
    ],
)
def test_the_gpu_of_a_rank(visible: int, environment: dict[str, str], index: int) -> None:
    assert device_index(visible, environment) == index


@pytest.mark.parametrize(
    ("visible", "environment", "says"),
    [
        (1, TORCHRUN | {"LOCAL_RANK": "1"}, r"rank 1 of its machine .* sees 1 GPU \(CUDA_VISIBLE_DEVICES=\)"),
        (4, TORCHRUN | {"LOCAL_RANK": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, r"sees 4 GPUs .*=0,1,2,3\)"),
        (2, {"LOCAL_RANK": "2"}, "start no more processes"),
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused(visible: int, environment: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        device_index(visible, environment)


def test_the_backend_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for visible, index in ((8, 3), (1, 0)):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=visible: count)
        assert backend.select_device(Backend(kind="cuda")).device == torch.device("cuda", index)
