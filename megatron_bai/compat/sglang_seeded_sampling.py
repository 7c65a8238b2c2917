"""`--enable-deterministic-inference`, and with it a seed per sample, on a CPU.

Symptom: SGLang honours `sampling_seed` only under that flag, which refuses `--attention-backend torch_native`, then
registers Triton kernels for the device; the sampler compiles with torch.compile (14 s at the first request).

Upstream: srt/arg_groups/overrides.py `_deterministic_attention_backend`, srt/model_executor/model_runner.py
`maybe_enable_batch_invariant_mode`, srt/layers/sampler.py `multinomial_with_seed`.

What it gives: the same seed draws the same noise whatever else is in the batch. Logits still depend on the batch's
composition at the level of float rounding (2e-6), so a sample may change where two tokens tie that closely.

Can go: when upstream allows torch_native there and keeps Triton to devices that have it.
"""

import os

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch


def install() -> None:
    """Allow torch_native, leave torch's own CPU operators in place, and run the sampler uncompiled."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read where a function is decorated: the sampler is imported later
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None


PATCH = Patch(
    name="sglang_seeded_sampling",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="seeds per sample are refused with the attention backend that runs on a CPU",
    install=install,
)
