"""The sources' values of a box side by side, for methods that need them all at once."""

import torch

from megatron_bai.errors import Unfit
from megatron_bai.merge.boxes import Box
from megatron_bai.merge.plan import Output, Plan


def read_all(plan: Plan, output: Output, box: Box) -> torch.Tensor:
    """The inputs' values, float64 [inputs, elements]; 0 for an input whose weight is 0 in every sum, which is not read.

    Raises:
        UserError: one of them is NaN or Inf.
    """
    found = torch.zeros(len(plan.inputs), *box[1], dtype=torch.float64)
    for i, source in enumerate(plan.inputs):
        if any(row[output.key][i] != 0 for row in plan.sums):
            found[i] = source.read(output.key, *box)
    if not found.isfinite().all():
        require_finite(plan, output, box)
    return found.reshape(len(plan.inputs), -1)


def require_finite(plan: Plan, output: Output, box: Box) -> None:
    """Say which source a NaN or Inf came from, if one did."""
    for source in plan.inputs:
        finite = source.read(output.key, *box).isfinite()
        if not finite.all():
            at = tuple(o + int(i) for o, i in zip(box[0], finite.logical_not().nonzero()[0]))
            raise Unfit(f"{source.path}: {output.key} holds NaN or Inf at {at}: it must not be merged")
