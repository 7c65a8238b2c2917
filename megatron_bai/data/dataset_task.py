"""The task of rows on local disk: chats or texts with answers for rollouts, or with responses to learn."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Dataset
from megatron_bai.data import answers
from megatron_bai.data.rows import Rows, open_rows
from megatron_bai.data.shuffle import shuffled_index
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError

_TOKENIZER_BATCH = 1024  # prompts in one call of the tokenizer
_MISSING = object()


def validate_dataset(data: Dataset, supervised: bool) -> None:
    """Refuse settings that contradict each other, naming the key.

    Args:
        data: the settings.
        supervised: whether the rows are for supervised training.
    """
    if not data.train:
        raise UserError("data.train is empty: name a .jsonl or .parquet file, or a directory of datasets.save_to_disk")
    for name in ("prompt", "response") if supervised else ("prompt",):
        if not getattr(data, name):
            raise UserError(f"data.{name} is empty: name the column that holds the {name}")
    if not data.eval and not 0 < data.hold_out < 1:
        raise UserError(f"data.hold_out is {data.hold_out:g}: a share between 0 and 1, or name a file in data.eval")
    if data.eval_prompts < 0:
        raise UserError(f"data.eval_prompts is {data.eval_prompts}: it must be at least 0, which takes all")
    if data.max_prompt_tokens < 1:
        raise UserError(f"data.max_prompt_tokens is {data.max_prompt_tokens}: it must be at least 1")
    if not data.chat_template and (data.system or data.template_options):
        raise UserError("data.system and data.template_options are never read with data.chat_template=false")


class DatasetTask:
    """Rows as a `Task`.

    At the start every row is read once: one that is malformed is named and stops the run; those that are too long are
    left out, and so are train rows whose prompt is one of the eval split.

    Args:
        max_tokens: tokens that fit: of a prompt, or where `supervised` of prompt, response and end token together.
        supervised: the rows have responses, for supervised training, in place of answers.
        log: prints what was left out.

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
    ):
        validate_dataset(data, supervised)
        self.data, self.tokenizer = data, tokenizer
        self._max_tokens, self._supervised, self._log = max_tokens, supervised, log
        if data.chat_template and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: add one to it, or set data.chat_template=false")
        self._train = open_rows(data.train, "data.train")
        self._eval = open_rows(data.eval, "data.eval") if data.eval else self._train
        held_out: dict[bytes, int] = {}  # rows by prompt: one that stands twice is evaluated once
        if data.eval:
            for key, row_index in self._iter_usable_rows(self._eval, "data.eval"):
                held_out.setdefault(key, row_index)
        self._train_order = array("q")
        for key, row_index in self._iter_usable_rows(self._train, "data.train"):
            if not data.eval and int.from_bytes(key[:8], "big") < data.hold_out * 2**64:
                held_out.setdefault(key, row_index)
            elif key not in held_out:
                self._train_order.append(row_index)
        self._eval_order = array("q", held_out.values())
        self.eval_size = data.eval_prompts or len(self._eval_order)
        if not self._train_order or not (self._eval_order or supervised):
            raise UserError(
                f"data.train={data.train} leaves {len(self._train_order)} rows to train on and {len(self._eval_order)} "
                "held out: give more rows, or change data.eval, data.hold_out or data.max_prompt_tokens"
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
            raise UserError(
                f"data.eval_prompts is {self.data.eval_prompts}, but only {len(self._eval_order)} prompts are "
                "held out: lower it (0 takes all), or raise data.hold_out"
            )
        return [self._prompt(self._eval, row_index) for row_index in self._eval_order[start : start + count]]

    def reward(self, prompt: Prompt, response_ids: Sequence[int]) -> float:
        """Return 1.0 where a response ended and its final answer is the row's, as `answers` finds and normalises it.

        Args:
            prompt: what was asked, with the row's answer.
            response_ids: token ids of the response; 0.0 if they do not end with the end token, or are empty.
        """
        *body, end = map(int, response_ids) if len(response_ids) else [-1]
        if end != self.tokenizer.eos_token_id:
            return 0.0
        found = answers.normalise_answer(answers.final_answer(cast(str, self.tokenizer.decode(body))))
        return float(found != "" and found == answers.normalise_answer(prompt.answer))

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
            prompt, response = self._encode([self._text(row, location)])[0], self._response(row, location)
            end = len(prompt) + len(response)
            tokens[line, :end] = prompt + response
            mask[line, len(prompt) : end] = 1.0
        mask[:, 0] = 0.0
        return tokens, mask

    def _row_index(self, seed: int, position: int) -> int:
        """Return the index of the row at a position of the train stream."""
        return self._train_order[shuffled_index(position, len(self._train_order), f"train/{seed}")]

    def _iter_usable_rows(self, rows: Rows, setting: str) -> Iterator[tuple[bytes, int]]:
        """Yield a hash of the prompt and the row's index, for each row that is short enough."""
        limit = self._max_tokens if self._supervised else min(self._max_tokens, self.data.max_prompt_tokens)
        left_out = 0
        for first in range(0, len(rows), _TOKENIZER_BATCH):
            row_indices = range(first, min(first + _TOKENIZER_BATCH, len(rows)))
            keys, texts, more = [], [], []
            for row_index in row_indices:
                row, location = rows[row_index], rows.location(row_index)
                asked = json.dumps(_get_column(row, self.data.prompt, location), sort_keys=True)
                keys.append(hashlib.blake2b(asked.encode(), digest_size=16).digest())
                texts.append(self._text(row, location))
                more.append(len(self._response(row, location)) if self._supervised else 0)
                if not self._supervised:
                    self._answer(row, location)
            for row_index, key, ids, rest in zip(row_indices, keys, self._encode(texts), more, strict=True):
                if len(ids) + rest > limit:
                    left_out += 1
                else:
                    yield key, row_index
        if left_out:
            what = "prompt and response have" if self._supervised else "prompt has"
            self._log(f"{setting}: {left_out} of {len(rows)} rows are left out, their {what} more than {limit} tokens")

    def _prompt(self, rows: Rows, row_index: int) -> Prompt:
        row, location, data = rows[row_index], rows.location(row_index), self.data
        text = self._text(row, location)
        named = {name.partition(".")[0] for name in (data.prompt, data.answer)}
        extra = {name: value for name, value in row.items() if name not in named}
        messages = tuple(self._messages(row, location)) if data.chat_template else ()
        return Prompt(self._encode([text])[0], text, self._answer(row, location), messages, extra)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts. A chat template writes the special tokens itself."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.data.chat_template)["input_ids"]
        return ids

    def _text(self, row: dict[str, Any], location: str) -> str:
        """Return the prompt as the model reads it, chat markers included."""
        if not self.data.chat_template:
            text = _get_column(row, self.data.prompt, location)
            if not isinstance(text, str) or not text:
                raise UserError(f"{location}: {self.data.prompt!r} must be a text with data.chat_template=false")
            return text
        try:
            rendered = self.tokenizer.apply_chat_template(
                self._messages(row, location), tokenize=False, add_generation_prompt=True, **self.data.template_options
            )
            return cast(str, rendered)
        except UserError:
            raise
        except Exception as error:  # the template's own: Jinja's and whatever it raises
            raise UserError(f"{location}: the tokenizer's chat template refuses this prompt: {error}") from None

    def _messages(self, row: dict[str, Any], location: str) -> list[dict[str, str]]:
        name, system = self.data.prompt, self.data.system
        found = _get_column(row, name, location)
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise UserError(
                f"{location}: {name!r} must be a text or a list of messages with a text as role and content"
            )
        if messages[-1]["role"] == "assistant":
            raise UserError(
                f"{location}: {name!r} ends with the assistant's message: end it with the one to be answered"
            )
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def _answer(self, row: dict[str, Any], location: str) -> str:
        if not self.data.answer:
            return ""
        answer = _get_column(row, self.data.answer, location)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"{location}: {self.data.answer!r} must be a text or a number")
        return str(answer)

    def _response(self, row: dict[str, Any], location: str) -> list[int]:
        """Return the token ids of the response, the end token last."""
        text = _get_column(row, self.data.response, location)
        if not isinstance(text, str) or not text:
            raise UserError(f"{location}: {self.data.response!r} must be a text, and not an empty one")
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _get_column(row: dict[str, Any], name: str, location: str) -> Any:
    """Return a column, or with dots a field of one."""
    found: Any = row.get(name, _MISSING)
    if found is _MISSING:
        found = row
        for part in name.split("."):
            found = found.get(part, _MISSING) if isinstance(found, dict) else _MISSING
    if found is _MISSING or found is None:
        raise UserError(f"{location}: there is no {name!r}, only {', '.join(map(repr, row))}")
    return found
