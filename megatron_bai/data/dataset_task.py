"""The task of rows on local disk: chats or texts with answers for rollouts, or with responses to learn."""

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Dataset
from megatron_bai.config.limits import validate_group
from megatron_bai.data import answers
from megatron_bai.data.plain_values import find_half_surrogate, make_plain
from megatron_bai.data.row_texts import RowTexts
from megatron_bai.data.rows import Rows, open_rows
from megatron_bai.data.shuffle import shuffled_index
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError

_TOKENIZER_BATCH = 1024  # prompts in one call of the tokenizer
_HASH_BYTES = 16


def validate_dataset(data: Dataset, supervised: bool) -> None:
    """Refuse settings that contradict each other, naming the key.

    Args:
        data: the settings.
        supervised: whether the rows are for supervised training.
    """
    validate_group("data", data)
    if not data.train:
        raise UserError("data.train is empty: name a .jsonl or .parquet file, or a directory of datasets.save_to_disk")
    for name in ("prompt", "response") if supervised else ("prompt",):
        if not getattr(data, name):
            raise UserError(f"data.{name} is empty: name the column that holds the {name}")
    if not data.eval and not data.hold_out:
        raise UserError("data.hold_out is 0: a share above 0 is held out, unless data.eval names a file")
    if not data.chat_template and (data.system or data.template_options):
        raise UserError("data.system and data.template_options are never read with data.chat_template=false")
    for name in ("prompt", "answer", "response", "system", "template_options"):
        value = getattr(data, name)
        if (text := find_half_surrogate(value)) is not None:
            raise UserError(f"data.{name} has {ascii(text[:60])}, which is no text that can be encoded: write it anew")


class DatasetTask:
    """Rows as a `Task`.

    At the start every row is read once: one that is malformed is named and stops the run; those that are too long are
    left out, and so are train rows whose prompt is one of the eval split.

    Args:
        max_tokens: tokens that fit: of a prompt, or where `supervised` of prompt, response and end token together.
        supervised: the rows have responses, for supervised training, in place of answers.
        log: prints what was left out.
        end_tokens: others than the tokenizer's that end a response.

    Raises:
        UserError: names the file, and the line where one is at fault.
    """

    def __init__(
        self,
        data: Dataset,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        supervised: bool = False,
        log: Callable[[str], None] = print,
        end_tokens: Collection[int] = (),
    ):
        validate_dataset(data, supervised)
        self.data, self.tokenizer = data, tokenizer
        self.end_tokens = frozenset((cast(int, tokenizer.eos_token_id), *end_tokens))
        self._max_tokens, self._supervised, self._log = max_tokens, supervised, log
        self._texts = RowTexts(data, tokenizer)
        self._train = open_rows(data.train, "data.train")
        self._eval = open_rows(data.eval, "data.eval") if data.eval else self._train
        held_out: dict[bytes, int] = {}  # rows by prompt: one that stands twice is evaluated once
        if data.eval:
            for _, text, row_index in self._iter_usable_rows(self._eval, "data.eval"):
                held_out.setdefault(text, row_index)
        row_indices, texts = array("q"), bytearray()
        for key, text, row_index in self._iter_usable_rows(self._train, "data.train"):
            if not data.eval and int.from_bytes(key[:8], "big") < data.hold_out * 2**64:
                held_out.setdefault(text, row_index)
            else:
                row_indices.append(row_index)
                texts += text
        # Only now: one prompt may stand as a text and as messages, with nulls or without, and have two hashes.
        shown = (bytes(texts[i : i + _HASH_BYTES]) in held_out for i in range(0, len(texts), _HASH_BYTES))
        self._train_order = array("q", (row for row, held in zip(row_indices, shown, strict=True) if not held))
        self._eval_order = array("q", held_out.values())
        self.eval_size = data.eval_prompts or len(self._eval_order)
        if not self._train_order or not (self._eval_order or supervised):
            raise UserError(
                f"data.train={data.train} leaves {len(self._train_order)} rows to train on and {len(self._eval_order)} "
                f"held out: give more rows, or change data.eval, data.hold_out or {self._limit()[1]}"
            )

    def prompts(self, split: str, seed: int, start: int, count: int) -> list[Prompt]:
        """Return prompts as `Task.prompts` does: train rows in another order each epoch, eval rows in the file's.

        Args:
            split: `train` or `eval`.
            seed: of the run. It decides the order of train rows in each epoch; eval prompts do not depend on it.
            start: index of the first prompt, from 0.
            count: number of prompts.

        Raises:
            UserError: fewer prompts are held out than asked for, or there is no such split.
        """
        if split == "train":
            return [self._prompt(self._train, self._row_index(seed, i)) for i in range(start, start + count)]
        if split != "eval":
            raise UserError(f"there is no data split {split!r}: use train or eval")
        if start + count > len(self._eval_order):
            source = "data.eval has" if self.data.eval else "data.hold_out holds out"
            raise UserError(
                f"data.eval_prompts is {self.data.eval_prompts}, and {source} only {len(self._eval_order)} prompts: "
                f"data.eval_prompts=0 takes all{'' if self.data.eval else ', a larger data.hold_out gives more'}"
            )
        return [self._prompt(self._eval, row_index) for row_index in self._eval_order[start : start + count]]

    def reward(self, prompt: Prompt, response_ids: Sequence[int]) -> float:
        """Return 1.0 where a response ended and its final answer is the row's, as `answers` finds and compares it.

        Args:
            prompt: what was asked, with the row's answer.
            response_ids: token ids of the response; 0.0 if they do not end with an end token, or are empty.
        """
        *body, end = map(int, response_ids) if len(response_ids) else [-1]
        if end not in self.end_tokens or not self.end_tokens.isdisjoint(body):
            return 0.0
        return float(answers.is_correct_answer(cast(str, self.tokenizer.decode(body)), prompt.answer))

    def has_check(self, prompt: Prompt) -> bool:
        """Return whether the row has an answer, and one that texts can be compared with: no program, no test cases."""
        return answers.reference_answer(prompt.answer) is not None

    def supervised_batch(self, seed: int, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch as `Task.supervised_batch` does: one document a row, so that none attends to another.

        Args:
            seed: of the run. It decides the order of rows in each epoch.
            step: index of the step, from 0.
            rows: B.
            length: T, at least the `max_tokens` of this task, which no document exceeds.

        Returns:
            Tokens `[B, T]` int64, and the loss mask `[B, T]` float32, 1 for the response and its end token,
            else 0.
        """
        tokens = np.full((rows, length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((rows, length), dtype=np.float32)
        for line in range(rows):
            row_index = self._row_index(seed, step * rows + line)
            row, location = self._train[row_index], self._train.location(row_index)
            prompt = self._texts.encode([self._texts.text(row, location)])[0]
            response = self._texts.response(row, location)
            end = len(prompt) + len(response)
            tokens[line, :end] = prompt + response
            mask[line, len(prompt) : end] = 1.0
        mask[:, 0] = 0.0
        return tokens, mask

    def _row_index(self, seed: int, position: int) -> int:
        """Return the index of the row at a position of the train stream."""
        return self._train_order[shuffled_index(position, len(self._train_order), f"train/{seed}")]

    def _iter_usable_rows(self, rows: Rows, setting: str) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield hashes of the prompt's column and of its text, and the index, of each row that is short enough."""
        (limit, change), left_out = self._limit(), 0
        for first in range(0, len(rows), _TOKENIZER_BATCH):
            row_indices = range(first, min(first + _TOKENIZER_BATCH, len(rows)))
            keys, texts, more = [], [], []
            for row_index in row_indices:
                row, location = rows[row_index], rows.location(row_index)
                asked = json.dumps(self._texts.prompt(row, location), sort_keys=True)
                keys.append(_hash(asked))
                texts.append(self._texts.text(row, location))
                more.append(len(self._texts.response(row, location)) if self._supervised else 0)
                if not self._supervised:
                    self._texts.answer(row, location)
            for row_index, key, text, ids, rest in zip(
                row_indices, keys, texts, self._texts.encode(texts), more, strict=True
            ):
                if len(ids) + rest > limit:
                    left_out += 1
                else:
                    yield key, _hash(text), row_index
        if left_out:
            what = "prompt and response have" if self._supervised else "prompt has"
            reason = f"their {what} more than {limit} tokens ({change})"
            self._log(f"{setting}: {left_out} of {len(rows)} rows are left out, {reason}")

    def _limit(self) -> tuple[int, str]:
        """Return how many tokens a row may have, and the settings that say so."""
        if self._supervised:
            return self._max_tokens, "supervised.length"
        if self.data.max_prompt_tokens <= self._max_tokens:
            return self.data.max_prompt_tokens, "data.max_prompt_tokens"
        return self._max_tokens, "rollout.max_new_tokens, rollout.max_total_tokens or the model's longest sequence"

    def _prompt(self, rows: Rows, row_index: int) -> Prompt:
        row, location, data = rows[row_index], rows.location(row_index), self.data
        text = self._texts.text(row, location)
        named = {name.partition(".")[0] for name in (data.prompt, data.answer)}
        extra = {name: make_plain(value) for name, value in row.items() if name not in named}
        messages = tuple(self._texts.messages(row, location)) if data.chat_template else ()
        answer = self._texts.answer(row, location)
        return Prompt(self._texts.encode([text])[0], text, answer, messages, extra)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
