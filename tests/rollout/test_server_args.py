"""Every command line that a run gives SGLang for GPUs, as the installed release resolves it, without a GPU."""

import json
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from processes import TESTS

from megatron_bai.config import Rollout
from megatron_bai.config.rollout import MOE_RUNNERS
from megatron_bai.rollout.servers import releases
from megatron_bai.rollout.servers.sglang_server import SGLangServer

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 64, "num_experts": 8,
    "moe_intermediate_size": 64, "num_experts_per_tok": 2, "vocab_size": 64, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu", "norm_topk_prob": True, "torch_dtype": "bfloat16",
}  # fmt: skip
BASE = {"port": 30000, "max_total_tokens": 4096}
# What the starter may put on the line: all combinations of the flags, and each kernel of the experts.
FLAGS: list[tuple[dict[str, Any], bool]] = [
    (
        {"dtype": dtype, "deterministic": seeds, "tensor": tensor, "base_gpu_id": base, "mem_fraction_static": memory},
        text,
    )
    for dtype, seeds, (tensor, base), memory, text in product(
        ("bfloat16", "float32"), (True, False), ((1, 0), (4, 4)), (None, 0.5), (True, False)
    )
]
RUNNERS = [({"moe_runner_backend": name, "dtype": "bfloat16"}, False) for name in MOE_RUNNERS]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("args")
    (directory / "config.json").write_text(json.dumps(MODEL))
    lines = [
        SGLangServer(directory, Rollout(**BASE, **settings), directory / "log", "cuda", text)._arguments()
        for settings, text in [*FLAGS, *RUNNERS]
    ]
    runners = [*MOE_RUNNERS, *releases._WITHOUT_ROUTES]
    (directory / "work.json").write_text(json.dumps({"lines": lines, "runners": runners}))
    script = TESTS / "rollout" / "server_args_worker.py"
    done = subprocess.run([sys.executable, script, directory / "work.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"directory": str(directory)}


@pytest.mark.distributed
def test_every_command_line_means_what_the_settings_say(found: dict[str, Any]) -> None:
    for (settings, text), args in zip(FLAGS, found["lines"]):
        assert isinstance(args, dict), f"{settings}: {args}"
        rollout = Rollout(**BASE, **settings)
        expected = {
            "base_gpu_id": rollout.base_gpu_id, "moe_runner_backend": "triton", "tp_size": rollout.tensor,
            "device": "cuda", "dtype": rollout.dtype, "host": rollout.host, "port": rollout.port,
            "enable_deterministic_inference": rollout.deterministic, "enable_return_routed_experts": True,
            "disable_radix_cache": True, "skip_tokenizer_init": not text, "model_path": found["directory"],
            "max_total_tokens": rollout.max_total_tokens, "max_running_requests": rollout.max_running_requests,
        }  # fmt: skip
        if rollout.mem_fraction_static is not None:
            expected["mem_fraction_static"] = rollout.mem_fraction_static
        assert {name: args[name] for name in expected} == expected, settings


@pytest.mark.distributed
def test_experts_are_recorded_under_each_kernel_that_may_be_chosen_and_under_no_other(found: dict[str, Any]) -> None:
    """By the release's own router; SGLang takes the name, and does not put another in its place."""
    assert [name for name in MOE_RUNNERS if not found["runners"][name]] == []
    assert [name for name in releases._WITHOUT_ROUTES if found["runners"][name]] == []
    for (settings, _), args in zip(RUNNERS, found["lines"][len(FLAGS) :], strict=True):
        name = settings["moe_runner_backend"]
        assert isinstance(args, dict), f"{name}: {args}"
        assert args["moe_runner_backend"] == name
