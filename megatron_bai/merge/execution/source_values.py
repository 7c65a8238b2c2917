"""The values of all sources in a box, for methods that need them at once."""

import math
from collections.abc import Collection
from typing import NoReturn

import torch

from megatron_bai.checkpoint.boxes import Box
from megatron_bai.errors import PermanentError
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.regions import Region


def inputs_with_weight(plan: Plan, names: Collection[str]) -> list[int]:
    """Return the indices of the inputs that have a weight in one of the regions, in any result.

    Args:
        plan: the merge.
        names: of merged regions, as `Region.name`.

    Returns:
        Indices into `plan.inputs`, ascending.
    """
    rows = [weights[name] for weights in plan.input_weights for name in names]
    return [i for i in range(len(plan.inputs)) if any(row[i] != 0 for row in rows)]


def read_inputs(plan: Plan, region: Region, box: Box, inputs: Collection[int]) -> torch.Tensor:
    """Read the inputs' values of a box.

    Args:
        plan: the merge.
        region: which the box lies in.
        box: to read, in the output tensor.
        inputs: indices of the inputs to read.

    Returns:
        float64 `[inputs, *sizes of the box]`; 0 for those not among `inputs`.

    Raises:
        UserError: one of them is NaN or Inf.
    """
    values = torch.zeros(len(plan.inputs), *box[1], dtype=torch.float64)
    for i in inputs:
        values[i] = plan.inputs[i].read(region.key, *box)
    if not math.isfinite(values.sum()):
        require_finite(plan, region, box)
    return values


def require_finite(plan: Plan, region: Region, box: Box) -> None:
    """Raise an error that names the source of a NaN or Inf, if one has it.

    Args:
        plan: the merge, whose inputs are read in turn until one is at fault.
        region: which the box lies in.
        box: to read, in the output tensor.

    Raises:
        PermanentError: names the first such source and the position of its first such element.
    """
    for source in plan.inputs:
        finite = source.read(region.key, *box).isfinite()
        if not finite.all():
            position = tuple(o + int(i) for o, i in zip(box[0], finite.logical_not().nonzero()[0], strict=True))
            raise PermanentError(f"{source.path}: {region.key} holds NaN or Inf at {position}: it must not be merged")


def raise_not_finite(plan: Plan, region: Region, box: Box) -> NoReturn:
    """Raise an error that says why the merged values of a box are not finite.

    Args:
        plan: the merge, whose inputs are read again.
        region: which the box lies in.
        box: whose merged values are not finite, in the output tensor.

    Raises:
        PermanentError: always.
    """
    require_finite(plan, region, box)
    raise PermanentError(  # negative weights can leave the sources' range
        f"{region.key}: the merged values are too large for {region.dtype}: check the weights and merge.dtype"
    )
