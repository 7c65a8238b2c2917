"""The score of a reward model that SGLang 0.5.21 serves.

Started with `--is-embedding` on a sequence-classification or reward checkpoint, it answers POST /classify with
`{"text": …}` or `{"input_ids": […]}` by `{"embedding": [one number a label], "meta_info": {…}}`: the outputs of the
model's head at the last token, without a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Item, Reward, SampleScorer, Score, Scorer
from megatron_bai.workers.outcomes import make_completed_future, map_future

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


@contextmanager
def _open(settings: config.RewardModel, task: Task, log: Path) -> Iterator[Scorer]:
    from megatron_bai.rollout import http_client, http_thread
    from megatron_bai.rollout.servers import control

    url = settings.url.rstrip("/")
    if control.get(url, "/model_info").get("is_generation") is not False:
        raise UserError(
            f"reward.url={url} serves a model that generates: start SGLang on a reward model, --is-embedding"
        )
    body = _make_body(settings)
    limits = http_client.RequestLimits(
        settings.concurrency, settings.request_timeout_s, settings.retries, "reward.request_timeout_s"
    )

    def make_request(item: Item) -> http_client.HttpRequest[float]:
        return http_client.HttpRequest(0, body(item), lambda reply: parse_reward(reply, settings.label))

    def checked(item: Item) -> float:
        return settings.check * task.reward(item.prompt, item.ids) if settings.check else 0.0

    with http_thread.PostingThread([url], "/classify", limits) as thread:

        def submit(item: Item) -> Future[Score]:
            added = checked(item)
            try:
                request = make_request(item)
            except ValueError as error:
                return make_completed_future(Score(None, str(error)))
            return map_future(thread.submit(request), lambda result: make_score(result, added))

        yield SampleScorer(submit)


def make_score(result: float | UserError, added: float) -> Score:
    """Return the score of a request's result.

    Args:
        result: the model's reward, or why there is none.
        added: to the reward.
    """
    return Score(None, str(result)) if isinstance(result, UserError) else Score(result + added)


def parse_reward(reply: Any, label: int | None) -> float:
    """Return the reward in a reply's JSON.

    Args:
        reply: decoded JSON of `/classify`.
        label: index of the model's output; None for a model with one output.

    Raises:
        ValueError: it is not SGLang's, or not a finite number.
        UserError: `label` is not the index of an output, or None and the model has not exactly one.
    """
    try:
        outputs = reply["embedding"]
        count = len(outputs)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the reply is not SGLang's: {type(error).__name__} {error}") from error
    if label is None and count != 1 or label is not None and not 0 <= label < count:
        raise UserError(f"the reward model has {count} outputs: choose one with reward.label, from 0 to {count - 1}")
    value = outputs[label or 0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the reward {value!r} is not a finite number")
    return float(value)


def _make_body(settings: config.RewardModel) -> Callable[[Item], dict[str, Any]]:
    """Return a function that makes the request's JSON of an item; it raises a ValueError for one that has none."""
    if settings.send == "text":
        return lambda item: {"text": item.prompt.text + item.response}
    if settings.send == "ids":
        return lambda item: {"input_ids": [*item.prompt.ids, *item.ids]}
    from transformers import PreTrainedTokenizerFast

    from megatron_bai.checkpoint.carried_files import require_tokenizer

    try:
        require_tokenizer(settings.tokenizer)
    except UserError as error:
        raise UserError(f"reward.tokenizer: {error}") from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.tokenizer, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"reward.tokenizer={settings.tokenizer} cannot be read: {error}") from None
    if not tokenizer.chat_template:
        raise UserError(f"reward.tokenizer={settings.tokenizer} has no chat template: send text or ids")

    def chat(item: Item) -> dict[str, Any]:
        if not item.prompt.messages:
            raise UserError("reward.send=chat needs prompts that are chats: data=dataset with data.chat_template=true")
        turn = {"role": "assistant", "content": item.response}
        messages = list(item.messages) or [*item.prompt.messages, turn]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # the template's own: Jinja's and whatever it raises
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"reward.tokenizer's chat template refuses messages of {roles}: {error}") from None
        return {"input_ids": tokenizer.encode(text, add_special_tokens=False)}

    return chat


def _check(settings: config.RewardModel) -> None:
    from megatron_bai.distributed.hosts import is_loopback_url  # a worker of another reward would import torch with it

    parts = urlsplit(settings.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"reward.url is {settings.url!r}: give the address of a server, http://127.0.0.1:30000")
    if not settings.remote and not is_loopback_url(settings.url):
        raise UserError(
            f"reward.url={settings.url} is another machine's: prompts and responses would leave this one; allow it "
            "with reward.remote=true"
        )
    if (settings.send == "chat") != bool(settings.tokenizer):
        raise UserError("reward.tokenizer and reward.send=chat belong together: set both or neither")


REWARD = Reward(config.RewardModel, _open, _check)
