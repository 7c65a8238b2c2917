"""What Megatron-Core 0.16 imports from here."""

from contextlib import nullcontext as fp8_autocast


class FP8GlobalStateManager:
    """Nothing is in eight bits."""


__all__ = ["FP8GlobalStateManager", "fp8_autocast"]
