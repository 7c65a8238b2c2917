"""A task of rows on local disk: chats or texts with answers, for rollouts, or with responses, to be learned."""

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
from megatron_bai.data.shuffle import at
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError

_AT_ONCE = 1024  # prompts in one call of the tokenizer
_ABSENT = object()


def validate(data: Dataset, learned: bool) -> None:
    """Refuse settings that cannot be meant, naming the key. `learned`: for supervised training."""
    if not data.train:
        raise UserError("data.train is empty: name a .jsonl or .parquet file, or a directory of datasets.save_to_disk")
    for name in ("prompt", "response") if learned else ("prompt",):
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
        longest: tokens that fit: of a prompt, or where `learned` of prompt, response and end token together.
        learned: the rows have responses, for supervised training, in place of answers.
        say: prints what was left out.

    Raises:
        UserError: names the file, and the line where one is at fault.
    """

    def __init__(
        self,
        data: Dataset,
        tokenizer: PreTrainedTokenizerFast,
        longest: int,
        learned: bool = False,
        say: Callable[[str], None] = print,
    ):
        validate(data, learned)
        self.data, self.tokenizer = data, tokenizer
        self._longest, self._learned, self._say = longest, learned, say
        if data.chat_template and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: add one to it, or set data.chat_template=false")
        self._train = open_rows(data.train, "data.train")
        self._eval = open_rows(data.eval, "data.eval") if data.eval else self._train
        held_out: dict[bytes, int] = {}  # rows by prompt: one that stands twice is evaluated once
        if data.eval:
            for key, number in self._usable(self._eval, "data.eval"):
                held_out.setdefault(key, number)
        self._train_order = array("q")
        for key, number in self._usable(self._train, "data.train"):
            if not data.eval and int.from_bytes(key[:8], "big") < data.hold_out * 2**64:
                held_out.setdefault(key, number)
            elif key not in held_out:
                self._train_order.append(number)
        self._eval_order = array("q", held_out.values())
        self.eval_size = data.eval_prompts or len(self._eval_order)
        if not self._train_order or not (self._eval_order or learned):
            raise UserError(
                f"data.train={data.train} leaves {len(self._train_order)} rows to train on and {len(self._eval_order)} "
                "held out: give more rows, or change data.eval, data.hold_out or data.max_prompt_tokens"
            )

    def prompts(self, split: str, seed: int, start: int, count: int) -> list[Prompt]:
        """As `Task.prompts`: train rows in another order each epoch, eval rows as they stand in the file."""
        if split == "train":
            return [self._prompt(self._train, self._number(seed, i)) for i in range(start, start + count)]
        if split != "eval":
            raise UserError(f"there is no data split {split!r}: use train or eval")
        if start + count > len(self._eval_order):
            raise UserError(
                f"data.eval_prompts is {self.data.eval_prompts}, but only {len(self._eval_order)} prompts are held out: "
                "lower it (0 takes all), or raise data.hold_out"
            )
        return [self._prompt(self._eval, number) for number in self._eval_order[start : start + count]]

    def reward(self, prompt: Prompt, response_ids: Sequence[int]) -> float:
        """1.0 where the final answer is the row's, as `answers` finds and normalises it; the response must have ended."""
        *body, end = map(int, response_ids) if len(response_ids) else [-1]
        if end != self.tokenizer.eos_token_id:
            return 0.0
        found = answers.normalised(answers.final(cast(str, self.tokenizer.decode(body))))
        return float(found != "" and found == answers.normalised(prompt.answer))

    def supervised(self, seed: int, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Task.supervised`: one document a row, so that none attends to another; its response is learned."""
        tokens = np.full((rows, length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((rows, length), dtype=np.float32)
        for line in range(rows):
            number = self._number(seed, step * rows + line)
            row, where = self._train[number], self._train.where(number)
            prompt, response = self._encode([self._text(row, where)])[0], self._response(row, where)
            end = len(prompt) + len(response)
            tokens[line, :end] = prompt + response
            mask[line, len(prompt) : end] = 1.0
        mask[:, 0] = 0.0
        return tokens, mask

    def _number(self, seed: int, position: int) -> int:
        """The row at a position of the train stream."""
        return self._train_order[at(position, len(self._train_order), f"train/{seed}")]

    def _usable(self, rows: Rows, setting: str) -> Iterator[tuple[bytes, int]]:
        """A key of the prompt and the row's number, of each row that is short enough."""
        limit = self._longest if self._learned else min(self._longest, self.data.max_prompt_tokens)
        left_out = 0
        for first in range(0, len(rows), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(rows)))
            keys, texts, more = [], [], []
            for number in numbers:
                row, where = rows[number], rows.where(number)
                asked = json.dumps(_column(row, self.data.prompt, where), sort_keys=True)
                keys.append(hashlib.blake2b(asked.encode(), digest_size=16).digest())
                texts.append(self._text(row, where))
                more.append(len(self._response(row, where)) if self._learned else 0)
                if not self._learned:
                    self._answer(row, where)
            for number, key, ids, rest in zip(numbers, keys, self._encode(texts), more, strict=True):
                if len(ids) + rest > limit:
                    left_out += 1
                else:
                    yield key, number
        if left_out:
            what = "prompt and response have" if self._learned else "prompt has"
            self._say(f"{setting}: {left_out} of {len(rows)} rows are left out, their {what} more than {limit} tokens")

    def _prompt(self, rows: Rows, number: int) -> Prompt:
        row, where, data = rows[number], rows.where(number), self.data
        text = self._text(row, where)
        named = {name.partition(".")[0] for name in (data.prompt, data.answer)}
        extra = {name: value for name, value in row.items() if name not in named}
        messages = tuple(self._messages(row, where)) if data.chat_template else ()
        return Prompt(self._encode([text])[0], text, self._answer(row, where), messages, extra)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of prompts. A chat template writes the special tokens itself."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.data.chat_template)["input_ids"]
        return ids

    def _text(self, row: dict[str, Any], where: str) -> str:
        """What the model reads."""
        if not self.data.chat_template:
            text = _column(row, self.data.prompt, where)
            if not isinstance(text, str) or not text:
                raise UserError(f"{where}: {self.data.prompt!r} must be a text with data.chat_template=false")
            return text
        try:
            rendered = self.tokenizer.apply_chat_template(
                self._messages(row, where), tokenize=False, add_generation_prompt=True, **self.data.template_options
            )
            return cast(str, rendered)
        except UserError:
            raise
        except Exception as error:  # the template's own: Jinja's and whatever it raises
            raise UserError(f"{where}: the tokenizer's chat template refuses this prompt: {error}") from None

    def _messages(self, row: dict[str, Any], where: str) -> list[dict[str, str]]:
        name, system = self.data.prompt, self.data.system
        found = _column(row, name, where)
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise UserError(f"{where}: {name!r} must be a text or a list of messages with a text as role and content")
        if messages[-1]["role"] == "assistant":
            raise UserError(f"{where}: {name!r} ends with the assistant's message: end it with the one to be answered")
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def _answer(self, row: dict[str, Any], where: str) -> str:
        if not self.data.answer:
            return ""
        answer = _column(row, self.data.answer, where)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"{where}: {self.data.answer!r} must be a text or a number")
        return str(answer)

    def _response(self, row: dict[str, Any], where: str) -> list[int]:
        """Ids of what is learned, the end token last."""
        text = _column(row, self.data.response, where)
        if not isinstance(text, str) or not text:
            raise UserError(f"{where}: {self.data.response!r} must be a text, and not an empty one")
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    """A column, or with dots a field of one."""
    found: Any = row.get(name, _ABSENT)
    if found is _ABSENT:
        found = row
        for part in name.split("."):
            found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
    if found is _ABSENT or found is None:
        raise UserError(f"{where}: there is no {name!r}, only {', '.join(map(repr, row))}")
    return found
