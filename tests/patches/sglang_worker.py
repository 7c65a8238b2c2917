"""Whether SGLang does on a CPU what each diff of `patches/`, of any release, is for. Run as a script, it prints a JSON
object: of each check, by the diff's name and its own, what went wrong; empty if nothing did.

With `upstream` nothing of ours is in SGLang but what lets it be imported at all, and that is left out one at a time for
the checks of importing. Without, no runtime fix is applied.
"""

import ast
import functools
import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers  # noqa: F401  (imported once, for the forks of `left_out`)
from outcomes import outcome

IMPORTS = {"sgl-kernel-imports": "sglang_cpu_kernels", "torchvision": "sglang_torchvision"}


def left_out(diff: str) -> str:
    """What importing a server's modules fails with in a fork that has every other fix of importing."""
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        try:
            _fix(*(fix for name, fix in IMPORTS.items() if name != diff))
            _import()
            theirs.send("")
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(child, 0)
    return ours.recv()


def _fix(*names: str) -> None:
    from megatron_bai import compat

    for each in compat.PATCHES:
        if each.name in names:
            each.install()


def _import() -> None:
    import sglang.srt.managers.scheduler
    import sglang.srt.models.qwen3_moe  # noqa: F401


def murmur_hash() -> None:
    """As the stand-in of the runtime fix, which a test of its own compares with the published algorithm."""
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32

    from megatron_bai.compat.sglang_cpu_kernels import murmur_hash32 as known

    draw = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,), generator=draw).view(torch.uint64)
    positions, columns = torch.arange(64), torch.arange(300, dtype=torch.int32)
    assert torch.equal(murmur_hash32(seeds, positions, columns), known(seeds, positions, columns))


def host_memory() -> None:
    from sglang.srt.state_capturer.base import BaseHostCache

    cache = BaseHostCache(num_tokens=64, num_layers=3, topk_size=2, name="routes", device="cpu")
    assert cache.buffer.shape == (64, 3, 2) and not cache.buffer.any()
    cache.buffer[5] = 7
    cache.destroy()


def routed_scaling() -> None:
    """The experts' output, which stands for a model's, times the factor."""
    from sglang.srt.models.bailing_moe import BailingMoESparseMoeBlock

    block = SimpleNamespace(
        _forward_gate=lambda hidden, batch: (hidden + 1, None),
        topk=lambda hidden, logits, dynamic_expert_bias: logits - hidden,
        experts=lambda hidden, chosen: hidden * chosen,
        routed_scaling_factor=2.5,
    )
    hidden = torch.arange(6.0).view(2, 3)
    found = BailingMoESparseMoeBlock._forward_router_experts(block, hidden, None)
    assert torch.equal(found, 2.5 * hidden), f"experts are not scaled: {found}"


_inherited = False


class _Settings(SimpleNamespace):
    """Settings of which those that are not named are off: releases have different ones."""

    def __getattr__(self, name: str) -> bool:
        return False


def start_method() -> None:
    """A worker has what its parent had in memory, so nothing is imported again."""
    global _inherited
    from sglang.srt.entrypoints import engine

    settings = _Settings(nnodes=1, dcp_size=1, gc_threshold=None, custom_sigquit_handler=None)
    with patch.object(engine, "resolving_view", lambda settings: settings):
        engine._set_envs_and_config(settings)
    assert multiprocessing.get_start_method() == "fork", f"workers start by {multiprocessing.get_start_method()}"
    _inherited = True
    worker = multiprocessing.Process(target=lambda: sys.exit(0 if _inherited else 3))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def seeded_backend() -> None:
    from sglang.srt.arg_groups.overrides import _deterministic_attention_backend

    asked = SimpleNamespace(enable_deterministic_inference=True, attention_backend="torch_native")
    assert _deterministic_attention_backend(asked) == {}


def seeded_operators() -> None:
    """torch's own operators stay where they are: Triton's do not run on a CPU."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.model_executor import model_runner

    context = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=True))
    with patch.object(model_runner, "get_exec", lambda: context):
        model_runner.ModelRunner.maybe_enable_batch_invariant_mode(SimpleNamespace(device="cpu"))
    replaced = batch_invariant_ops.is_batch_invariant_mode_enabled()
    batch_invariant_ops.disable_batch_invariant_mode()
    assert not replaced, "Triton's operators are in the place of torch's"


def seeded_sampler() -> None:
    """Not compiled, and a seed draws the same token in any company."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    assert not hasattr(multinomial_with_seed, "_torchdynamo_orig_callable"), "the sampler is compiled"
    logprobs = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds, positions = torch.arange(8), torch.arange(8) * 3
    together = multinomial_with_seed(logprobs, seeds, positions)
    alone = [multinomial_with_seed(logprobs[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def _counted(calls: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counting(*args: Any, **named: Any) -> Any:
        calls.append(function)
        return function(*args, **named)

    return counting


def attention(new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Fewer calls of SDPA than sequences, and what the loop over sequences finds. The loop still runs where there is a
    window; one longer than any sequence hides nothing.

    Args:
        new: the last tokens of each sequence that have queries, by its length. None: decoding.
    """
    from sglang.srt.layers.attention import torch_native_backend

    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 4, 7, 31, 64, 65, 100, 300])[torch.randperm(10, generator=draw)]
    caches = [torch.full((2048, 2, 16), torch.nan) for _ in range(2)]
    free, table = torch.randperm(2048, generator=draw), torch.zeros(16, 512, dtype=torch.int32)
    rows = torch.randperm(16, generator=draw)[:10]
    for row, length, end in zip(rows, lengths, lengths.cumsum(0), strict=True):
        table[row, :length] = free[end - length : end].to(torch.int32)
        for cache in caches:
            cache[free[end - length : end]] = torch.randn(length, 2, 16, generator=draw)
    asked = torch.ones_like(lengths) if new is None else new(lengths)
    query = torch.randn(int(asked.sum()), 4, 16, generator=draw)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    found = []
    for window in (None, 10**6):
        backend, calls = torch_native_backend.TorchNativeAttnBackend(runner), []
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        run, more = backend._run_sdpa_forward_decode, ()
        if new is not None:
            run, more = backend._run_sdpa_forward_extend, (lengths - asked, asked)
        sdpa = _counted(calls, torch_native_backend.scaled_dot_product_attention)
        with patch.object(torch_native_backend, "scaled_dot_product_attention", sdpa):
            run(
                query, output := torch.empty_like(query), *caches, table, rows, lengths, *more, None, scaling=0.25,
                enable_gqa=True, causal=new is not None, is_cross_attn=False, sliding_window_size=window,
            )  # fmt: skip
        found.append((output, len(calls)))
    (batched, calls), (looped, loops) = found
    assert loops == 10 and batched.isfinite().all()
    assert (batched - looped).abs().max() < 1e-6
    assert calls < 10, f"{calls} calls of SDPA for 10 sequences"


def sinks(new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """A number for each head beside its scores, with and without a window, which has a pool of its own or has not."""
    from sglang.srt.layers.attention import torch_native_backend

    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 9, 40])
    asked = torch.ones_like(lengths) if new is None else new(lengths)
    slots = torch.randperm(256, generator=draw)[: 4 * 40].view(4, 40)
    moved = torch.randperm(256, generator=draw)  # from slots of full layers to those of windows
    keys, values = (torch.randn(4, 40, 2, 16, generator=draw) for _ in range(2))
    caches = [torch.full((256, 2, 16), torch.nan) for _ in range(4)]
    for full, of_windows, content in zip(caches[:2], caches[2:], (keys, values), strict=True):
        full[slots] = of_windows[moved[slots]] = content
    query, numbers = torch.randn(int(asked.sum()), 4 * 16, generator=draw), torch.randn(4, generator=draw)
    for window, apart in ((None, False), (6, False), (0, False), (6, True)):
        pool = SimpleNamespace(
            get_key_buffer=lambda layer, apart=apart: caches[2 * apart],
            get_value_buffer=lambda layer, apart=apart: caches[2 * apart + 1],
            translate_loc_from_full_to_swa=lambda slots: moved[slots],
        )
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=slots.to(torch.int32)), token_to_kv_pool=pool
        )
        layer = SimpleNamespace(
            qk_head_dim=16, v_head_dim=16, tp_q_head_num=4, tp_k_head_num=2, scaling=0.25, layer_id=0,
            is_cross_attention=False, attn_type=None, sliding_window_size=-1 if window is None else window,
        )  # fmt: skip
        batch = SimpleNamespace(
            req_pool_indices=torch.arange(4), seq_lens=lengths, encoder_lens=None, out_cache_loc=None,
            extend_seq_lens=asked, extend_prefix_lens=lengths - asked,
        )  # fmt: skip
        backend = torch_native_backend.TorchNativeAttnBackend(runner)
        backend.init_forward_metadata(batch)
        backend.use_sliding_window_kv_pool = apart
        forward = backend.forward_decode if new is None else backend.forward_extend
        found = forward(query, None, None, layer, batch, save_kv_cache=False, sinks=numbers)
        wanted = []
        for row, (length, count, part) in enumerate(zip(lengths, asked, query.split(asked.tolist()), strict=True)):
            k, v = (each[row, :length].double().repeat_interleave(2, 1) for each in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", part.double().view(-1, 4, 16), k) * 0.25
            behind = torch.arange(length - count, length)[:, None] - torch.arange(length)
            seen = (behind >= 0) & (behind <= (length if window is None else window))
            scores = scores.masked_fill(~seen, -torch.inf)
            beside = torch.cat([scores, numbers.double()[:, None, None].expand(-1, count, 1)], -1).softmax(-1)
            wanted.append(torch.einsum("hqk,khd->qhd", beside[..., :-1], v).flatten(1))
        assert (found - torch.cat(wanted)).abs().max() < 1e-6, f"window {window}, apart: {apart}"


def experts(dtype: torch.dtype, tokens: int) -> None:
    """No matrix product of one expert, and what such products give."""
    from sglang.srt.layers.moe import fused_moe_native

    draw = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((8, 32, 24), (8, 24, 16)))
    layer = SimpleNamespace(w13_weight=w13, w2_weight=w2, num_experts=8)
    runner = SimpleNamespace(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
    x = torch.randn(tokens, 24, generator=draw).to(dtype)
    ids = torch.stack([torch.randperm(7, generator=draw)[:2] for _ in range(tokens)])  # nobody chooses the last
    weights, calls = torch.rand(tokens, 2, generator=draw), []
    with patch.object(torch.nn.functional, "linear", _counted(calls, torch.nn.functional.linear)):
        found = fused_moe_native.moe_forward_native(layer, x, (weights, ids.to(torch.int32), None), runner)
    gate, up = (w13.double()[ids] @ x.double()[:, None, :, None]).squeeze(-1).chunk(2, -1)
    each = (w2.double()[ids] @ (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    wanted = (each * weights.double().unsqueeze(-1)).sum(1)
    assert ((found - wanted).abs().max() / wanted.abs().max()) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert not calls, f"{len(calls)} products of one expert"


def topk_layers() -> None:
    """Every model's `TopK` is told its layer, by a name that its function has."""
    from pathlib import Path

    import sglang

    nameless, calls = [], 0
    for path in sorted((Path(sglang.__path__[0]) / "srt/models").rglob("*.py")):
        source = path.read_text()
        for function in ast.walk(ast.parse(source)) if "TopK(" in source else ():
            if not isinstance(function, ast.FunctionDef):
                continue
            known = {arg.arg for arg in function.args.args + function.args.kwonlyargs}
            known |= {
                name.id for name in ast.walk(function) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
            known |= {
                f"self.{name.attr}"
                for name in ast.walk(function)
                if isinstance(name, ast.Attribute) and isinstance(name.ctx, ast.Store)
            }
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "TopK":
                    calls += 1
                    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    spread = "layer_id=self.layer_id" in ast.unparse(function)  # in a dict that is passed on
                    if given.get("layer_id") not in known and not (given.keys() == {None} and spread):
                        nameless.append(f"{path.stem}: {given.get('layer_id')}")
    assert calls > 40
    assert not nameless, f"{len(nameless)} without a layer: {', '.join(nameless)}"


def shared_gate() -> None:
    """What Triton computes on a GPU: the shared expert's output, scaled, added to that of the others or by itself."""
    from sglang.kernels.ops.elementwise import elementwise

    draw = torch.Generator().manual_seed(0)
    hidden, shared, others = (torch.randn(5, 24, generator=draw) for _ in range(3))
    gate = torch.randn(24, generator=draw)
    wanted = torch.sigmoid(hidden @ gate)[:, None] * shared
    found = elementwise.fused_gate_sigmoid_mul(hidden, gate, shared)
    assert (found - wanted).abs().max() < 1e-6
    wanted = wanted + others
    elementwise.fused_gate_sigmoid_mul_add(hidden, gate, shared, others)
    assert (others - wanted).abs().max() < 1e-6


def full_width_norms() -> None:
    """Of queries and keys whose heads two ranks share."""
    from sglang.srt.models import minimax_m2

    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(5, width, generator=draw) for width in (32, 16)]
    weights = [torch.randn(each.shape[1], generator=draw) for each in wholes]
    parts = [[whole.chunk(2, -1)[rank].contiguous() for whole in wholes] for rank in range(2)]
    squares = sum(minimax_m2.rms_sumsq_serial(*part) for part in parts)
    for rank, part in enumerate(parts):
        own = [weight.chunk(2)[rank] for weight in weights]
        for found, whole, weight in zip(minimax_m2.rms_apply_serial(*part, *own, squares, 2, 1e-6), wholes, weights):
            wanted = torch.nn.functional.rms_norm(whole, whole.shape[1:], weight, 1e-6).chunk(2, -1)[rank]
            assert (found - wanted).abs().max() < 1e-6


def dense_layers(name: str) -> None:
    """Layers 0 and 3 of five are dense: what they are built of, what boundaries are told, how an MLP is called."""
    import inspect
    from importlib import import_module

    module, size = import_module(f"sglang.srt.models.{name.lower()}_moe"), 8
    declared: list[dict[str, bool]] = []
    config = SimpleNamespace(
        hidden_size=size, intermediate_size=size, num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6,
        attention_bias=False, hidden_act="silu", num_hidden_layers=5, mlp_only_layers=[0, 3], decoder_sparse_step=1,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, rope_theta=1e4, rope_scaling=None,
    )  # fmt: skip
    fakes = {
        part: type(part, (torch.nn.Module,), {"__init__": lambda self, *a, **k: torch.nn.Module.__init__(self)})
        for part in (f"{name}MoeAttention", f"{name}MoeSparseMoeBlock", f"{name}MoeMLP", "RMSNorm")
    }
    functions = {
        "get_parallel": lambda: SimpleNamespace(attn_tp_size=1, attn_tp_rank=0),
        "declare_attn": lambda: None,
        "declare_ffn": lambda **said: declared.append(said) or SimpleNamespace(**said),
        "make_stages": lambda *stages, **said: (None, None),
        "append_stages": lambda *stages: (None, None),
        "enable_moe_dense_fully_dp": lambda: False,
        "is_dense_ffn_fully_dp": lambda: False,
    }
    with patch.multiple(module, create=True, **fakes, **functions):
        layers = [getattr(module, f"{name}MoeDecoderLayer")(config, layer) for layer in range(5)]
    dense = [layer for layer in range(5) if isinstance(layers[layer].mlp, fakes[f"{name}MoeMLP"])]
    assert dense == [0, 3], f"dense layers are {dense}"
    assert [layer.is_layer_sparse for layer in layers] == [False, True, True, False, True]
    sparse = [False, True, True, False, True, True]  # and what follows the last
    after = "next_sparse" if "next_sparse" in declared[0] else "next_layer_sparse"
    told = [{"sparse": sparse[n], after: sparse[n + 1]} for n in range(5)]
    assert all(each in declared for each in told)
    assert "forward_batch" in inspect.signature(getattr(module, f"{name}MoeMLP").forward).parameters


def tied(is_tied: bool) -> None:
    """A model that has an output layer of its own, whatever its configuration says."""
    from sglang.srt.layers import vocab_parallel_embedding as parts
    from sglang.srt.model_loader import loader

    class Model(torch.nn.Module):
        def __init__(self, **given: Any):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.embed_tokens = parts.VocabParallelEmbedding(64, 8, enable_tp=False)
            self.lm_head = parts.ParallelLMHead(64, 8, enable_tp=False)

    config = SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=is_tied), model_path="")
    load = SimpleNamespace(draft_model_idx=None)
    functions = {
        "get_model_architecture": lambda config: (Model, ""),
        "install_shared_experts_fusion_decision": lambda *given: None,
        "resolve_shared_experts_config": lambda *given, **named: None,
        "get_model": lambda: SimpleNamespace(override=lambda **named: nullcontext()),
    }
    with patch.multiple(loader, create=True, **functions):
        model = loader._initialize_model(config, load)
    same = model.lm_head.weight is model.model.embed_tokens.weight
    assert same == is_tied, "the output layer is not the embedding"


CHECKS: dict[str, dict[str, Callable[[], None]]] = {
    "worker-start-method": {"start": start_method},
    "sgl-kernel-imports": {"import": _import, "murmur": murmur_hash},
    "torchvision": {"import": _import},
    "host-memory": {"cache": host_memory},
    "routed-scaling": {"block": routed_scaling},
    "seeded-sampling": {"backend": seeded_backend, "operators": seeded_operators, "sampler": seeded_sampler},
    "batched-attention": {
        "decode": lambda: attention(None),
        "prompts": lambda: attention(lambda lengths: lengths),
        "parts": lambda: attention(lambda lengths: (lengths + 1) // 2),
    },
    "attention-sinks": {
        "decode": lambda: sinks(None),
        "prompts": lambda: sinks(lambda lengths: lengths),
        "parts": lambda: sinks(lambda lengths: (lengths + 1) // 2),
    },
    "grouped-experts": {
        "float32": lambda: experts(torch.float32, 37),
        "bfloat16": lambda: experts(torch.bfloat16, 64),
        "one": lambda: experts(torch.float32, 1),
    },
    "topk-layer-id": {"models": topk_layers},
    "dense-layers": {"Qwen2": lambda: dense_layers("Qwen2"), "Qwen3": lambda: dense_layers("Qwen3")},
    "tied-embeddings": {"tied": lambda: tied(True)},
    "model-kernels": {"gate": shared_gate, "norms": full_width_norms},
}


def main(upstream: bool) -> None:
    gc.disable()  # a third of the time of importing SGLang
    found: dict[str, str] = {}
    if upstream:
        found |= {f"{diff} import": left_out(diff) for diff in IMPORTS}
        _fix(*IMPORTS.values())
    for diff, checks in CHECKS.items():
        for name, check in checks.items():
            if upstream and diff in IMPORTS:
                continue
            found[f"{diff} {name}"] = outcome(check)
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.inference_mode():
        main("upstream" in sys.argv[1:])
