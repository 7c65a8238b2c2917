"""What Megatron-Core imports from here."""

from contextlib import nullcontext as fp8_autocast
from contextlib import nullcontext as fp8_model_init


class FP8GlobalStateManager:
    """Nothing is in eight bits."""


__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]
