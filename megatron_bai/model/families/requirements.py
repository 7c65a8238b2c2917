"""What several families ask of a configuration's values."""

import math
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture


def require_full_attention(model: Architecture) -> None:
    """Refuse an architecture where a token does not attend to all before it.

    Args:
        model: the architecture.

    Raises:
        UserError: names the key.
    """
    window, values = model.values.get("sliding_window"), model.values  # None or 0 unless it is used
    if not window and (others := set(values.get("layer_types") or ()) - {"full_attention"}):
        raise UserError(f"layer_types has {min(others)!r}, only full attention is supported")
    if window and window < model.max_position_embeddings:
        used = "use_sliding_window is true, and " if "use_sliding_window" in values else ""
        raise UserError(
            f"{used}sliding_window ({window}) is shorter than max_position_embeddings"
            f" ({model.max_position_embeddings}): only full attention is supported"
        )


def require_size(name: str, value: Any, may_be_float: bool = False, may_be_0: bool = False) -> None:
    """Refuse a value that is no size.

    Args:
        name: of the value, for the message.
        value: of any type.
        may_be_float: whether it need not be a whole number.
        may_be_0: whether it may be 0.

    Raises:
        UserError: names it.
    """
    kinds = (int, float) if may_be_float else (int,)
    if type(value) not in kinds or not 0 <= value < math.inf or (value == 0 and not may_be_0):
        raise UserError(f"{name} is {value!r}, which is no size")
