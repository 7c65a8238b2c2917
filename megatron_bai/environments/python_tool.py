"""Programs that the model writes, in a tool call or a fenced block, run in processes of their own."""

import re
from typing import Any

from megatron_bai import config
from megatron_bai.environments.environment import Conversation, EnvironmentKind, Reply
from megatron_bai.environments.tool_calls import Tool, ToolCallParser, make_tool_reply, require_tool_parser
from megatron_bai.errors import UserError
from megatron_bai.workers.program import ProgramLimits, ProgramResult, require_isolation, run_program

TOOL = Tool("python", "code", "Run a Python program with the standard library, without network; returns its output.")
_FENCED = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)


class PythonTool:
    """Answers each program in a turn by what it writes; a turn without one ends the conversation.

    Args:
        settings: of `config.PythonTool`, as attributes.

    Raises:
        IsolationError: the kernel gives programs no namespaces.
    """

    def __init__(self, settings: Any):
        require_isolation()
        self._parser = ToolCallParser(settings.tool_parser, TOOL) if settings.tool_parser else None
        self._limits = ProgramLimits(
            settings.program_timeout_s, settings.program_memory_mib, 4 * settings.max_output_characters
        )
        self._max_characters: int = settings.max_output_characters

    def respond(self, conversation: Conversation) -> Reply:
        """Answer the last turn.

        Args:
            conversation: so far, the turn included.
        """
        text = conversation.messages[-1]["content"]
        try:
            programs = (self._parser.parse(text) if self._parser else []) or find_fenced_programs(text)
        except ValueError as error:
            return make_tool_reply([f"error: {error}"])
        if not programs:
            return Reply(done=True)
        results = [run_program(program, limits=self._limits) for program in programs]
        return make_tool_reply([describe_result(result, self._max_characters) for result in results])


def find_fenced_programs(text: str) -> list[str]:
    """Return the programs in a text's fenced blocks, in order."""
    return _FENCED.findall(text)


def describe_result(result: ProgramResult, max_characters: int) -> str:
    """Return what a program wrote and how it ended, as a message.

    Args:
        result: of the program.
        max_characters: of what it wrote; the middle of more is left out.
    """
    written = result.output + result.errors
    if len(written) > max_characters:
        head = max_characters // 2
        written = f"{written[:head]}\n[…]\n{written[len(written) - (max_characters - head) :]}"
    return written + (f"[{result.failure}]" if result.failure else "")


def _check(settings: config.PythonTool) -> None:
    if settings.program_timeout_s >= settings.timeout_s:
        raise UserError(
            f"env.program_timeout_s ({settings.program_timeout_s:g}) is of one program, and env.timeout_s "
            f"({settings.timeout_s:g}) of all in a turn, with their start: it must be less"
        )


def _require(settings: config.PythonTool) -> None:
    if settings.tool_parser:
        require_tool_parser(settings.tool_parser)
    require_isolation()


ENVIRONMENT = EnvironmentKind(
    config.PythonTool, "megatron_bai.environments.python_tool:PythonTool", _check, _require, roles=("tool",)
)
