"""Messages as tokens that follow a sampled turn: what the tokenizer's chat template puts after an assistant's turn.

A turn is never rendered again. A fixed conversation that ends with the new messages is, and what stands in it after the
fixed assistant's turn and its end token is tokenised: this text follows whatever was sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from megatron_bai import config
from megatron_bai.environments import resolve_environment
from megatron_bai.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_bai.data.task import Task

Message = dict[str, str]
_TURN, _THOUGHT = "fixed-turn-4711", "fixed-thought-1147"  # texts that no template has itself
_QUESTION = {"role": "user", "content": "fixed-question"}


def make_chat_template(settings: config.PerTurn, data: config.Data, task: Task) -> ChatTemplate:
    """Make the template of a run's conversations.

    Args:
        settings: of the environment.
        data: whose options of the template are those of the prompts.
        task: whose tokenizer has the template.

    Raises:
        UserError: as `ChatTemplate`; or the environment's messages are of a role that it does not take.
    """
    kind, options = resolve_environment(settings), getattr(data, "template_options", {})
    template = ChatTemplate(task.tokenizer, options, task.end_tokens, settings.earlier_thinking == "keep")
    if missing := sorted(set(kind.roles if kind else ()) - template.roles):
        raise UserError(
            f"env={settings.name} answers by messages of the role {missing[0]}, and after an assistant's turn the "
            f"tokenizer's chat template takes those of {', '.join(sorted(template.roles))} alone: give it another one"
        )
    return template


class ChatTemplate:
    """The chat template of a tokenizer, as conversations use it.

    Args:
        tokenizer: with a chat template.
        options: of the template, as for prompts.
        end_tokens: ids that end a turn.
        keep_thinking: whether earlier turns stay as they were sampled where the template would leave out their
            thinking; else such a template is refused.

    Attributes:
        end_id: the token that ends an assistant's turn in the template.
        roles: of `tool` and `user` those that a message after a turn may have.

    Raises:
        UserError: the template cannot be used in conversations; says why.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        options: dict[str, Any],
        end_tokens: Collection[int],
        keep_thinking: bool = False,
    ):
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template, which conversations need: add one to it, or env=none")
        self._tokenizer, self._options = tokenizer, options
        try:
            after = self._text_after_turn([], prompt=False)
            added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            self._special = {text for text in (*tokenizer.all_special_tokens, *added) if text}
            self.end_id, self._end = self._find_end(after, end_tokens)
            replies = {role: self._text_before_turn(role) for role in ("tool", "user")}
            self.roles = {role for role, text in replies.items() if "fixed-reply" in text}
            if not self.roles:
                raise ValueError("it takes neither a tool's nor a user's message after an assistant's turn")
            if not all(replies[role].startswith(self._end) for role in self.roles):
                raise ValueError(
                    f"it ends an assistant's turn by {self._end!r}, and by another where messages follow: sampling "
                    "stops at the first, and a conversation would go on after the second"
                )
            drops_thinking = _THOUGHT not in self._render(
                [_QUESTION, {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_TURN}"}, _QUESTION]
            )
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template cannot be used in conversations: {error}") from None
        if drops_thinking and not keep_thinking:
            raise UserError(
                "the tokenizer's chat template leaves out the thinking of earlier turns, so that it would be another "
                "conversation than the one that was sampled: set env.earlier_thinking=keep to leave turns as they were "
                "sampled, or give the tokenizer another template"
            )

    def encode_reply(self, messages: Sequence[Message], last_id: int) -> list[int]:
        """Return the ids that follow a sampled turn, up to where the next turn begins.

        Args:
            messages: that reply to the turn, at least one.
            last_id: of the turn; another than the template's end token is followed by that.

        Raises:
            ValueError: the template refuses these messages, or one holds the text of a special token.
        """
        for message in messages:
            if held := sorted(text for text in self._special if text in message["content"]):
                raise ValueError(f"a message holds {held[0]}, the text of a special token")
        after = self._text_after_turn(messages, prompt=True)
        if not after.startswith(self._end):
            raise ValueError(f"the chat template ends a turn by {after[:20]!r} before {messages[0]['role']!r} messages")
        # with the end token's text before, as some tokenizers begin a text that stands alone with a space
        ids = cast(list[int], self._tokenizer.encode(after, add_special_tokens=False))
        assert ids[0] == self.end_id, "the end token is one token"
        return ids if last_id != self.end_id else ids[1:]

    def _find_end(self, after: str, end_tokens: Collection[int]) -> tuple[int, str]:
        """Return the id and the text of the token that ends an assistant's turn.

        Args:
            after: what the template puts after the last turn.
            end_tokens: those that end a sampled turn, of which it must be one.
        """
        ids = cast(list[int], self._tokenizer.encode(after, add_special_tokens=False)) if after else []
        text = cast(str, self._tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
        if not ids or not after.startswith(text):
            raise ValueError(f"it ends an assistant's turn by {after[:20]!r}, which is no token")
        if ids[0] not in end_tokens:
            raise ValueError(
                f"it ends an assistant's turn by {text!r}, at which sampling does not stop: name it as the tokenizer's "
                "eos_token, in the model's generation_config.json or in rollout.stop_token_ids"
            )
        return ids[0], text

    def _text_before_turn(self, role: str) -> str:
        """Return what stands between two turns with a message of a role; empty where the template refuses it."""
        try:
            return self._text_after_turn([{"role": role, "content": "fixed-reply"}], prompt=True)
        except ValueError:
            return ""

    def _text_after_turn(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return what stands after the fixed assistant's turn, which must stand once.

        Args:
            messages: after that turn.
            prompt: whether the next turn is begun.
        """
        text = self._render([_QUESTION, {"role": "assistant", "content": _TURN}, *messages], prompt)
        _, turn, after = text.partition(_TURN)
        if not turn or _TURN in after:
            raise ValueError("it does not give an assistant's turn as it is, once")
        return after

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt, **self._options
                ),
            )
        except Exception as error:  # the template's own: Jinja's and whatever it raises
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template refuses messages of {roles}: {error}") from None
