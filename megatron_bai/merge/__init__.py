"""Merging checkpoints: Balanced Actor Initialization on Megatron `torch_dist`, without a model or a GPU."""
