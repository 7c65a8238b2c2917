"""What the generated tasks share: splits of prompts, the exact reward, and packed supervised batches."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from random import Random
from typing import Generic, TypeVar, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from megatron_bai.data.arithmetic_text import is_correct
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError

P = TypeVar("P", bound=Hashable)


class GeneratedTask(ABC, Generic[P]):
    """A `Task` whose problems are drawn by a program, each from a generator of its own.

    Args:
        eval_size: prompts of the split `eval`.
        stream: name of the supervised texts' random stream.
        tokenizer: of the task.
        end_tokens: others than the tokenizer's that end a response.
    """

    enlarged_by = ""  # the setting by which the task has more and longer problems

    def __init__(
        self, eval_size: int, stream: str, tokenizer: PreTrainedTokenizerFast, end_tokens: Collection[int] = ()
    ):
        self.tokenizer = tokenizer
        self.end_tokens = frozenset((cast(int, tokenizer.eos_token_id), *end_tokens))
        self.eval_size = eval_size
        self._stream = stream
        self._text_ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) - self.end_tokens

    @abstractmethod
    def draw(self, rng: Random, held_out: bool) -> P:
        """Draw a problem of a split.

        Args:
            rng: the only source of randomness.
            held_out: the split, True for eval.
        """

    @abstractmethod
    def largest(self) -> P:
        """Return a problem with the longest prompt."""

    @abstractmethod
    def make_prompt(self, problem: P) -> Prompt:
        """Return the prompt of a problem, with its answer."""

    @abstractmethod
    def draw_document(self, rng: Random) -> list[tuple[str, bool]]:
        """Draw a supervised text in parts, each tokenised alone, with whether its tokens are targets."""

    @abstractmethod
    def describe_largest(self) -> str:
        """Return in words, with the setting, what `largest` is."""

    def require_room(self, max_tokens: int) -> None:
        """Refuse problems of which one could be longer than a prompt may be.

        Args:
            max_tokens: of a prompt.

        Raises:
            UserError: names the settings.
        """
        longest = len(self.make_prompt(self.largest()).ids)
        if longest > max_tokens:
            raise UserError(
                f"a prompt of {self.describe_largest()} has {longest} tokens, and "
                f"{max(max_tokens, 0)} fit beside the response: lower it or rollout.max_new_tokens, or raise what "
                "bounds both (rollout.max_total_tokens, trainer.tokens_per_micro_batch, model.max_position_embeddings)"
            )

    def prompts(self, split: str, seed: int, start: int, count: int) -> list[Prompt]:
        """Return prompts `[start, start + count)` of a split.

        `train` is an endless stream. `eval` has `eval_size` prompts, all different and none ever trained on.

        Args:
            split: `train` or `eval`.
            seed: of the run. Both splits depend on it.
            start: index of the first prompt, from 0.
            count: number of prompts.

        Raises:
            UserError: the eval split has fewer prompts than asked for, or there is no such split.
        """
        if split == "train":
            drawn = [self.draw(Random(f"train/{seed}/{i}"), held_out=False) for i in range(start, start + count)]
        elif split == "eval":
            drawn = self._eval_problems(seed)[start : start + count]
        else:
            raise UserError(f"there is no data split {split!r}: use train or eval")
        if len(drawn) < count:
            raise UserError(
                f"there are no eval prompts {start} to {start + count}: raise data.eval_prompts, or "
                f"{self.enlarged_by} where the task has no more problems"
            )
        return [self.make_prompt(problem) for problem in drawn]

    def _eval_problems(self, seed: int) -> list[P]:
        rng = Random(f"eval/{seed}")
        problems: dict[P, None] = {}
        for _ in range(100 * self.eval_size):  # enough, unless the split is smaller than asked for
            if len(problems) == self.eval_size:
                break
            problems.setdefault(self.draw(rng, held_out=True))
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
        tokens = np.full((rows, length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((rows, length), dtype=np.float32)
        for row in range(rows):
            rng, end = Random(f"{self._stream}/{seed}/{step}/{row}"), 0
            while True:
                ids, targets = self._encode(self.draw_document(rng))
                if end + len(ids) > length:
                    break
                tokens[row, end : end + len(ids)] = ids
                mask[row, end : end + len(ids)] = targets
                end += len(ids)
            if end == 0:
                raise UserError(f"a row of {length} tokens is too short for a document of {len(ids)}: lengthen it")
        mask[:, 0] = 0.0
        return tokens, mask

    def _encode(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[float]]:
        """Return the ids of a document's parts, and which of them are targets."""
        ids: list[int] = []
        targets: list[float] = []
        for text, is_target in parts:
            body = text.removesuffix(cast(str, self.tokenizer.eos_token))
            encoded = self.tokenizer.encode(body) + [cast(int, self.tokenizer.eos_token_id)] * (body != text)
            ids += encoded
            targets += [float(is_target)] * len(encoded)
        return ids, targets
