"""What `config.json` says and leaves out means what transformers makes of it, or is refused by name."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import MODEL

from megatron_bai.checkpoint import hf_config
from megatron_bai.checkpoint.hf_config import read_hf_config
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint

PUBLISHED = {
    **hf_checkpoint.hf_config(MODEL, torch.float32),
    "rope_scaling": None,
    "sliding_window": None,
    "max_window_layers": 2,
    "attention_dropout": 0.0,
    "use_cache": True,
    "router_aux_loss_coef": 0.001,
}


def write(directory: Path, *dropped: str, **changes: Any) -> Path:
    """Write a published configuration with changes, without the keys `dropped`."""
    content = {name: value for name, value in (PUBLISHED | changes).items() if name not in dropped}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


SPELLINGS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("norm_topk_prob",), {}),
    (("tie_word_embeddings", "attention_bias", "hidden_act"), {}),
    (("rope_parameters", "rope_theta"), {}),
    (("rope_parameters",), {"rope_theta": 5e5}),
    (("rope_theta",), {"rope_parameters": {"rope_theta": 5e5}}),
    (("rope_parameters",), {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    (("rope_parameters",), {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ((), {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    (("num_experts",), {"num_local_experts": 4}),
    ((), {"num_local_experts": 4}),
    ((), {"mlp_only_layers": None, "sliding_window": None}),
    ((), {"use_sliding_window": True, "sliding_window": 64}),
    (("torch_dtype",), {"dtype": "bfloat16"}),
    (("num_experts_per_tok", "max_position_embeddings", "initializer_range"), {}),
]


@pytest.mark.parametrize(("dropped", "changes"), SPELLINGS)
def test_values_are_those_transformers_reads(dropped: tuple[str, ...], changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    values, loaded = read_hf_config(write(tmp_path, *dropped, **changes)), AutoConfig.from_pretrained(tmp_path)
    names = [*vars(loaded), "num_experts", "num_local_experts"]
    for name in (name for name in names if not name.startswith("_") and name not in ("dtype", "transformers_version")):
        assert values[name] == getattr(loaded, name), name
    assert values["dtype"] == str(loaded.dtype).removeprefix("torch.")
    assert values["rope_theta"] == loaded.rope_parameters["rope_theta"]


@pytest.mark.parametrize(("dropped", "changes"), [(("head_dim",), {}), ((), {"head_dim": None})])
def test_a_head_without_a_size_has_its_part_of_the_hidden_size(
    dropped: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    assert read_hf_config(write(tmp_path, *dropped, **changes))["head_dim"] == (
        MODEL.hidden_size // MODEL.num_attention_heads
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": None}, "model_type is None: it must name the kind of model"),
        ({"model_type": "kimi"}, "model_type is 'kimi', which transformers does not have$"),
        ({"model_type": "kimi", "auto_map": {"AutoConfig": "a.B"}}, "defines in code of the checkpoint's: .* not run"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(quantization_config, fp8\): dequantise"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, r"quantised .*gptq"),
        ({"tie_word_embeddings": None}, "transformers cannot read it: .*'tie_word_embeddings' expected bool"),
        ({"hidden_size": "64"}, "transformers cannot read it: .*'hidden_size' expected int"),
        ({"torch_dtype": "nothing"}, "transformers cannot read it: .*nothing"),
        ({"text_config": "own"}, "text_config is no object"),
        ({"rope_theta": math.nan}, "rope_theta is NaN"),
        ({"time_step_limit": [0.0, math.nan]}, "time_step_limit is NaN"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files names other files"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers is 10,000,000,000, more than 65,536"),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000, more than"),
        ({"vision_config": {"depth": 10**9}}, "depth is 1,000,000,000, more than"),
        ({"deep": json.loads("[" * 40 + "]" * 40)}, "it is nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named) as caught:
        read_hf_config(write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[]", "it is no object"),
        (b"\xef\xbb\xbf{}", "it begins with a byte-order mark, which transformers refuses"),
        ('{"model_type": "qwen3_moe"}'.encode("utf-16"), "'utf-8' codec"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": "' + b"x" * hf_config._MAX_BYTES + b'"}', "it has more than"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a git-LFS pointer: download"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read .*config.json: {named}"):
        read_hf_config(tmp_path)


def test_infinity_is_a_value_as_transformers_writes_it(tmp_path: Path) -> None:
    assert read_hf_config(write(tmp_path, time_step_limit=[0.0, math.inf]))["time_step_limit"] == [0.0, math.inf]


def test_a_known_model_type_needs_no_code_of_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, auto_map={"AutoConfig": "configuration.Evil"})
    (tmp_path / "configuration.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert read_hf_config(tmp_path)["model_type"] == "qwen3_moe"


def test_an_unknown_model_type_may_have_its_own_values(tmp_path: Path) -> None:
    values = read_hf_config(write(tmp_path, model_type="kimi", text_config={"hidden_size": 9}), allow_unknown=True)
    assert values["hidden_size"] == 9 and values["num_experts"] == MODEL.num_experts


def test_nothing_is_printed_and_nothing_stays_silenced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, pad_token_id=10**6, rope_parameters={"rope_type": "default", "strange": 1})
    level = logging.getLogger("transformers").level
    read_hf_config(tmp_path)
    assert capfd.readouterr() == ("", "") and logging.getLogger("transformers").level == level
