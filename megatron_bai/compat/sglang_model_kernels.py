"""Operators of models that exist in Triton alone, in torch.

Symptom: the first forward pass of Qwen2-MoE ends in Triton (`0 active drivers`), that of MiniMax-M2 in an assertion
that a tensor is on CUDA.

Upstream: srt/models/qwen2_moe.py scales the shared expert by kernels/ops/elementwise/elementwise.py
`_launch_fused_gate_sigmoid_mul`; srt/models/minimax_m2.py norms queries and keys by `rms_sumsq_serial` and
`rms_apply_serial`. Both ask whether the CPU has AMX, and take it for a GPU where it has not.

What it does: the same formulas by torch's operators, in float32, with the dtype of the input.

Can go: when these models have a path for a CPU without AMX.
"""

from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

if TYPE_CHECKING:
    from torch import Tensor


def scale_by_gate(
    hidden_states: "Tensor", gate_weight: "Tensor", shared_output: "Tensor", output: "Tensor", *, do_add: bool
) -> None:
    """Write σ(hidden · gate) · shared to `output`, or add it.

    Args:
        hidden_states: `[tokens, hidden]`.
        gate_weight: `[hidden]`.
        shared_output: `[tokens, hidden]`, of the shared expert.
        output: `[tokens, hidden]`, changed in place.
        do_add: whether it holds what is added to.
    """
    import torch

    gate = torch.sigmoid((hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True))
    scaled = gate * shared_output.float()
    output.copy_(output.float() + scaled if do_add else scaled)


def sum_squares(x1: "Tensor", x2: "Tensor") -> "Tensor":
    """Return the sums of squares of the rows of two matrices, one after the other.

    Args:
        x1: `[tokens, …]`.
        x2: `[tokens, …]`.

    Returns:
        `[2 · tokens]` float32, then zeros up to a multiple of 4, as upstream has it for its all-reduce.
    """
    import torch

    sums = torch.cat([x.float().square().sum(-1) for x in (x1, x2)])
    return torch.nn.functional.pad(sums, (0, -len(sums) % 4))


def norm_rows(
    x1: "Tensor", x2: "Tensor", w1: "Tensor", w2: "Tensor", sum_sq: "Tensor", tp_world: int = 1, eps: float = 1e-5
) -> tuple["Tensor", "Tensor"]:
    """Return x · w / rms(x) for two matrices whose rows are split over ranks.

    Args:
        x1: `[tokens, …]`, this rank's part.
        x2: `[tokens, …]`.
        w1: of the columns of `x1`.
        w2: of those of `x2`.
        sum_sq: of whole rows, as `sum_squares` has them.
        tp_world: number of ranks.
        eps: added to the mean square.
    """
    import torch

    rows = len(x1)
    normed = []
    for x, weight, squares in ((x1, w1, sum_sq[:rows]), (x2, w2, sum_sq[rows : 2 * rows])):
        scale = torch.rsqrt(squares / (x.shape[1] * tp_world) + eps)
        normed.append((x.float() * scale[:, None] * weight.float()).to(x.dtype))
    return normed[0], normed[1]


def install() -> None:
    """Replace them in the modules that have them; models import the first by its callers' names."""

    def replace_gate(module: Any) -> None:
        assert callable(module._launch_fused_gate_sigmoid_mul)
        module._launch_fused_gate_sigmoid_mul = scale_by_gate

    def replace_norms(module: Any) -> None:
        assert callable(module.rms_sumsq_serial) and callable(module.rms_apply_serial)
        module.rms_sumsq_serial, module.rms_apply_serial = sum_squares, norm_rows

    after_import("sglang.kernels.ops.elementwise.elementwise", replace_gate)
    after_import("sglang.srt.models.minimax_m2", replace_norms)


PATCH = Patch(
    name="sglang_model_kernels",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="Qwen2-MoE and MiniMax-M2 have operators in Triton alone: no forward pass on a CPU",
    install=install,
)
