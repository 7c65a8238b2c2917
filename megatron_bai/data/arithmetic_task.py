"""The arithmetic task as a `Task`: prompts, rewards and supervised batches in token ids."""

from collections.abc import Collection
from random import Random

from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Arithmetic
from megatron_bai.data.arithmetic_text import (
    Problem,
    draw_problem,
    make_document,
    prompt_text,
    validate_arithmetic,
)
from megatron_bai.data.generated_task import GeneratedTask
from megatron_bai.data.task import Prompt


class ArithmeticTask(GeneratedTask[Problem]):
    """The arithmetic task in the ids of one tokenizer: a `Task`.

    Args:
        end_tokens: others than the tokenizer's that end a response.
    """

    enlarged_by = "data.max_terms"

    def __init__(self, data: Arithmetic, tokenizer: PreTrainedTokenizerFast, end_tokens: Collection[int] = ()):
        validate_arithmetic(data)
        super().__init__(data.eval_prompts, data.style, tokenizer, end_tokens)
        self.data = data

    def draw(self, rng: Random, held_out: bool) -> Problem:
        """Draw a problem of a split.

        Args:
            rng: decides all of it.
            held_out: whether the split is `eval`.
        """
        return draw_problem(self.data, rng, held_out)

    def largest(self) -> Problem:
        """Return a problem with the longest prompt."""
        return Problem((self.data.max_number,) * self.data.max_terms)

    def describe_largest(self) -> str:
        """Return in words, with the setting, what `largest` is."""
        return f"data.max_terms={self.data.max_terms} numbers"

    def make_prompt(self, problem: Problem) -> Prompt:
        """Return the prompt of a problem, with its answer."""
        text = prompt_text(problem)
        return Prompt(self.tokenizer.encode(text), text, problem.answer)

    def draw_document(self, rng: Random) -> list[tuple[str, bool]]:
        """Draw a text of `data.style` in parts.

        The style `pretrained` trains on every token, `instruct` and `reasoning` on responses and their end token.
        """
        document, end = make_document(self.data, self.data.style, rng), str(self.tokenizer.eos_token)
        return [(document.prompt, self.data.style == "pretrained"), (document.response + end, True)]
