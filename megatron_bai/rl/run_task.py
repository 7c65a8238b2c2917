"""The task of a run with its tokenizer: what `train` makes at its start, and `plan` to refuse the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bai import config
from megatron_bai.checkpoint.carried_files import read_end_tokens, require_tokenizer
from megatron_bai.data import task_factory
from megatron_bai.data.task import Task
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.data.vocabulary import validate_vocabulary
from megatron_bai.environments.chat_template import make_chat_template
from megatron_bai.errors import UserError
from megatron_bai.rl import objectives
from megatron_bai.rollout.client import max_request_tokens
from megatron_bai.rollout.sampling_params import needs_tokenizer, servers_end_tokens


def make_task(settings: config.Config, tokenizer_dir: Path, log: Callable[[str], None]) -> Task:
    """Make the task, whose prompts leave room for a response, with the tokenizer of a directory.

    Args:
        settings: of the run.
        tokenizer_dir: of a checkpoint, or of the tokenizer alone.
        log: prints which rows were left out.

    Raises:
        UserError: the tokenizer or rows cannot be used, or fewer prompts are held out than are to be evaluated.
    """
    return _make_task(settings, load_tokenizer(tokenizer_dir), tokenizer_dir, log)


def make_generated_task(settings: config.Config, data: config.Generated) -> Task:
    """Make the generated task with the tokenizer that a run from random weights builds for it.

    Args:
        settings: of the run.
        data: its settings `data`.

    Raises:
        UserError: as `make_task`.
    """
    tokenizer = build_tokenizer(data, settings.model.vocab_size)
    return _make_task(settings, tokenizer, Path(settings.run.dir) / "tokenizer", lambda line: None)


def _make_task(settings: config.Config, tokenizer: Any, tokenizer_dir: Path, log: Callable[[str], None]) -> Task:
    """Make the task; `tokenizer_dir` is named in errors, and says which tokens end a response."""
    supervised = not objectives.get(settings.objective.name).rollouts
    longest = max_request_tokens(settings.rollout, settings.model.max_position_embeddings)
    row = settings.trainer.tokens_per_micro_batch
    length = (min(longest, row) if row else longest) - settings.rollout.max_new_tokens
    if supervised:
        length = settings.supervised.length
    validate_vocabulary(tokenizer, settings.model.vocab_size, tokenizer_dir)
    ends = [token for token in read_end_tokens(tokenizer_dir) if token < settings.model.vocab_size]
    ends += list(settings.rollout.stop_token_ids)
    if needs_tokenizer(settings.rollout):
        ends += servers_end_tokens(tokenizer.get_added_vocab())
    task = task_factory.make_task(settings.data, tokenizer, length, supervised, log, ends)
    if not supervised and isinstance(settings.env, config.PerTurn):
        make_chat_template(settings.env, settings.data, task)  # refused before models are built
    if not supervised and settings.trainer.eval_every and task.eval_size:
        task.prompts("eval", settings.run.seed, task.eval_size - 1, 1)  # refused before a server is started
    return task


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a checkpoint."""
    from transformers import PreTrainedTokenizerFast

    require_tokenizer(directory)
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from None
