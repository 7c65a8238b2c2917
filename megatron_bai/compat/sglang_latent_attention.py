"""Latent attention on a CPU: DeepSeek-V3, Moonlight and Kimi-K2.

Symptom: with `--attention-backend torch_native` prompts have keys and values of every head, which the backend looks for
in the cache, where the latents are: `Expected size for first two dimensions of batch2 tensor`. With
`--enable-deterministic-inference` such models are refused before. Without scaled positions (Moonlight) the construction
ends in `assert rope_scaling is not None`.

Upstream: srt/models/deepseek_common/attention_backend_handler.py `AttentionBackendRegistry` (a backend that it does not
know is taken for triton), srt/arg_groups/attention_hook.py, srt/layers/rotary_embedding/factory.py `get_rope_cpu`.

What it does: on torch_native every pass attends to the latents themselves, as decoding does anyway, and as SGLang does
on a GPU where inference is to be deterministic. Positions that are not scaled are rotated as on a GPU, in torch.

Can go: when the registry has torch_native, and `get_rope_cpu` positions that are not scaled.
"""

from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import


def install() -> None:
    """Register the backend for latents, allow it where inference is deterministic, and rotate without scaling."""

    def register(module: Any) -> None:
        module.AttentionBackendRegistry.register("torch_native", lambda attn, batch: module.AttnForwardMethod.MLA)

    def rotate_unscaled(module: Any) -> None:
        scaled = module.get_rope_cpu

        def get_rope_cpu(*sizes: Any) -> Any:
            scaling = sizes[5]
            if scaling and scaling.get("rope_type") == "deepseek_yarn":
                return scaled(*sizes)
            return module.get_rope(*sizes[:8])

        module.get_rope_cpu = get_rope_cpu

    from sglang.srt.arg_groups import choices

    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    after_import("sglang.srt.models.deepseek_common.attention_backend_handler", register)
    after_import("sglang.srt.layers.rotary_embedding.factory", rotate_unscaled)


PATCH = Patch(
    name="sglang_latent_attention",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="prompts of DeepSeek-V3 and its kin fail with the attention backend that runs on a CPU",
    install=install,
)
