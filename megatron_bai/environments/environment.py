"""The types of an environment: what answers a model's turns in a conversation (docs/conversations.md).

Light: a worker process imports this and nothing of the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_bai.data.plain_values import find_half_surrogate

JSON = Any  # what `json` makes: None, bool, int, float, str, and lists and dicts of such
_MESSAGE_KEYS = {"role", "content"}


@dataclass(frozen=True)
class Conversation:
    """A conversation that waits for its environment: the model's turn has just ended.

    Attributes:
        messages: `{"role", "content"}` each: those of the prompt, then in order the model's turns (role `assistant`,
            the text that was sampled without its end token) and the environment's messages.
        answer: what the row compares with; "" where the data has none.
        extra: the row's other columns, JSON.
        state: of the environment's reply before; None at the first.
        num_turns: turns that the model has had.
    """

    messages: tuple[dict[str, str], ...]
    answer: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    state: JSON = None
    num_turns: int = 0

    def to_json(self) -> dict[str, JSON]:
        """Return what `from_json` reads."""
        return {
            "messages": list(self.messages),
            "answer": self.answer,
            "extra": self.extra,
            "state": self.state,
            "num_turns": self.num_turns,
        }

    @staticmethod
    def from_json(values: dict[str, JSON]) -> Conversation:
        """Make a conversation of what `to_json` returned."""
        return Conversation(**(values | {"messages": tuple(values["messages"])}))


@dataclass(frozen=True)
class Reply:
    """What an environment says to the model's last turn.

    Attributes:
        messages: `{"role", "content"}` each, of roles that the model's chat template has: `tool`, `user` …
        done: the conversation ends here. Messages of a reply that ends it are shown, and not in the sample.
        reward: of the turn that has just ended, a finite number; None: none.
        state: JSON that the next call gets with the conversation.
    """

    messages: tuple[dict[str, str], ...] = ()
    done: bool = False
    reward: float | None = None
    state: JSON = None

    def to_json(self) -> dict[str, JSON]:
        """Return what `parse_reply` reads."""
        return {"messages": list(self.messages), "done": self.done, "reward": self.reward, "state": self.state}


class Environment(Protocol):
    """What a user's class has. It is constructed once in each process, with its settings or without arguments.

    A reply is a function of the conversation, its state among it, and of nothing that the process remembers: another
    process may be asked next, and a resumed run asks again.
    """

    def respond(self, conversation: Conversation) -> Reply:
        """Answer the model's last turn.

        Args:
            conversation: so far, the turn included.
        """


def parse_reply(values: JSON) -> Reply:
    """Return the reply in what a process sent, having checked it.

    Args:
        values: as `Reply.to_json` has them; keys that are absent have their defaults.

    Raises:
        ValueError: it is no reply.
    """
    if not isinstance(values, dict) or (unknown := values.keys() - Reply().to_json().keys()):
        raise ValueError("it is no Reply" if not isinstance(values, dict) else f"it has {sorted(map(str, unknown))}")
    messages, done, reward = values.get("messages") or [], values.get("done", False), values.get("reward")
    if not isinstance(messages, list | tuple) or not all(map(_is_message, messages)):
        raise ValueError("its messages are not a list of {'role', 'content'} with a text each")
    if not isinstance(done, bool):
        raise ValueError(f"its done is {done!r:.80}, no bool")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
        raise ValueError(f"its reward is {reward!r:.80}, no number")
    if reward is not None and not abs(reward) <= 3.4e38:
        raise ValueError(f"its reward is {reward!r:.80}, which no float32 holds")
    if not messages and not done:
        raise ValueError("it has no message and is not done: the model would be asked again about nothing")
    return Reply(tuple(messages), done, None if reward is None else float(reward), values.get("state"))


def _is_message(value: JSON) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _MESSAGE_KEYS
        and all(isinstance(value[key], str) for key in _MESSAGE_KEYS)
        and value["role"] not in ("assistant", "")
        and find_half_surrogate(value) is None
    )


def _nothing(settings: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class EnvironmentKind:
    """A kind of environment: `env=NAME`.

    Attributes:
        settings: the dataclass of its settings, a `config.PerTurn`; its `name` is what `env=NAME` chooses.
        target: its class, `module:Class` or `./path.py:Class`, or a function of the settings that returns this. It is
            constructed with the settings as attributes, or without arguments where it takes none.
        check: refuses its settings by name with a `UserError`.
        require: refuses, likewise, a machine that lacks what it needs. `plan` does not ask for it.
        roles: that its messages have; a chat template that does not take one is refused.
    """

    settings: type[Any]
    target: str | Callable[[Any], str]
    check: Callable[[Any], None] = _nothing
    require: Callable[[Any], None] = _nothing
    roles: tuple[str, ...] = ()
