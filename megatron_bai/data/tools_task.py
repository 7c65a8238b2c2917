"""The task with a calculator as a `Task`: chats, rewards of the last turn and supervised batches in token ids."""

from collections.abc import Collection
from random import Random

from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Tools
from megatron_bai.data.generated_task import GeneratedTask
from megatron_bai.data.task import Prompt
from megatron_bai.data.tools_text import (
    Calculation,
    draw_calculation,
    make_messages,
    split_messages,
    validate_tools,
)


class ToolsTask(GeneratedTask[Calculation]):
    """The task with a calculator in the ids of one tokenizer: a `Task`.

    Args:
        end_tokens: others than the tokenizer's that end a response.
    """

    enlarged_by = "data.max_number"

    def __init__(self, data: Tools, tokenizer: PreTrainedTokenizerFast, end_tokens: Collection[int] = ()):
        validate_tools(data)
        super().__init__(data.eval_prompts, "tools", tokenizer, end_tokens)
        self.data = data

    def draw(self, rng: Random, held_out: bool) -> Calculation:
        """Draw a problem of a split.

        Args:
            rng: decides all of it.
            held_out: whether the split is `eval`.
        """
        return draw_calculation(self.data, rng, held_out)

    def largest(self) -> Calculation:
        """Return a problem with the longest prompt."""
        return Calculation(self.data.max_number, "*", self.data.max_number)

    def describe_largest(self) -> str:
        """Return in words, with the setting, what `largest` is."""
        return f"numbers up to data.max_number={self.data.max_number}"

    def make_prompt(self, problem: Calculation) -> Prompt:
        """Return a problem as a chat of one message."""
        messages = ({"role": "user", "content": problem.expression},)
        text = str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        return Prompt(self.tokenizer.encode(text), text, problem.answer, messages)

    def draw_document(self, rng: Random) -> list[tuple[str, bool]]:
        """Draw a conversation in parts, the turns of the model with their end tokens as targets."""
        return split_messages(make_messages(self.data, rng), str(self.tokenizer.eos_token))
