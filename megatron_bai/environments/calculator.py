"""A calculator that the model calls: `{"name": "calculator", "arguments": {"expression": "3*(4-1)"}}`."""

from typing import Any

from megatron_bai import config
from megatron_bai.environments.environment import Conversation, EnvironmentKind, Reply
from megatron_bai.environments.expression import evaluate
from megatron_bai.environments.tool_calls import Tool, ToolCallParser, require_tool_parser

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
            return self._reply([f"error: {error}"], right=False)
        return self._reply(results, right=True)

    def _reply(self, results: list[str], right: bool) -> Reply:
        """Return the results as messages, with the turn's reward where there are any."""
        reward = self._call_reward * right if self._call_reward else None
        return Reply(tuple({"role": "tool", "content": result} for result in results), reward=reward)


def _require(settings: config.Calculator) -> None:
    require_tool_parser(settings.tool_parser)


ENVIRONMENT = EnvironmentKind(
    config.Calculator, "megatron_bai.environments.calculator:Calculator", require=_require, roles=("tool",)
)
