"""A calculator that the model calls: `{"name": "calculator", "arguments": {"expression": "3*(4-1)"}}`."""

from typing import Any

from megatron_bai import config
from megatron_bai.environments.environment import Conversation, EnvironmentKind, Reply
from megatron_bai.environments.expression import evaluate
from megatron_bai.environments.tool_calls import Tool, ToolCallParser, make_tool_reply, require_tool_parser

TOOL = Tool("calculator", "expression", "Evaluate an arithmetic expression of numbers, + - * / and parentheses.")


class Calculator:
    """Answers each call in a turn by a message of the role `tool`; a turn without a call ends the conversation.

    Args:
        settings: of `config.Calculator`, as attributes.
    """

    def __init__(self, settings: Any):
        self._call_reward: float = settings.call_reward
        self._parser = ToolCallParser(settings.tool_parser, TOOL)

    def respond(self, conversation: Conversation) -> Reply:
        """Answer the last turn.

        Args:
            conversation: so far, the turn included.
        """
        try:
            expressions = self._parser.parse(conversation.messages[-1]["content"])
            if not expressions:
                return Reply(done=True)
            results = [evaluate(expression) for expression in expressions]
        except ValueError as error:
            return make_tool_reply([f"error: {error}"], 0.0 if self._call_reward else None)
        return make_tool_reply(results, self._call_reward or None)


def _require(settings: config.Calculator) -> None:
    require_tool_parser(settings.tool_parser)


ENVIRONMENT = EnvironmentKind(
    config.Calculator, "megatron_bai.environments.calculator:Calculator", require=_require, roles=("tool",)
)
