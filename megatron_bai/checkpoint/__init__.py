"""Read, write and check checkpoints of both formats: Megatron-Core's `torch_dist` and Hugging Face safetensors."""
