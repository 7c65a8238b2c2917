"""Replies to the turns of samples: the environment's words, asked in its processes, in the model's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_bai import config
from megatron_bai.environments import resolve_environment
from megatron_bai.environments.chat_template import ChatTemplate, make_chat_template
from megatron_bai.environments.environment import parse_reply
from megatron_bai.environments.messages import make_conversation
from megatron_bai.environments.worker_target import make_target
from megatron_bai.rollout.turns import TurnReply
from megatron_bai.workers.outcomes import Outcome
from megatron_bai.workers.pool import WorkerPool

if TYPE_CHECKING:
    from megatron_bai.data.task import Prompt, Task
    from megatron_bai.rollout.sample import Sample


Submit: TypeAlias = Callable[[list[Any]], "Future[Outcome]"]


class EnvironmentPool:
    """An environment's processes with what its replies become tokens by.

    Args:
        submit: calls the environment with a conversation's JSON in one of its processes.
        settings: of the environment.
        task: whose tokenizer decodes turns and encodes replies.
        template: of its chats.
    """

    def __init__(self, submit: Submit, settings: config.PerTurn, task: Task, template: ChatTemplate):
        self.submit, self.settings, self.task, self.template = submit, settings, task, template

    def for_prompts(self, prompts: Sequence[Prompt]) -> Responder:
        """Return what replies to samples of these prompts.

        Args:
            prompts: indexed by `Sample.prompt_index`.
        """
        return Responder(self, prompts)


class Responder:
    """Replies to samples of some prompts: a `rollout.turns.TurnEnvironment`."""

    def __init__(self, pool: EnvironmentPool, prompts: Sequence[Prompt]):
        settings = pool.settings
        self.max_turns, self.max_turn_tokens = settings.max_turns, settings.max_turn_tokens
        self.max_reply_tokens = settings.max_reply_tokens
        self._pool, self._prompts = pool, prompts

    async def respond(self, sample: Sample) -> TurnReply:
        """Reply to the sample's last turn; with a failure where the environment has one, or its reply is none."""
        pool, prompt = self._pool, self._prompts[sample.prompt_index]
        conversation = make_conversation(pool.task, prompt, sample)
        outcome = await asyncio.wrap_future(pool.submit([conversation.to_json()]))
        try:
            if outcome.failure:
                raise ValueError(outcome.failure)
            reply = parse_reply(outcome.value)
            last = int(sample.tokens[-1])
            ids = pool.template.encode_reply(reply.messages, last) if reply.messages and not reply.done else []
        except ValueError as error:
            name, text = pool.settings.name, prompt.text[-60:]
            return TurnReply(failure=f"env={name} in turn {len(sample.turns)}: {error} (prompt {ascii(text)})")
        return TurnReply(tuple(ids), reply.messages, reply.done, reply.reward, reply.state)


@contextmanager
def open_environment(
    settings: config.Env, data: config.Data, task: Task, log: Path
) -> Iterator[EnvironmentPool | None]:
    """Open the environment's processes for the time of the block; None with `env=none`.

    Args:
        settings: of the environment.
        data: of the prompts.
        task: their source.
        log: a file for what the environment prints.

    Raises:
        UserError: it cannot be started, or the tokenizer's chat template cannot be used.
    """
    kind = resolve_environment(settings)
    if kind is None:
        yield None
        return
    assert isinstance(settings, config.PerTurn), "`EnvironmentKind.settings` is one"
    kind.require(settings)
    name = kind.target if isinstance(kind.target, str) else kind.target(settings)
    template = make_chat_template(settings, data, task)
    with WorkerPool(make_target(name, asdict(settings)), settings.workers, settings.timeout_s, log) as pool:
        yield EnvironmentPool(pool.submit, settings, task, template)
