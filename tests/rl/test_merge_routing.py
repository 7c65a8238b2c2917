"""What a model keeps of another's routes, by transformers' router logits, and a router's weights times its input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from processes import TESTS, launch
from route_texts import SEQUENCES
from safetensors.torch import load_file, save_file

from megatron_bai.rl.merge_routing import ParentRouting, describe_kept
from megatron_bai.rl.route_probe import LayerRouting

CASES = {"one": 1, "tp2_ep2": 2, "pp2": 3}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a parent with other routers and experts; routings in every layout that the tier has."""
    directory = tmp_path_factory.mktemp("routing")
    published.make("qwen3_moe", directory / "model")
    published.make("qwen3_moe", directory / "parent")
    tensors = load_file(directory / "parent" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, directory / "parent" / "model.safetensors", {"format": "pt"})
    launch(TESTS / "rl" / "route_probe_worker.py", directory, *CASES.values())
    return directory


def router_logits(directory: Path) -> list[torch.Tensor]:
    """Transformers' of every token, by layer `[tokens, experts]`, of which the first is computed by hand as well."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *call: seen.append(call[2][0]))
    found = []
    with torch.no_grad():
        for sequence in SEQUENCES:
            found.append(model(torch.tensor([sequence]), output_router_logits=True).router_logits)
    weight = load_file(directory / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    logits = [torch.cat(parts) for parts in zip(*found, strict=True)]
    torch.testing.assert_close(torch.cat(seen) @ weight.T, logits[0])
    return logits


def sets(logits: torch.Tensor, topk: int) -> list[set[int]]:
    return [set(row) for row in logits.topk(topk).indices.tolist()]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_shares_loads_and_margins_are_those_of_transformers_router_logits(compared: Path, case: str) -> None:
    routings: list[list[dict[str, Any]]] = torch.load(compared / f"{CASES[case]}.pt", weights_only=True)
    topk = json.loads((compared / "model" / "config.json").read_text())["num_experts_per_tok"]
    merged, parent = router_logits(compared / "model"), router_logits(compared / "parent")
    for logits, found, kept in ((merged, routings[0], None), *((parent, each, merged) for each in routings[1:3])):
        assert [layer["layer"] for layer in found] == list(range(len(logits)))
        for i, layer in enumerate(found):
            chosen = sets(logits[i], topk)
            counts = torch.bincount(torch.tensor([expert for each in chosen for expert in each])).double()
            shares = counts[counts > 0] / counts.sum()
            assert layer["entropy"] == pytest.approx(float(-(shares * shares.log()).sum()))
            best = logits[i].topk(topk + 1).values
            assert layer["margin"] == pytest.approx(float((best[:, -2] - best[:, -1]).mean()), rel=1e-4)
            if kept is not None:
                pairs = list(zip(chosen, sets(kept[i], topk), strict=True))
                assert layer["kept"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
                assert layer["overlap"] == pytest.approx(sum(len(a & b) for a, b in pairs) / len(pairs) / topk)
    assert 0 < routings[1][-1]["kept"] < 0.9 < 1 == routings[3][-1]["kept"] == routings[3][-1]["overlap"]


def test_the_line_names_each_parent_and_the_layer_that_keeps_least() -> None:
    layers = [LayerRouting(3, 0.5, 0.75, 2.0, 0.1), LayerRouting(4, 0.25, 0.5, 2.0, 0.1)]
    line = describe_kept([ParentRouting("/runs/math", layers)], 64)
    assert line.endswith("on 64 prompts: math 37.5% (overlap 0.62; layer 4 the least, 25.0%)")
