"""The interface of a source of data for training and rollouts.

Everything is a function of (seed, index), never of a shared generator's state: any rank can make any part of any batch,
however many ranks there are, and a resumed run continues where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        ids: token ids of `text`.
        text: as the model reads it, chat markers included.
        answer: what a reward compares with; "" where the data has none.
        messages: the chat that `text` was made of, `{"role", "content"}` each; empty where it was none.
        extra: the row's other columns, JSON.
    """

    ids: list[int]
    text: str
    answer: str
    messages: tuple[dict[str, str], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A source of prompts and of text to learn, in the ids of one tokenizer.

    Attributes:
        tokenizer: has an end token and a padding token.
        end_tokens: any of them ends a response: the tokenizer's, and the others that the model has.
        eval_size: prompts of the split `eval`.
    """

    tokenizer: PreTrainedTokenizerFast
    end_tokens: frozenset[int]
    eval_size: int

    def prompts(self, split: str, seed: int, start: int, count: int) -> list[Prompt]:
        """Return prompts `[start, start + count)` of a split: `train` is endless, `eval` has `eval_size` prompts.

        No prompt of `eval` is ever one of `train`.

        Args:
            split: `train` or `eval`.
            seed: of the run.
            start: index of the first prompt, from 0.
            count: number of prompts.

        Raises:
            UserError: the eval split has fewer prompts than asked for, or there is no such split.
        """

    def reward(self, prompt: Prompt, response_ids: Sequence[int]) -> float:
        """Score a response, any of `end_tokens` at its end, by the data's own check (`reward=exact`): 1.0 or 0.0.

        Args:
            prompt: what was asked, with its answer.
            response_ids: token ids of the response. Without an end token, or empty, it scores 0.0.
        """

    def has_check(self, prompt: Prompt) -> bool:
        """Return whether `reward` can find a response to this prompt right."""

    def supervised_batch(self, seed: int, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the batch of one step of supervised training, a function of its arguments: equal on every rank.

        Args:
            seed: of the run.
            step: index of the step, from 0.
            rows: B.
            length: tokens in a row, T; what does not fill it is padded.

        Returns:
            tokens: `[B, T]` int64.
            loss_mask: `[B, T]` float32; loss_mask[b, t] is 1 where token t is a target (to be predicted from the tokens
                before it), else 0. Column 0 is never a target.

        Raises:
            UserError: nothing fits into a row of this length.
        """
