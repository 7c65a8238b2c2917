"""Stands for NVIDIA's Apex: the names that Megatron-Core imports, where they are in it."""

from apex import optimizers

__all__ = ["optimizers"]
