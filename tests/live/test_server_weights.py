"""After a weight sync by each way a real SGLang has the trainer's weights bit for bit, all of them and no others.

What SGLang calls its parameters, and which tensors it joins in one, does not matter: a tensor that was sent is some
bytes of a parameter of its layer, and around these are zeros. That they are the right ones show the log-probabilities
of the probe after each sync.
"""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name that torch code has for it
from model.families import published
from processes import TESTS, launch
from safetensors.torch import load_file
from server_weights_worker import WAYS
from test_family_servers import FAMILIES

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
WITH_EXPERT_BIAS = ["bailing_moe_v2", "deepseek_v3", "glm4_moe", "minimax_m2"]  # float32 in a model of bfloat16
CASES = [*((name, "float32") for name in FAMILIES), *((name, "bfloat16") for name in WITH_EXPERT_BIAS)]
COMPUTED = ("cos_sin_cache", "inv_freq")  # in the names of buffers that no checkpoint has


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The worker's directory with all families in a dtype, made once; called with the dtype."""

    @functools.cache
    def directory(dtype: str) -> Path:
        root = tmp_path_factory.mktemp(dtype)
        names = [name for name, other in CASES if other == dtype]
        for name in names:
            published.make(name, root / name / "published")
        launch(TESTS / "live" / "server_weights_worker.py", root, dtype, *names)
        return root

    return directory


def layer_of(name: str) -> str:
    return (re.findall(r"\blayers\.(\d+)\.", name) or [""])[0]


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fit(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor as it is in a parameter: of a dtype no narrower, and with the columns that SGLang adds on a CPU.

    gpt-oss's experts, `[experts, in, out]`, are transposed there, and have rows more, too.
    """
    rows = 0
    if tensor.dim() == 3:
        tensor = tensor.transpose(1, 2)
        rows = parameter.shape[1] - tensor.shape[1] if parameter.dim() == 3 else 0
    columns = parameter.shape[-1] - tensor.shape[-1] if tensor.dim() > 1 else 0
    padding = (0, max(columns, 0), 0, rows) if rows > 0 else (0, max(columns, 0))
    return F.pad(tensor.to(parameter.dtype), padding)


def require_whole(sent: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> None:
    """Each tensor sent is in one parameter, none over another, and a parameter has nothing else but zeros."""
    parameters = {key: data_of(each) for key, each in held.items() if not any(name in key for name in COMPUTED)}
    rest = {key: bytearray(data) for key, data in parameters.items()}
    for name, tensor in sent.items():
        found = [
            (key, slice(start, start + len(data)))
            for key, whole in parameters.items()
            if layer_of(key) == layer_of(name) and held[key].dtype.itemsize >= tensor.dtype.itemsize
            if (start := whole.find(data := data_of(fit(tensor, held[key])))) >= 0
        ]
        assert len(found) == 1, (name, [key for key, _ in found])
        ((key, position),) = found
        assert rest[key][position] == parameters[key][position], (name, key)
        rest[key][position] = bytes(position.stop - position.start)
    assert not {key for key, others in rest.items() if any(others)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_server_has_the_trainers_weights_and_no_others(name: str, dtype: str, way: str, synced: Any) -> None:
    directory, model_dtype = synced(dtype) / name, getattr(torch, dtype)
    tensors = load_file(directory / "published" / "model.safetensors")
    sent = {
        key: tensor if key.endswith(("e_score_correction_bias", "expert_bias")) else tensor.to(model_dtype)
        for key, tensor in tensors.items()
        if not published.is_dropped(name, key)
    }
    require_whole(sent, torch.load(directory / dtype / f"{way}.pt"))
