"""DeepSeek-V3 and its kin: what is refused by name, how positions are scaled, and what `plan` counts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from model.families import published
from model.families.full_size import MODELS

from megatron_bai.compat import releases
from megatron_bai.config import Parallel
from megatron_bai.errors import UserError
from megatron_bai.memory_plan import rank_memory
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.families.architecture import Architecture

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def changed(directory: Path, name: str = "deepseek_v3", **changes: Any) -> Architecture:
    """Read a published configuration with other values; None leaves a key as it is, ... takes it away."""
    described = published.read(name) | changes
    content = {key: value for key, value in described.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(content))
    return read_architecture(directory)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_interleave": False}, "rope_interleave is False, only True is supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', only 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\) is not num_attention_heads \(4\)"),
        ({"qk_rope_head_dim": 7, "qk_nope_head_dim": 17}, r"qk_rope_head_dim \(7\) is odd|even rotary dimension"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0, which is no size"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0, which is no size"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0, which is no size"),
        ({"first_k_dense_replace": 9}, "no layer has experts"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"topk_group": 1, "num_experts_per_tok": 4}, "topk_group is 1 of 4 groups"),
        ({"quantization_config": FP8}, r"the weights are quantised \(quantization_config, fp8\): dequantise"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, which is no size"),
        ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2', supported are"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        changed(tmp_path, **changes)


def scaled(directory: Path, **changes: Any) -> tuple[float, float]:
    """Return by what Megatron-Core scales cosine and sine, and the scores."""
    yarn = published.read("deepseek_v3")["rope_scaling"] | changes
    model = changed(directory, rope_scaling={key: value for key, value in yarn.items() if value is not ...})
    found = model.family.rope_arguments(model).config
    log_factor = 0.1 * math.log(found["rotary_scaling_factor"])
    one, other = (log_factor * found[key] + 1 for key in ("mscale", "mscale_all_dim"))
    return one / other, other**2


@pytest.mark.parametrize(
    ("changes", "rotation", "scores"),
    [
        ({}, 1.0, 1.0),
        ({"mscale": 0.7, "mscale_all_dim": 0.4}, 0.7, 0.4),
        ({"mscale": ..., "mscale_all_dim": 0.5}, None, 0.5),  # which transformers ignores in the rotation alone
        ({"mscale": 0.7, "mscale_all_dim": ...}, None, 0.0),
        ({"attention_factor": 1.25}, 1.25, 1.0),
    ],
)
def test_positions_are_scaled_as_in_transformers(
    changes: dict[str, Any], rotation: float | None, scores: float, tmp_path: Path
) -> None:
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, found_scores = scaled(tmp_path, **changes)
    config = DeepseekV3Config.from_pretrained(tmp_path)
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found_scores == pytest.approx((0.1 * scores * math.log(4) + 1) ** 2, rel=1e-12)


def test_a_server_caches_latents_whole_on_each_rank(tmp_path: Path) -> None:
    model = changed(tmp_path, **MODELS["DeepSeek-V3"].changes)
    cache = model.num_layers * model.family.cached_values_per_token(model, 8)
    assert rank_memory.server_bytes(model, 8, 1000, "bfloat16")[1] == 1000 * 2 * cache == 1000 * 2 * 61 * 576
    whole, split = (rank_memory.layer_activation_bytes(model, Parallel(tensor=n), 4096, "bfloat16") for n in (1, 8))
    assert whole[0] == pytest.approx(8 * split[0])


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path: Path) -> None:
    kimi = changed(tmp_path, "kimi_k2")
    same = changed(tmp_path, "kimi_k2", model_type="deepseek_v3")
    assert kimi.family is same.family and kimi.values["rope_parameters"] == same.values["rope_parameters"]
    assert kimi.raw["model_type"] == "kimi_k2"


@pytest.mark.parametrize(("count", "dropped"), [(2, (4, 5)), (1, (4,)), (0, ()), (None, ()), (..., ())])
def test_as_many_layers_are_dropped_as_there_are_for_prediction(
    count: Any, dropped: tuple[int, ...], tmp_path: Path
) -> None:
    """A layer more is unknown: `num_hidden_layers` may be one too few."""
    model = changed(tmp_path, num_nextn_predict_layers=count)
    found = [layer for layer in range(8) if model.family.is_dropped(f"model.layers.{layer}.mlp.gate.weight", model)]
    assert tuple(found) == dropped
    assert model.family.is_dropped("model.layers.0.self_attn.rotary_emb.inv_freq", model)


@pytest.mark.parametrize(("name", "is_refused"), [("moonlight", True), ("deepseek_v3", False)])
def test_a_release_that_norms_the_queries_input_twice_is_refused_where_it_does(
    name: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such layers would have a parameter that no checkpoint has, and compute another model."""
    monkeypatch.setattr(releases, "installed_megatron", lambda: "0.19.2")
    model = changed(tmp_path, name)
    if is_refused:
        with pytest.raises(UserError, match=r"megatron-core 0\.19\.2 norms the input of the queries once more"):
            model.family.adapt_layer(None, model, transformer_engine=True)
    else:
        model.family.adapt_layer(None, model, transformer_engine=True)
    monkeypatch.setattr(releases, "installed_megatron", lambda: "0.18.2")
    model.family.adapt_layer(None, model, transformer_engine=True)
