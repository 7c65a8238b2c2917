"""Tool calls in a model's turns, found by SGLang's own parsers."""

import ast
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bai.config.limits import unknown_name
from megatron_bai.data.plain_values import find_half_surrogate
from megatron_bai.environments.environment import Reply
from megatron_bai.errors import UserError


@dataclass(frozen=True)
class Tool:
    """A tool of one argument, a text.

    Attributes:
        name: by which it is called.
        argument: name of the argument.
        description: of the tool.
    """

    name: str
    argument: str
    description: str

    def describe(self) -> dict[str, Any]:
        """Return what a chat template is given, and a parser of SGLang: OpenAI's form of a function."""
        parameters = {
            "type": "object",
            "properties": {self.argument: {"type": "string"}},
            "required": [self.argument],
            "additionalProperties": False,
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def read_argument(self, parameters: str) -> str:
        """Return the argument of a call.

        Args:
            parameters: of the call, JSON.

        Raises:
            ValueError: it is not an object with this one text.
        """
        try:
            values = json.loads(parameters)
        except (ValueError, RecursionError):
            values = None
        text = values[self.argument] if isinstance(values, dict) and values.keys() == {self.argument} else None
        if not isinstance(text, str) or find_half_surrogate(text) is not None:
            raise ValueError(f"{self.name} takes one argument, the text {self.argument}")
        return text


def make_tool_reply(results: Sequence[str], reward: float | None = None) -> Reply:
    """Return the reply with a tool's results.

    Args:
        results: a message each.
        reward: of the turn that called the tool; None: none.
    """
    return Reply(tuple({"role": "tool", "content": result} for result in results), reward=reward)


class ToolCallParser:
    """A parser of SGLang's, which a worker process imports with the engine: seconds, and hundreds of MiB.

    Args:
        name: as in `--tool-call-parser`.
        tool: the one tool that there is.

    Raises:
        UserError: there is no SGLang here, or no such parser in it.
    """

    def __init__(self, name: str, tool: Tool):
        require_tool_parser(name)
        os.environ["SGLANG_FORWARD_UNKNOWN_TOOLS"] = "1"  # else a call of another tool is left out beside right ones
        from sglang.srt.entrypoints.openai.protocol import Tool as SGLangTool
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        self.tool = tool
        self._make: Callable[[], Any] = partial(FunctionCallParser, [SGLangTool(**tool.describe())], name)

    def parse(self, text: str) -> list[str]:
        """Return the argument of each call in a turn, in order; empty where there is no call.

        Args:
            text: of the turn.

        Raises:
            ValueError: there is a call that is none of the tool's; says what is wrong in a few words.
        """
        parser = self._make()  # some have a state
        if not parser.has_tool_call(text):
            return []
        try:
            _, calls = parser.parse_non_stream(text)
        except Exception:  # some raise at JSON that is no object, or is too deep: the model's fault and not theirs
            calls = []
        if not calls:
            raise ValueError(f"no call of {self.tool.name} can be read")
        if any(call.name != self.tool.name for call in calls):
            raise ValueError(f"there is one tool, {self.tool.name}")
        return [self.tool.read_argument(call.parameters) for call in calls]


def require_tool_parser(name: str) -> None:
    """Raise a UserError unless the installed SGLang has a parser of this name.

    Args:
        name: the setting `env.tool_parser`.
    """
    known = list_tool_parsers()
    if not known:
        raise UserError(f"env.tool_parser={name} is a parser of SGLang's, which is not installed here")
    if name not in known:
        raise UserError(unknown_name(f"env.tool_parser is {name!r}, and SGLang has no such parser", name, known))


def list_tool_parsers() -> Sequence[str]:
    """Return the names of the installed SGLang's parsers, read from its source: to import it takes seconds."""
    spec = importlib.util.find_spec("sglang")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(directory) / "srt" / "function_call" / "function_call_parser.py"
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Dict):
                continue
            if isinstance(node.target, ast.Name) and node.target.id == "ToolCallParserEnum":
                return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    return []
