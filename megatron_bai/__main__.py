"""`python -m megatron_bai VERB …`, for torchrun, which starts modules."""

from megatron_bai.cli import main

if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main()
