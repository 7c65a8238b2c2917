"""Forward passes of Qwen3-MoE on a CPU whose bits do not depend on what else is in the batch, with `rollout.exact`.

Symptom: torch's products, norms and activations round a row otherwise when there are more rows, so a token's
log-probability depends on the requests beside it, and equals the trainer's to rounding alone.

Upstream: `--enable-deterministic-inference` replaces torch's operators by Triton kernels whose order is fixed: on GPUs
alone, and not those of Megatron-Core.

What it does: every operator that sums calls `exact_ops.py`, as the trainer's layers do (`model/exact_layers.py`):
linear layers and the output layer, norms (`numba_kernels.rms_norm` already), queries and keys, attention, router,
experts, and the log-probabilities of sampled tokens. Applied after the fixes of `sglang-cpu`, to servers of a run with
the setting.

Can go: when both engines have the same batch-invariant kernels.
"""

import functools
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import


def _put(owner: Any, function: Any) -> None:
    """Put a function in place of one of the same name, which must be there."""
    assert callable(getattr(owner, function.__name__)), f"{owner} has no {function.__name__}"
    setattr(owner, function.__name__, function)


def _replace_linear(module: Any) -> None:
    """Replace the product of linear layers without quantization."""
    from megatron_bai.compat import exact_ops

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        assert bias is None
        return exact_ops.linear(x, layer.weight)

    _put(module.UnquantizedLinearMethod, apply)


def _replace_rotation(module: Any) -> None:
    """Replace norms and rotation of queries and keys. The layers' own norms call the trainer's kernel already."""
    from megatron_bai.compat import exact_ops

    def apply_qk_norm_rope(self: Any, qkv: Any, positions: Any, forward_batch: Any) -> Any:
        rotation = self.rotary_emb
        assert type(rotation).__name__ == "RotaryEmbedding" and rotation.is_neox_style
        table = exact_ops.rotary_table(rotation.max_position_embeddings, rotation.rotary_dim, float(rotation.base))
        angles = table[positions][:, None]
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        heads = (rows.reshape(len(rows), -1, self.head_dim) for rows in (q, k))
        norms = ((norm.weight, norm.variance_epsilon) for norm in (self.q_norm, self.k_norm))
        q, k = (
            exact_ops.rotate(exact_ops.rms_norm(x, *norm), angles).flatten(1)
            for x, norm in zip(heads, norms, strict=True)
        )
        self._used_fused_qk_norm_rope_last_call = True  # so that attention stores keys and values
        return q, k, v

    _put(module.Qwen3MoeAttention, apply_qk_norm_rope)


def _replace_attention(module: Any) -> None:
    """Compute prompts as decoding steps are: query by query."""
    import torch

    from megatron_bai.compat import exact_ops

    class ExactAttnBackend(module.TorchNativeAttnBackend):  # type: ignore[misc]  # known at run time
        def _run_sdpa_forward_extend(self, *batch: Any, **how: Any) -> Any:
            query, output, keys, values, table, rows, lengths, _, new, _ = batch
            assert how["causal"] and not how["is_cross_attn"] and how["sliding_window_size"] is None
            sequences = torch.arange(len(rows)).repeat_interleave(new.to(torch.int64))
            before = lengths - new.cumsum(0)  # a query's position in its sequence, less its position in the batch
            seen = before[sequences] + torch.arange(len(query)) + 1
            output.copy_(exact_ops.attend(query, keys, values, table, rows[sequences], seen, how["scaling"]))
            return output

    module.TorchNativeAttnBackend = ExactAttnBackend


def _replace_router(module: Any) -> None:
    """Choose and weigh experts by the router's logits."""
    from megatron_bai.compat import exact_ops

    def fused_topk_native(
        hidden_states: Any, gating_output: Any, topk: int, renormalize: bool, *args: Any, **named: Any
    ) -> Any:
        assert renormalize
        ids = gating_output.topk(topk, dim=1).indices.sort(dim=1).values
        return exact_ops.weigh_experts(gating_output, ids), ids

    _put(module, fused_topk_native)


def _replace_experts(module: Any) -> None:
    """Compute experts and their sum."""
    from megatron_bai.compat import exact_ops

    def moe_forward_native(layer: Any, x: Any, topk_output: Any, moe_runner_config: Any) -> Any:
        weights, ids, _ = topk_output
        return exact_ops.run_experts(x, layer.w13_weight, layer.w2_weight, ids, weights)

    _put(module, moe_forward_native)


def _replace_output_layer(module: Any) -> None:
    """Replace the product with the output layer."""
    from megatron_bai.compat import exact_ops

    def _compute_lm_head(self: Any, hidden_states: Any, lm_head: Any, embedding_bias: Any = None) -> Any:
        assert embedding_bias is None
        return exact_ops.linear(hidden_states, lm_head.weight)

    _put(module.LogitsProcessor, _compute_lm_head)


def _replace_logprobs(module: Any) -> None:
    """Return log-probabilities of what was sampled by the trainer's formula."""
    from megatron_bai.compat import exact_ops

    upstream = module.Sampler.forward

    @functools.wraps(upstream)
    def forward(
        self: Any, logits_output: Any, sampling_info: Any, return_logprob: bool, *args: Any, **named: Any
    ) -> Any:
        processor = self.output_logprob_processor
        if return_logprob and not sampling_info.is_all_greedy:
            # before upstream writes probabilities over the logits
            logprobs = exact_ops.log_softmax(logits_output.next_token_logits, sampling_info.temperatures)
            compute = type(processor).compute_logprobs
            processor.compute_logprobs = lambda _, *rest: compute(processor, logprobs, *rest)
        try:
            return upstream(self, logits_output, sampling_info, return_logprob, *args, **named)
        finally:
            vars(processor).pop("compute_logprobs", None)

    _put(module.Sampler, forward)


def install() -> None:
    """Replace them in the modules that have them."""
    for name, replace in (
        ("layers.quantization.unquant", _replace_linear),
        ("models.qwen3_moe", _replace_rotation),
        ("layers.attention.torch_native_backend", _replace_attention),
        ("layers.moe.topk", _replace_router),
        ("layers.moe.fused_moe_native", _replace_experts),
        ("layers.logits_processor", _replace_output_layer),
        ("layers.sampler", _replace_logprobs),
    ):
        after_import(f"sglang.srt.{name}", replace)


PATCH = Patch(
    name="sglang_exact",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-exact",
    summary="a token's log-probability depends on the requests beside it, in its last bits",
    install=install,
)
