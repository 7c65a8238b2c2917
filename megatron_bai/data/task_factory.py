"""Make the task that the settings choose: the generated arithmetic task, or rows on local disk (docs/data.md)."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_bai import config
from megatron_bai.data import arithmetic_text, dataset_task, tools_text
from megatron_bai.data.arithmetic_task import ArithmeticTask
from megatron_bai.data.dataset_task import DatasetTask
from megatron_bai.data.task import Task
from megatron_bai.data.tools_task import ToolsTask
from megatron_bai.errors import UserError

_KINDS = {kind.name: kind for kind in (config.Arithmetic, config.Tools, config.Dataset)}


def validate_data(data: config.Data, supervised: bool, init: str) -> None:
    """Refuse settings that contradict each other, before any work.

    Args:
        data: the settings.
        supervised: whether it is for supervised training.
        init: the checkpoint that the run starts from.

    Raises:
        UserError: names the settings.
    """
    if data.name not in _KINDS:
        raise UserError(f"data.name is {data.name!r}: choose one of {', '.join(_KINDS)}")
    if type(data) is not _KINDS[data.name]:
        raise UserError(f"data.name is {data.name!r}, but the settings are another's: choose with data={data.name}")
    if isinstance(data, config.Arithmetic):
        arithmetic_text.validate_arithmetic(data)
        return
    if isinstance(data, config.Tools):
        tools_text.validate_tools(data)
        return
    dataset_task.validate_dataset(data, supervised)
    if not init:
        raise UserError(
            "data=dataset takes the tokenizer of the initial checkpoint: choose init=checkpoint or init=merge"
        )


def make_task(
    data: config.Data,
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    supervised: bool,
    log: Callable[[str], None],
    end_tokens: Collection[int] = (),
) -> Task:
    """Make the task that the settings choose.

    Args:
        data: the settings, which `validate_data` has accepted.
        tokenizer: of the model. Without a padding token it is given its end token for one, for rows on disk.
        max_tokens: tokens that fit: of a prompt, or where `supervised` of prompt, response and end token together.
        supervised: whether the rows have responses, for supervised training, in place of answers.
        log: prints what was left out.
        end_tokens: others than the tokenizer's that end a response.

    Raises:
        UserError: the tokenizer has no end token, or as `ArithmeticTask` and `DatasetTask`.
    """
    if isinstance(data, config.Arithmetic | config.Tools):
        task: ToolsTask | ArithmeticTask
        if isinstance(data, config.Tools):
            task = ToolsTask(data, tokenizer, end_tokens)
        else:
            task = ArithmeticTask(data, tokenizer, end_tokens)
        if not supervised:
            task.require_room(max_tokens)
        return task
    assert isinstance(data, config.Dataset), "`validate_data` refuses others"
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end token (eos_token): a response would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # what stands in padding is never looked at
    return DatasetTask(data, tokenizer, max_tokens, supervised, log, end_tokens)


def describe_data(data: config.Data) -> dict[str, Any]:
    """Return the settings with the SHA-256 of files they name: equal means the same prompts and texts."""
    described = asdict(data)
    for name in ("train", "eval"):
        if path := getattr(data, name, ""):
            described[f"{name}_sha256"] = _sha256(Path(path))
    return described


def _sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, or of the names and contents of all files of a directory."""
    found = hashlib.sha256()
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if each.is_file():
            found.update(str(each.relative_to(path)).encode() + b"\0")
            with open(each, "rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
    return found.hexdigest()
