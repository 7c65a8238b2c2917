"""Ling 2.0 and Ring 2.0: the same model as 1.x, of another configuration."""

from model.families.references.bailing_moe import logits, make

__all__ = ["logits", "make"]
