"""HARC on a whole model: the first router is solved from transformers' activations, in every layout alike."""

from pathlib import Path

import pytest
import torch
from calibrate_worker import TEXTS
from model.families import published
from processes import TESTS, launch
from safetensors.torch import load_file, save_file

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.merge.harc import calibrate_router
from megatron_bai.rl.calibrate import validate_calibrate

CASES = {"one": 1, "tp2_ep2": 2}
GATE = "model.layers.{}.mlp.gate.weight"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two parents with other routers."""
    directory = tmp_path_factory.mktemp("calibrate")
    generator = torch.Generator().manual_seed(1)
    for name in ("model", "parent", "other"):
        published.make("qwen3_moe", directory / name)
        tensors = load_file(directory / name / "model.safetensors")
        for key, tensor in tensors.items():
            if ".gate.weight" in key:
                tensor += tensor.std() * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, directory / name / "model.safetensors", {"format": "pt"})
    launch(TESTS / "rl" / "calibrate_worker.py", directory, *CASES.values())
    return directory


def router_inputs(directory: Path, layer: int, routers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Transformers' activations on each parent's texts, where earlier layers have the calibrated routers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for i, router in enumerate(routers[:layer]):
            model.model.layers[i].mlp.gate.weight.copy_(router)
        for texts in TEXTS:
            seen: list[torch.Tensor] = []
            norm = model.model.layers[layer].post_attention_layernorm
            hook = norm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0]))
            for text in texts:
                model(torch.tensor([text]))
            hook.remove()
            found.append(torch.cat(seen))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_every_router_is_that_of_the_activations_of_the_layers_before_it(calibrated: Path, case: str) -> None:
    found = torch.load(calibrated / f"{CASES[case]}-calibrated.pt", weights_only=False)
    weights = {name: load_file(calibrated / name / "model.safetensors") for name in ("model", "parent", "other")}
    for layer, facts in enumerate(found["layers"]):
        inputs = router_inputs(calibrated / "model", layer, found["routers"])
        start, *targets = (each[GATE.format(layer)] for each in weights.values())
        wanted = calibrate_router(start, targets, inputs, tolerance=1e-10)
        torch.testing.assert_close(facts["weight"], wanted.weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["routers"][layer], facts["weight"].float())
        assert facts["layer"] == layer and facts["moved"] > 0.01
        assert facts["calibration"]["before"] == pytest.approx(wanted.before, rel=1e-3)
        assert facts["calibration"]["after"] < 0.9 * facts["calibration"]["before"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parents": []}, "calibrate.parents is empty"),
        ({"prompts": ["a"]}, "calibrate.prompts has 1 entries for 2 parents"),
        ({"output": "/tmp"}, "/tmp exists"),
        ({}, "calibrate takes no pipeline stages"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changes: dict[str, object], said: str) -> None:
    settings = {"path": "a", "output": "/nowhere", "parents": ["b", "c"], "prompts": ["b", "c"], **changes}
    with pytest.raises(UserError, match=said):
        validate_calibrate(config.Calibrate(**settings), config.Parallel(pipeline=2))  # type: ignore[arg-type]
