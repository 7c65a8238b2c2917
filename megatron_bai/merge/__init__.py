"""Merging checkpoints: Balanced Actor Initialization on Megatron `torch_dist` and Hugging Face safetensors.

No model is built and no GPU is needed; `command.run` is the verb, `inspect.inspect` the other.
"""
