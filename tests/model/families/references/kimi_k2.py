"""Kimi-K2: of DeepSeek-V3's class, under a model type that transformers lacks."""

from model.families.references.moonlight import logits, make

__all__ = ["logits", "make"]
