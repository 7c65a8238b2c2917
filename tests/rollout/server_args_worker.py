"""`python server_args_worker.py WORK`: what the installed SGLang makes of command lines, and of kernels of experts.

WORK has `lines`, each a list of words, and `runners`, names of kernels. Printed is, as JSON, each line's resolved
settings or what is wrong with it, and of each name whether SGLang chooses a token's experts itself, where it records
them.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from megatron_bai.rollout.servers.server_main import prepare

NAMES = (
    "base_gpu_id", "mem_fraction_static", "moe_runner_backend", "tp_size", "device", "dtype", "host", "port",
    "enable_deterministic_inference", "enable_return_routed_experts", "disable_radix_cache", "skip_tokenizer_init",
    "max_total_tokens", "max_running_requests", "model_path",
)  # fmt: skip


def resolved(words: list[str]) -> object:
    from sglang.srt.server_args import prepare_server_args

    try:
        args = prepare_server_args(words)
        args.resolve_once()
        return {name: args.resolved_dict()[name] for name in NAMES}
    except (Exception, SystemExit) as error:
        return repr(error)


def chooses(runner: str) -> object:
    """Whether a router of the installed release asks `select_experts`, which records, or leaves it to the kernel."""
    from sglang.srt.layers.moe import topk
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    asked: list[str] = []
    router = SimpleNamespace(
        topk_config=SimpleNamespace(output_format=None, top_k=1, renormalize=True), layer_id=0, is_fp4_experts=False,
        _apply_waterfill=lambda output, _: output,
    )  # fmt: skip
    with (
        patch.object(topk, "get_moe_runner_backend", lambda: MoeRunnerBackend(runner)),
        patch.object(topk, "select_experts", lambda **_: asked.append(runner)),
        patch.object(topk, "routing", lambda *_, **__: [None] * 5, create=True),
        patch.object(topk, "use_symmetric_memory", lambda *_, **__: patch.dict({})),
        patch.object(topk, "get_parallel", lambda: SimpleNamespace(tp_group=None)),
        patch.object(topk, "is_allocation_symmetric", lambda: False),
    ):
        topk.TopK.forward_cuda(router, SimpleNamespace(shape=(1,)), None)
    return bool(asked)


def main(work: Path) -> None:
    prepare(cpu=True)  # what lets SGLang be imported without a GPU
    given = json.loads(work.read_text())
    lines, runners = [resolved(words) for words in given["lines"]], {name: chooses(name) for name in given["runners"]}
    print(json.dumps({"lines": lines, "runners": runners}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
