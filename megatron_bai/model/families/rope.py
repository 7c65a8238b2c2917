"""Rotary positions: what transformers makes of `rope_parameters`, in Megatron-Core's terms."""

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Values


@dataclass(frozen=True)
class RopeArguments:
    """What Megatron-Core is told of positions.

    Attributes:
        gpt: arguments of GPTModel.
        config: attributes of its configuration that are no arguments: GPTModel reads those of YaRN there.
    """

    gpt: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)


def rope_arguments(values: Values, partial: bool = False) -> RopeArguments:
    """Return Megatron-Core's arguments for grouped-query attention.

    Args:
        values: effective values of the configuration, with `rope_theta` and `rope_parameters`.
        partial: whether the family rotates the part of a head that `partial_rotary_factor` says.

    Raises:
        UserError: a kind of scaling that Megatron-Core does not have.
    """
    rope = values.get("rope_parameters") or {}
    kind, theta = rope.get("rope_type"), values.get("rope_theta", 0)
    if kind not in ("default", "yarn"):
        kind = repr(kind) if isinstance(kind, str) else "one for each type of layer"
        raise UserError(
            f"scaled rotary embeddings are not supported (rope_type is {kind}), yarn is: without the scaling"
            " (rope_parameters, rope_scaling) the model is another one"
        )
    fraction = rope.get("partial_rotary_factor", 1.0)
    if fraction != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor is {fraction!r}, only 1.0 is supported")
    rotated = fraction * values["head_dim"] if isinstance(fraction, int | float) else 0
    if rotated != int(rotated) or rotated % 2 or not 0 < rotated <= values["head_dim"]:
        raise UserError(f"partial_rotary_factor is {fraction!r}, which rotates no even number of a head's elements")
    gpt: dict[str, Any] = {
        "position_embedding_type": "rope",
        # Megatron-Core's type is int; a base that is none must not be cut to one
        "rotary_base": theta if theta % 1 else int(theta),
    }
    if fraction != 1.0:
        gpt["rotary_percent"] = fraction
    if kind == "default":
        return RopeArguments(gpt)
    if fraction != 1.0:
        raise UserError("partial_rotary_factor is not supported with yarn: Megatron-Core scales the whole head")
    return RopeArguments(gpt | {"position_embedding_type": "yarn"}, _yarn_attributes(rope))


def _yarn_attributes(rope: dict[str, Any]) -> dict[str, Any]:
    """Return YaRN's parameters (arXiv 2309.00071) with transformers' defaults."""
    original: Any = rope.get("original_max_position_embeddings")
    factor: Any = rope.get("factor")
    for name, value in (("original_max_position_embeddings", original), ("factor", factor)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1 < value < math.inf:
            raise UserError(f"scaled rotary embeddings (yarn): {name} is {value!r}, a number above 1 is needed")
    return {
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        **_attention_scale(rope),
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }


def _attention_scale(rope: dict[str, Any]) -> dict[str, Any]:
    """Return what makes Megatron-Core scale cosine and sine as transformers does.

    Megatron-Core knows (0.1·m·ln s + 1)/(0.1·a·ln s + 1) of two numbers m and a, and 0.1·ln s + 1 without them. An
    `attention_factor` f that is stated is the first with a = 0 and m = (f − 1)/(0.1·ln s).
    """
    stated = rope.get("attention_factor")
    if stated is not None:
        return {"yarn_mscale": (stated - 1) / (0.1 * math.log(rope["factor"])), "yarn_mscale_all_dim": 0.0}
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    both = bool(mscale and all_dim)  # transformers ignores one without the other, and zeros
    return {"yarn_mscale": mscale if both else None, "yarn_mscale_all_dim": all_dim if both else None}
