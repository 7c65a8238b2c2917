"""Build the Megatron-Core model; load, save and convert its weights."""
