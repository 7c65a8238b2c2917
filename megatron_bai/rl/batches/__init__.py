"""Turn samples into batches: advantages, padding, packing, micro-batches."""
