"""Stable reinforcement learning of Mixture-of-Experts models on Megatron-Core and SGLang."""

__version__ = "0.1.0"
