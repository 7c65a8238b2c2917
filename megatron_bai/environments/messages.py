"""A sample as messages: the prompt's, and in order the model's turns and the replies to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bai.environments.environment import Conversation

if TYPE_CHECKING:
    from megatron_bai.data.task import Prompt, Task
    from megatron_bai.rollout.sample import Sample


def make_conversation(task: Task, prompt: Prompt, sample: Sample) -> Conversation:
    """Return the conversation of a sample, whose last turn has ended or was cut off.

    Args:
        task: whose tokenizer decodes turns.
        prompt: the sample's. One that was no chat is a user's message.
        sample: of that prompt.
    """
    state = sample.turns[-2].state if len(sample.turns) > 1 else None
    messages = conversation_messages(task, prompt, sample)
    return Conversation(messages, prompt.answer, prompt.extra, state, len(sample.turns))


def conversation_messages(task: Task, prompt: Prompt, sample: Sample) -> tuple[dict[str, str], ...]:
    """Return the prompt's messages, and in order the turns of a sample and the replies to them.

    Args:
        task: as in `make_conversation`.
        prompt: likewise.
        sample: likewise; without turns its response is one.
    """
    messages = [*(prompt.messages or ({"role": "user", "content": prompt.text},))]
    response = sample.response.tolist()
    for turn in sample.turns:
        messages.append({"role": "assistant", "content": _decode_turn(task, response[turn.start : turn.end])})
        messages += turn.messages
    if not sample.turns:
        messages.append({"role": "assistant", "content": _decode_turn(task, response)})
    return tuple(messages)


def _decode_turn(task: Task, ids: list[int]) -> str:
    """Return the text of a turn, without the end token."""
    text = str(task.tokenizer.decode(ids[:-1] if ids and ids[-1] in task.end_tokens else ids))
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
