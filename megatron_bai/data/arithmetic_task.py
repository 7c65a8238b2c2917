"""The arithmetic task as a `Task`: prompts, rewards and supervised batches in token ids."""

from collections.abc import Collection, Sequence
from random import Random
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Arithmetic
from megatron_bai.data.arithmetic_text import (
    Document,
    Problem,
    draw_problem,
    is_correct,
    make_document,
    prompt_text,
    validate_arithmetic,
)
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError


class ArithmeticTask:
    """The arithmetic task in the ids of one tokenizer: a `Task`.

    Args:
        end_tokens: others than the tokenizer's that end a response.
    """

    def __init__(self, data: Arithmetic, tokenizer: PreTrainedTokenizerFast, end_tokens: Collection[int] = ()):
        validate_arithmetic(data)
        self.data = data
        self.tokenizer = tokenizer
        self.end_tokens = frozenset((cast(int, tokenizer.eos_token_id), *end_tokens))
        self.eval_size = data.eval_prompts
        self._text_ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) - self.end_tokens

    def require_room(self, max_tokens: int) -> None:
        """Refuse problems of which one could be longer than a prompt may be.

        Args:
            max_tokens: of a prompt.

        Raises:
            UserError: names the settings.
        """
        longest = len(self._prompt(Problem((self.data.max_number,) * self.data.max_terms)).ids)
        if longest > max_tokens:
            raise UserError(
                f"a prompt of data.max_terms={self.data.max_terms} numbers has {longest} tokens, and "
                f"{max(max_tokens, 0)} fit beside the response: lower it or rollout.max_new_tokens, or raise what "
                "bounds both (rollout.max_total_tokens, trainer.tokens_per_micro_batch, model.max_position_embeddings)"
            )

    def prompts(self, split: str, seed: int, start: int, count: int) -> list[Prompt]:
        """Return prompts `[start, start + count)` of a split.

        `train` is an endless stream. `eval` has `data.eval_prompts` prompts, all different and none ever trained on.

        Args:
            split: `train` or `eval`.
            seed: of the run. Both splits depend on it.
            start: index of the first prompt, from 0.
            count: number of prompts.

        Raises:
            UserError: the eval split has fewer prompts than asked for, or there is no such split.
        """
        if split == "train":
            drawn = [draw_problem(self.data, Random(f"train/{seed}/{i}")) for i in range(start, start + count)]
        elif split == "eval":
            drawn = self._eval_problems(seed)[start : start + count]
        else:
            raise UserError(f"there is no data split {split!r}: use train or eval")
        if len(drawn) < count:
            raise UserError(
                f"there are no eval prompts {start} to {start + count}: raise data.eval_prompts, or data.max_terms "
                "where the task has no more problems"
            )
        return [self._prompt(problem) for problem in drawn]

    def _prompt(self, problem: Problem) -> Prompt:
        text = prompt_text(problem)
        return Prompt(self.tokenizer.encode(text), text, problem.answer)

    def _eval_problems(self, seed: int) -> list[Problem]:
        rng = Random(f"eval/{seed}")
        problems: dict[Problem, None] = {}
        for _ in range(100 * self.data.eval_prompts):  # enough, unless the split is smaller than asked for
            if len(problems) == self.data.eval_prompts:
                break
            problems.setdefault(draw_problem(self.data, rng, held_out=True))
        return list(problems)

    def reward(self, prompt: Prompt, response_ids: Sequence[int]) -> float:
        """Return 1.0 for the exact answer and a well-formed end, else 0.0.

        Well formed: the response ends with an end token, of which none appears before, and its last line is
        `answer:` and the number alone. A response cut off at the token limit has no end and earns nothing, and so does
        one with an id that is no text (a chat marker, padding, or a spare row of the embedding).

        Args:
            prompt: what was asked, with its answer.
            response_ids: token ids of the response, the end token included; may be empty.
        """
        *body, end = response_ids if len(response_ids) else [-1]
        if end not in self.end_tokens or not self._text_ids.issuperset(int(i) for i in body):
            return 0.0
        return float(is_correct(prompt.answer, cast(str, self.tokenizer.decode(body))))

    def has_check(self, prompt: Prompt) -> bool:
        """Return True: every problem has a number for an answer."""
        return True

    def supervised_batch(self, seed: int, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch as `Task.supervised_batch` does: whole documents packed into rows, attention over a whole row.

        The style `pretrained` trains on every token, `instruct` and `reasoning` on responses and their end token.

        Args:
            seed: of the run.
            step: index of the step, from 0.
            rows: B.
            length: T, tokens in a row; what no further document fits into is padding.

        Returns:
            Tokens `[B, T]` int64, and the loss mask `[B, T]` float32, 1 for targets and 0 in column 0 and padding.

        Raises:
            UserError: a row's first document is longer than the row.
        """
        style = self.data.style
        tokens = np.full((rows, length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((rows, length), dtype=np.float32)
        for row in range(rows):
            rng, end = Random(f"{style}/{seed}/{step}/{row}"), 0
            while True:
                ids, targets = self._encode(make_document(self.data, style, rng), style)
                if end + len(ids) > length:
                    break
                tokens[row, end : end + len(ids)] = ids
                mask[row, end : end + len(ids)] = targets
                end += len(ids)
            if end == 0:
                raise UserError(f"a row of {length} tokens is too short for a document of {len(ids)}: lengthen it")
        mask[:, 0] = 0.0
        return tokens, mask

    def _encode(self, text: Document, style: str) -> tuple[list[int], list[float]]:
        """Return the ids of a document with its end token, and which of them are targets."""
        prompt = self.tokenizer.encode(text.prompt)
        response = [*self.tokenizer.encode(text.response), self.tokenizer.eos_token_id]
        return prompt + response, [float(style == "pretrained")] * len(prompt) + [1.0] * len(response)
