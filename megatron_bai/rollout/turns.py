"""The turns of a conversation in one sample: what the model sampled, and what the environment replied to it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron_bai.rollout.sample import Sample


@dataclass(frozen=True)
class Turn:
    """One turn of the model, and the environment's reply to it.

    Attributes:
        start: first token of the turn, counted from the first of the response.
        end: after its last token.
        ended: whether its last token is an end token; false where a limit cut it off, or other than a token ended it.
        messages: of the reply, `{"role", "content"}` each; empty before it, and where it has none.
        num_reply_tokens: tokens of the reply that follow in the sample: those of the chat template around the messages,
            up to where the next turn begins; 0 where nothing follows.
        reward: of the environment, for this turn; None: none.
        state: JSON of the environment, as of the reply.
        failed: whether the environment had no reply, by a fault of its own; the sample ends there without a reward.
    """

    start: int
    end: int
    ended: bool = True
    messages: tuple[dict[str, str], ...] = ()
    num_reply_tokens: int = 0
    reward: float | None = None
    state: Any = None
    failed: bool = False

    @property
    def next_start(self) -> int:
        """The first token of the turn that follows."""
        return self.end + self.num_reply_tokens


@dataclass(frozen=True)
class TurnReply:
    """What an environment replied to a turn, in tokens.

    Attributes:
        ids: what is appended to the sampled tokens, up to where the model's next turn begins.
        messages: as in `Turn`.
        done: the conversation ends; there are no `ids`.
        reward: as in `Turn`.
        state: as in `Turn`.
        failure: why there is no reply; empty where there is one.
    """

    ids: tuple[int, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    done: bool = False
    reward: float | None = None
    state: Any = None
    failure: str = ""


class TurnEnvironment(Protocol):
    """What answers the turns of one call's samples.

    Attributes:
        max_turns: of the model in a conversation.
        max_turn_tokens: of one turn; 0: no limit of its own.
        max_reply_tokens: of one reply.
    """

    max_turns: int
    max_turn_tokens: int
    max_reply_tokens: int

    async def respond(self, sample: "Sample") -> TurnReply:
        """Reply to the sample's last turn, which has ended.

        Raises:
            UserError: no sample can be replied to.
        """
