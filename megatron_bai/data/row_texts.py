"""The texts of a row: prompt, messages, answer and response, as the settings name their columns."""

from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Dataset
from megatron_bai.data import answers
from megatron_bai.data.plain_values import make_plain, require_text
from megatron_bai.data.rows import open_rows
from megatron_bai.errors import UserError

_MISSING = object()


class RowTexts:
    """What the columns of rows say, in the ids of one tokenizer. A UserError names file and line of a row at fault."""

    def __init__(self, data: Dataset, tokenizer: PreTrainedTokenizerFast):
        if data.chat_template and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: add one to it, or set data.chat_template=false")
        self.data, self.tokenizer = data, tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts. A chat template writes the special tokens itself."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.data.chat_template)["input_ids"]
        return ids

    def prompt(self, row: dict[str, Any], location: str) -> Any:
        """Return the prompt's column: a text, or messages as JSON has them.

        Args:
            row: by column.
            location: of the row, for messages.
        """
        return _get_text(row, self.data.prompt, location)

    def text(self, row: dict[str, Any], location: str) -> str:
        """Return the prompt as the model reads it, chat markers included.

        Args:
            row: by column.
            location: of the row, for messages.
        """
        if not self.data.chat_template:
            text = self.prompt(row, location)
            if not isinstance(text, str) or not text:
                raise UserError(f"{location}: {self.data.prompt!r} must be a text with data.chat_template=false")
            return text
        try:
            rendered = self.tokenizer.apply_chat_template(
                self.messages(row, location), tokenize=False, add_generation_prompt=True, **self.data.template_options
            )
            return cast(str, rendered)
        except UserError:
            raise
        except Exception as error:  # the template's own: Jinja's and whatever it raises
            raise UserError(f"{location}: the tokenizer's chat template refuses this prompt: {error}") from None

    def messages(self, row: dict[str, Any], location: str) -> list[dict[str, str]]:
        """Return the prompt as a chat, whose last message is the one to be answered.

        Args:
            row: by column.
            location: of the row, for messages.
        """
        name, system = self.data.prompt, self.data.system
        found = self.prompt(row, location)
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise UserError(
                f"{location}: {name!r} must be a text or a list of messages with a text as role and content"
            )
        # Columns fill what a message lacks with nulls, which a template would take for something that is there.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if messages[-1]["role"] == "assistant":
            raise UserError(
                f"{location}: {name!r} ends with the assistant's message: end it with the one to be answered"
            )
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def answer(self, row: dict[str, Any], location: str) -> str:
        """Return what a reward compares with; "" where the rows have none.

        Args:
            row: by column.
            location: of the row, for messages.
        """
        if not self.data.answer:
            return ""
        answer = _get_column(row, self.data.answer, location)
        try:
            require_text(answer)
            if not isinstance(answer, Decimal | date | time):
                answer = make_plain(answer)
            return answers.format_answer(answer)
        except ValueError as error:
            raise UserError(f"{location}: {self.data.answer!r} must be a text or a number: {error}") from None

    def response(self, row: dict[str, Any], location: str) -> list[int]:
        """Return the token ids of the response, the end token last.

        Args:
            row: by column.
            location: of the row, for messages.
        """
        text = _get_text(row, self.data.response, location)
        if not isinstance(text, str) or not text:
            raise UserError(f"{location}: {self.data.response!r} must be a text, and not an empty one")
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def read_texts(
    path: str, setting: str, data: Dataset, tokenizer: PreTrainedTokenizerFast, count: int
) -> Sequence[list[int]]:
    """Return the token ids of the first rows: of the prompt, and of the response where a row has one.

    Args:
        path: of the rows.
        setting: name of the setting that gave the path, for messages.
        data: names the columns; longer texts are cut to its `max_prompt_tokens`.
        tokenizer: of the model.
        count: rows at most.

    Raises:
        UserError: a row without a usable prompt, or with a response that is no text; with file and line.
    """
    rows, texts = open_rows(path, setting), RowTexts(data, tokenizer)
    found = []
    for index in range(min(count, len(rows))):
        row, location = rows[index], rows.location(index)
        ids = texts.encode([texts.text(row, location)])[0]
        if row.get(data.response) is not None:
            ids = [*ids, *texts.response(row, location)]
        found.append(ids[: data.max_prompt_tokens])
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _get_text(row: dict[str, Any], name: str, location: str) -> Any:
    """Return a text, or messages, of a column as JSON has them."""
    found = _get_column(row, name, location)
    try:
        require_text(found)
    except ValueError as error:
        raise UserError(f"{location}: {name!r} has {error}") from None
    return make_plain(found)


def _get_column(row: dict[str, Any], name: str, location: str) -> Any:
    """Return a column, or with dots a field of one."""
    found: Any = row.get(name, _MISSING)
    if found is _MISSING:
        found = row
        for part in name.split("."):
            found = found.get(part, _MISSING) if isinstance(found, dict) else _MISSING
    if found is None:
        raise UserError(f"{location}: {name!r} is null")
    if found is _MISSING:
        raise UserError(f"{location}: there is no {name!r}, only {', '.join(map(repr, row))}")
    return found
