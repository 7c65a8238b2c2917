"""Attention sinks on a CPU: gpt-oss.

Symptom: gpt-oss is refused with `--attention-backend torch_native`, the only one without AMX (`GptOssForCausalLM
requires one of ['triton', …] attention backend`), whose forward takes no `sinks`. They are bfloat16 whatever the
model's dtype, which moves log-probabilities of a float32 model by 1e-3, and the experts' activation is compiled for
seconds.

Upstream: srt/arg_groups/model_hook.py `handle_model_specific_adjustments`,
srt/layers/attention/torch_native_backend.py `forward_extend` and `forward_decode`, srt/models/gpt_oss.py
`GptOssAttention`, srt/layers/moe/moe_runner/triton_utils/fused_moe.py `swiglu_gpt_oss_sigmoid_alpha`.

What it does: layers with sinks compute attention sequence by sequence, with and without windows. A sink is one more
key, whose product with every query is the head's number, and whose value is 0. Where windows have a pool of their own,
their keys are read from that: torch_native itself looks for them where those of full layers would be. Sinks are
float32, and the activation is not compiled.

Can go: when torch_native takes sinks.
"""

from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import
from megatron_bai.compat.sglang_built_models import change_built_models

if TYPE_CHECKING:
    from torch import Tensor


def attend(
    query: "Tensor", keys: "Tensor", values: "Tensor", sinks: "Tensor", scale: float, window: int | None
) -> "Tensor":
    """Compute attention of the last tokens of one sequence to all of it, with sinks.

    Args:
        query: `[new, heads, dim]`, of the last tokens.
        keys: `[tokens, kv heads, dim]`, of the sequence.
        values: `[tokens, kv heads, width]`.
        sinks: `[heads]`, numbers beside the scores of a head.
        scale: of the scores.
        window: how many tokens before it one attends to; None: all.

    Returns:
        `[new, heads, width]`.
    """
    import torch
    from torch.nn.functional import pad, scaled_dot_product_attention

    new, tokens, width = len(query), len(keys), values.shape[-1]
    position = torch.arange(tokens - new, tokens)[:, None]
    seen = torch.arange(tokens) <= position
    if window is not None:
        seen &= torch.arange(tokens) >= position - window
    share = query.shape[1] // keys.shape[1]  # heads that share keys
    query = torch.cat([query, (sinks.to(query.dtype) / scale).expand(new, -1)[..., None]], -1)
    # The sink's key is 1 in the element that heads have more than others, in which queries have its number
    keys, values = pad(keys, (0, 1)), pad(values, (0, keys.shape[-1] + 1 - width))
    keys, values = pad(keys, (0, 0, 0, 0, 1, 0)), pad(values, (0, 0, 0, 0, 1, 0))
    keys[0, :, -1] = 1
    keys, values = (each.repeat_interleave(share, 1).transpose(0, 1)[None] for each in (keys, values))
    mask = pad(seen, (1, 0), value=True)
    context = scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, attn_mask=mask, scale=scale)
    return context[0].transpose(0, 1)[..., :width]


def make_sink_backend(upstream: type) -> type:
    """Make `TorchNativeAttnBackend`, or a class derived from it, with sinks."""

    class SinkAttnBackend(upstream):  # type: ignore[misc]  # SGLang's class is known at run time alone
        def forward_extend(self, *inputs: Any, sinks: Any = None, **how: Any) -> Any:
            if sinks is None:
                return super().forward_extend(*inputs, **how)
            batch = inputs[4]
            return self._forward_with_sinks(*inputs, sinks=sinks, new=batch.extend_seq_lens, **how)

        def forward_decode(self, *inputs: Any, sinks: Any = None, **how: Any) -> Any:
            if sinks is None:
                return super().forward_decode(*inputs, **how)
            return self._forward_with_sinks(*inputs, sinks=sinks, new=None, **how)

        def _forward_with_sinks(
            self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, *, sinks: Any, new: Any
        ) -> Any:
            import torch
            from sglang.srt.mem_cache.memory_pool import KVWriteLoc

            if save_kv_cache and k is not None:
                where = KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
            queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            window = layer.sliding_window_size
            window = None if window is None or window < 0 else window
            counts = new.tolist() if new is not None else [1] * len(batch.seq_lens)
            found = []
            rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), queries.split(counts), strict=True)
            for row, length, query in rows:
                low = 0 if window is None else max(0, length - len(query) - window)  # others' slots may be free
                slots = self.req_to_token_pool.req_to_token[row, low:length].long()
                if window is not None and self.use_sliding_window_kv_pool:
                    slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
                k, v = (each.index_select(0, slots).to(query.dtype) for each in (keys, values))
                found.append(attend(query, k, v, sinks, layer.scaling, window))
            return torch.cat(found).flatten(1)

    return SinkAttnBackend


def widen_sinks(model: Any, config: Any) -> None:
    """Make the sinks of a model float32.

    Args:
        model: SGLang's, whose parameters are not loaded yet.
        config: not used.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            parameter.data = parameter.data.float()


def install() -> None:
    """Allow the backend for gpt-oss, give it sinks, widen those of models, and leave the activation uncompiled."""

    def allow(module: Any) -> None:
        upstream = module.attention_backends_of

        def attention_backends_of(view: Any) -> tuple[Any, ...]:
            backends = upstream(view)
            if module.model_config_of(view).hf_config.architectures[0] != "GptOssForCausalLM":
                return tuple(backends)
            # the other one for CPUs, which the list that follows has
            return tuple("intel_amx" if each == "torch_native" else each for each in backends)

        module.attention_backends_of = attention_backends_of

    def take_sinks(module: Any) -> None:
        module.TorchNativeAttnBackend = make_sink_backend(module.TorchNativeAttnBackend)

    def leave_uncompiled(module: Any) -> None:
        compiled = module.swiglu_gpt_oss_sigmoid_alpha
        module.swiglu_gpt_oss_sigmoid_alpha = getattr(compiled, "_torchdynamo_orig_callable", compiled)

    after_import("sglang.srt.arg_groups.model_hook", allow)
    after_import("sglang.srt.layers.attention.torch_native_backend", take_sinks)
    after_import("sglang.srt.layers.moe.fused_moe_native", leave_uncompiled)
    change_built_models(widen_sinks)


PATCH = Patch(
    name="sglang_attention_sinks",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="gpt-oss is refused on a CPU: the attention backend that runs there knows no sinks",
    install=install,
)
