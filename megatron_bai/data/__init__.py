"""Prompts and texts: the generated arithmetic task, or rows on local disk (docs/data.md).

`task_factory` makes the task that the settings choose. Nothing is imported here: reward workers need `answers` alone.
"""
