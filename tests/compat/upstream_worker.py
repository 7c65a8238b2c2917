"""What patches of SGLang's CPU path compute beside what they replace, in a process of its own: SGLang is told at import
that it runs on a CPU. Prints a list of JSON objects, one a case.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from megatron_bai import compat
from megatron_bai.compat import sglang_grouped_experts, sglang_model_kernels, sglang_topk_layers

SLOTS = 4096


def attention(draw: torch.Generator, heads: int, shared: int, dim: int, dtype: torch.dtype, new: Any) -> dict[str, Any]:
    """The largest difference from upstream's loop, for sequences of mixed lengths in shuffled slots of a cache that has
    NaN wherever no sequence of the batch is.

    Args:
        heads, shared: of queries; how many of them share keys and values.
        new: the last tokens of a sequence of a given length that have queries.
    """
    from sglang.srt.layers.attention import torch_native_backend
    from sglang.srt.layers.radix_attention import AttentionType

    lengths = torch.tensor([1, 2, 3, 4, 7, 31, 64, 65, 100, 300])[torch.randperm(10, generator=draw)]
    keys, values = (torch.full((SLOTS, heads // shared, dim), torch.nan, dtype=dtype) for _ in range(2))
    free = torch.randperm(SLOTS, generator=draw)
    table = torch.randint(SLOTS, (16, 512), generator=draw, dtype=torch.int32)
    rows, asks = torch.randperm(16, generator=draw)[: len(lengths)], torch.tensor([new(int(each)) for each in lengths])
    for row, length, end in zip(rows, lengths, lengths.cumsum(0)):
        own = free[end - length : end]
        table[row, :length] = own.to(torch.int32)
        keys[own], values[own] = (torch.randn(length, *keys.shape[1:], generator=draw).to(dtype) for _ in range(2))
    total, width = int(asks.sum()), heads * dim
    query = torch.randn(total, width, generator=draw).to(dtype)
    pool = SimpleNamespace(get_key_buffer=lambda layer: keys, get_value_buffer=lambda layer: values)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    layer = SimpleNamespace(
        qk_head_dim=dim, v_head_dim=dim, tp_q_head_num=heads, tp_k_head_num=heads // shared, scaling=dim**-0.5,
        layer_id=0, is_cross_attention=False, attn_type=AttentionType.DECODER, sliding_window_size=None,
    )  # fmt: skip
    decoding = new is one
    batch = SimpleNamespace(
        req_pool_indices=rows, seq_lens=lengths, encoder_lens=None, out_cache_loc=None,
        extend_seq_lens=None if decoding else asks, extend_prefix_lens=None if decoding else lengths - asks,
    )  # fmt: skip
    found = []
    ours = torch_native_backend.TorchNativeAttnBackend
    (theirs,) = (each for each in ours.__mro__ if each.__name__ == "TorchNativeAttnBackend")  # below those of two fixes
    for backend in (ours, theirs):
        running = backend(runner)
        running.init_forward_metadata(batch)
        forward = running.forward_decode if decoding else running.forward_extend
        found.append(forward(query, None, None, layer, batch, save_kv_cache=False))
    assert found[0].isfinite().all()
    return {"error": (found[0] - found[1]).abs().max().item()}


def one(length: int) -> int:
    return 1


def experts(
    draw: torch.Generator, tokens: int, count: int, topk: int, inner: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The same for an MoE layer's experts, some of which nobody chose; and whether upstream's was called for it."""
    from sglang.srt.layers.moe import fused_moe_native

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    hidden = 24
    layer = SimpleNamespace(w13_weight=normal(count, 2 * inner, hidden), w2_weight=normal(count, hidden, inner))
    layer.num_experts = count
    runner = SimpleNamespace(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
    ids = torch.stack([torch.randperm(count - 1, generator=draw)[:topk] for _ in range(tokens)]).to(torch.int32)
    weights, x = torch.rand(tokens, topk, generator=draw), normal(tokens, hidden)
    calls, inputs = [], (layer, x, (weights, ids, None), runner)

    def upstream(*inputs: Any) -> torch.Tensor:
        calls.append(1)
        return native(*inputs)

    native = fused_moe_native.moe_forward_native.__wrapped__
    patched = sglang_grouped_experts.make_moe_forward(upstream)
    return {"error": (patched(*inputs) - native(*inputs)).abs().max().item(), "upstream": len(calls)}


def largest(found: Any, wanted: Any) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, wanted, strict=True))


def norms(draw: torch.Generator, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same for a norm, alone and after the addition of a residual, which must come back too."""
    from sglang.srt.models.qwen3_moe import RMSNorm

    layer = RMSNorm(24, eps=1e-5).to(dtype)
    layer.weight.data.normal_(generator=draw)
    x, residual = (torch.randn(rows, 24, generator=draw).to(dtype) for _ in range(2))
    error = 0.0
    for inputs in ((x,), (x[:, None].expand(rows, 3, 24),), (x, residual)):
        found = RMSNorm.forward_native(layer, *(each.clone() for each in inputs))
        wanted = RMSNorm.forward_native.__wrapped__(layer, *inputs)
        pairs = (found, wanted) if len(inputs) == 2 else ([found], [wanted])
        error = max(error, largest(*pairs))
    return {"error": error}


def rotation(draw: torch.Generator, heads: int, keys: int, dim: int, rotated: int, halves: bool) -> dict[str, Any]:
    """The same for what happens to queries, keys and values before attention."""
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models import qwen3_moe

    layer = SimpleNamespace(
        num_heads=heads, num_kv_heads=keys, q_size=heads * dim, kv_size=keys * dim, head_dim=dim, alt_stream=None,
        q_norm=RMSNorm(dim), k_norm=RMSNorm(dim), use_fused_qk_norm_rope=False, use_fused_qk_norm_rope_cpu=False,
        rotary_emb=RotaryEmbedding(dim, rotated, 512, 10000, halves, torch.float32), attn=None,
        compatible_with_fused_kv_buffer=False,
    )  # fmt: skip
    for each in (layer.q_norm, layer.k_norm):
        each.weight.data.normal_(generator=draw)
    qkv = torch.randn(33, (heads + 2 * keys) * dim, generator=draw)
    positions, replaced = torch.randint(512, (33,), generator=draw), qwen3_moe.Qwen3MoeAttention.apply_qk_norm_rope
    qwen3_moe.enable_fused_set_kv_buffer = lambda batch: False  # asks for a server's state
    found, wanted = replaced(layer, qkv.clone(), positions, None), replaced.__wrapped__(layer, qkv, positions, None)
    return {"error": largest(found, wanted)}


def layers() -> dict[str, Any]:
    """Whether a router gets the layer in its name where its model says none, and keeps one that it was told."""
    from sglang.srt.layers.moe.topk import TopK

    model = torch.nn.Module()
    blocks = [
        torch.nn.ModuleDict({"block_sparse_moe": torch.nn.ModuleDict({"topk": TopK(top_k=2, layer_id=7)})})
        for _ in range(3)
    ]
    for untold in (0, 2):
        blocks[untold]["block_sparse_moe"]["topk"].layer_id = None
    model.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
    sglang_topk_layers.name_layers(model)
    return {"found": [block["block_sparse_moe"]["topk"].layer_id for block in blocks]}


def replaced() -> dict[str, Any]:
    """Whether functions of the models are this package's, and the sampler is not compiled."""
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.srt.layers import sampler
    from sglang.srt.model_loader import loader
    from sglang.srt.models import minimax_m2

    functions = (
        elementwise._launch_fused_gate_sigmoid_mul,
        minimax_m2.rms_sumsq_serial,
        minimax_m2.rms_apply_serial,
    )
    wrapped = hasattr(loader._initialize_model, "__wrapped__")
    plain = not hasattr(sampler.multinomial_with_seed, "_torchdynamo_orig_callable")
    ours = all(each.__module__ == sglang_model_kernels.__name__ for each in functions)
    return {"found": wrapped and plain and ours}


def kernels(draw: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """What stands in for Triton's operators, beside torch's own norm and gate in float64; rows are split over ranks."""
    hidden, shared, others = (torch.randn(5, 24, generator=draw).to(dtype) for _ in range(3))
    gate = torch.randn(24, generator=draw).to(dtype)
    wanted = torch.sigmoid(hidden.double() @ gate.double())[:, None] * shared.double()
    error = 0.0
    for add in (False, True):
        output = others.clone()
        sglang_model_kernels.scale_by_gate(hidden, gate, shared, output, do_add=add)
        error = max(error, largest([output.double()], [wanted + add * others.double()]))
    wholes = [torch.randn(5, width, generator=draw).to(dtype) for width in (32, 16)]
    weights = [torch.randn(each.shape[1], generator=draw).to(dtype) for each in wholes]
    parts = [[whole.chunk(2, -1)[rank] for whole in wholes] for rank in range(2)]
    squares = sum(sglang_model_kernels.sum_squares(*part) for part in parts)
    for rank, part in enumerate(parts):
        own = [weight.chunk(2)[rank] for weight in weights]
        normed = sglang_model_kernels.norm_rows(*part, *own, sum_sq=squares, tp_world=2, eps=1e-6)
        for found, whole, weight in zip(normed, wholes, weights):
            known = torch.nn.functional.rms_norm(whole.double(), whole.shape[1:], weight.double(), 1e-6)
            error = max(error, largest([found.double()], [known.chunk(2, -1)[rank]]))
    return {"error": error}


def route_weights(draw: torch.Generator) -> dict[str, Any]:
    """A row of SGLang's own capturer, widened, once its own code has handed on what a router chose."""
    from sglang.srt.layers.moe import topk as module
    from sglang.srt.state_capturer import routed_experts

    compat.apply("sglang-weights")
    nothing = SimpleNamespace(chunked_prefill_size=16, dp_size=1, num_dp_ranks=1)  # of a server that is not there
    for name in ("get_schedule", "get_parallel"):
        setattr(routed_experts, name, lambda: nothing)
    routed_experts._is_scattered_a2a_backend = lambda: False
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3))
    sizes = {"num_tokens": 32, "max_running_requests": 4, "num_fused_shared_experts": 0, "device": "cpu"}
    capturer = routed_experts.RoutedExpertsCapturer(config, **sizes)
    module.get_global_experts_capturer = lambda: capturer
    weights, ids = torch.rand(5, 8, generator=draw).topk(2)
    settings = module.TopKConfig(top_k=2, routed_scaling_factor=2.5)
    module._post_process_topk_ids(
        topk_ids=ids.int(), topk_weights=weights, topk_config=settings, router_logits=weights, layer_id=1
    )
    slots = torch.tensor([9, 3, 4, 30, 1])
    batch = SimpleNamespace(out_cache_loc=slots, out_cache_loc_virtual=None)
    capturer.on_forward_end(batch, can_run_graph=False, cuda_graph_batch=None)
    rows = capturer.host_cache.buffer[slots]
    bits = rows[:, 1, 2:].contiguous().view(torch.float32)
    return {
        "found": [list(rows.shape), torch.equal(rows[:, 1, :2], ids.int()), torch.equal(bits, weights * 2.5)]
        + [bool(rows[:, [0, 2]].any())]
    }


def main() -> None:
    compat.apply("sglang-cpu")
    compat.apply("sglang-models")
    assert not {"sglang.srt.models.qwen3_moe", "numba"} & set(sys.modules)  # imported only where they are needed
    draw = torch.Generator().manual_seed(0)
    news = {"decode": one, "prefill": lambda length: length, "chunk": lambda length: (length + 1) // 2}
    cases = []
    with torch.inference_mode():
        for heads, shared, dim in ((4, 2, 16), (4, 4, 20), (8, 1, 64)):
            for dtype in (torch.float32, torch.bfloat16):
                for name, new in news.items():
                    found = attention(draw, heads, shared, dim, dtype, new)
                    cases.append({"what": "attention", "case": name, "heads": heads, "dtype": str(dtype)} | found)
        for tokens, count, topk in ((1, 8, 2), (64, 8, 2), (37, 60, 4)):
            for inner, dtype in ((16, torch.float32), (16, torch.bfloat16), (10, torch.float32)):
                found = experts(draw, tokens, count, topk, inner, dtype)
                cases.append({"what": "experts", "tokens": tokens, "inner": inner, "dtype": str(dtype)} | found)
        for rows, dtype in ((1, torch.float32), (64, torch.float32), (64, torch.bfloat16)):
            cases.append({"what": "norms", "rows": rows, "dtype": str(dtype)} | norms(draw, rows, dtype))
        for heads, keys, dim, rotated in ((4, 2, 16, 16), (6, 1, 20, 8), (8, 8, 64, 64)):
            for halves in (True, False):
                found = rotation(draw, heads, keys, dim, rotated, halves)
                cases.append({"what": "rotation", "dim": dim, "halves": halves, "dtype": "torch.float32"} | found)
        for dtype in (torch.float32, torch.bfloat16):
            cases.append({"what": "kernels", "dtype": str(dtype)} | kernels(draw, dtype))
        cases += [{"what": "layers"} | layers(), {"what": "replaced"} | replaced()]
        cases.append({"what": "weights"} | route_weights(draw))  # the last: it changes SGLang's modules
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
