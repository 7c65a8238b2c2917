"""The generated, program-checked arithmetic task: its text, its tokenizer, its prompts, rewards and batches."""

from megatron_bai.data.task import Prompt, Task
from megatron_bai.data.tokenizer import build_tokenizer

__all__ = ["Prompt", "Task", "build_tokenizer"]
