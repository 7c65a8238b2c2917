"""Tool calls as SGLang's own parsers find them, and what the built-in environments reply."""

from types import SimpleNamespace

import pytest

from megatron_bai import config, environments
from megatron_bai.data import tools_text
from megatron_bai.environments import Conversation, Reply, calculator, python_tool
from megatron_bai.environments.tool_calls import ToolCallParser, list_tool_parsers, require_tool_parser
from megatron_bai.errors import UserError
from megatron_bai.workers.program import ProgramResult


def turn(text: str) -> Conversation:
    return Conversation(({"role": "user", "content": "q"}, {"role": "assistant", "content": text}), num_turns=1)


def call(arguments: str, name: str = "calculator") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture(scope="module")
def tool() -> calculator.Calculator:
    return calculator.Calculator(SimpleNamespace(call_reward=0.5, tool_parser="hermes"))


def said(*texts: str, reward: float | None = None) -> Reply:
    return Reply(tuple({"role": "tool", "content": text} for text in texts), reward=reward)


def test_a_call_is_answered_and_a_turn_without_one_ends_the_conversation(tool: calculator.Calculator) -> None:
    assert tool.respond(turn(tools_text.tool_call("384*917"))) == said("352128", reward=0.5)
    assert tool.respond(turn("so: " + call('{"expression": "1/0"}'))) == said("error: division by zero", reward=0.0)
    two = call('{"expression": "1+1"}') + call('{"expression": "2+2"}')
    assert tool.respond(turn(two)) == said("2", "4", reward=0.5)
    assert tool.respond(turn("answer:4")) == Reply(done=True)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{", "no call of calculator can be read"),
        ("<tool_call>[1, 2]</tool_call>", "no call of calculator can be read"),
        (call('{"expression": "1"}', "bash"), "there is one tool, calculator"),
        (call('{"expression": "1"}') + call('{"expression": "2"}', "bash"), "there is one tool, calculator"),
        (call('"1+1"'), "calculator takes one argument, the text expression"),
        (call('{"expression": 1}'), "calculator takes one argument, the text expression"),
        (call('{"expression": "1", "more": 2}'), "calculator takes one argument, the text expression"),
        (call('{"expression": "half \\ud800"}'), "calculator takes one argument, the text expression"),
        (call('{"expression": "print(1)"}'), "'p' is not expected"),
    ],
)
def test_a_call_that_is_none_is_named_to_the_model(tool: calculator.Calculator, text: str, error: str) -> None:
    assert tool.respond(turn(text)) == said(f"error: {error}", reward=0.0)


def test_parsers_of_other_families_are_sglangs_too() -> None:
    text = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'
    assert ToolCallParser("qwen25", calculator.TOOL).parse(text) == ["2+3"]
    glm = "<tool_call>calculator\n<arg_key>expression</arg_key>\n<arg_value>2+3</arg_value>\n</tool_call>"
    assert ToolCallParser("glm45", calculator.TOOL).parse(glm) == ["2+3"]


@pytest.mark.parametrize("content", ["5", "null", '{"name": ["a"]}', "[" * 100_000])
def test_what_a_parser_ends_at_is_a_call_that_cannot_be_read(content: str) -> None:
    """SGLang's parser for Qwen2.5 raises at them: the model wrote it, and the environment does not fail."""
    with pytest.raises(ValueError, match="no call of calculator can be read"):
        ToolCallParser("qwen25", calculator.TOOL).parse(f"<tool_call>\n{content}\n</tool_call>")


def test_a_parser_that_is_not_there_is_named_with_the_nearest() -> None:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    assert set(list_tool_parsers()) == set(FunctionCallParser.ToolCallParserEnum)
    require_tool_parser("qwen25")
    with pytest.raises(UserError, match=r"env.tool_parser is 'hermess', and SGLang .*; did you mean hermes\?"):
        environments.require(config.Calculator(tool_parser="hermess"))


def test_a_machine_without_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="env.tool_parser=hermes is a parser of SGLang's, which is not installed here"):
        environments.require(config.Calculator())


def test_programs_are_run_and_heard() -> None:
    tool = python_tool.PythonTool(
        SimpleNamespace(tool_parser="", program_timeout_s=30.0, program_memory_mib=512, max_output_characters=100)
    )
    assert tool.respond(turn("Let me see.\n```python\nprint(6 * 7)\n```")) == said("42\n")
    two = "```python\nprint(1)\n```\nand\n```py\nraise SystemExit(3)\n```"
    assert tool.respond(turn(two)) == said("1\n", "[it ended with code 3]")
    assert tool.respond(turn("It is 42.")) == Reply(done=True)


def test_programs_in_tool_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = python_tool.PythonTool(
        SimpleNamespace(tool_parser="hermes", program_timeout_s=30.0, program_memory_mib=512, max_output_characters=100)
    )
    assert tool.respond(turn(call('{"code": "print(6 * 7)"}', "python"))) == said("42\n")
    assert tool.respond(turn(call("{}", "python"))) == said("error: python takes one argument, the text code")


def test_a_long_output_is_shortened_in_its_middle() -> None:
    result = ProgramResult("a" * 100, "b" * 100, "it ended with code 1")
    assert python_tool.describe_result(result, 20) == "a" * 10 + "\n[…]\n" + "b" * 10 + "[it ended with code 1]"


def test_settings_that_cannot_be_meant_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"env.program_timeout_s \(10\) is of one program"):
        environments.resolve_environment(config.PythonTool(program_timeout_s=10.0))
    with pytest.raises(UserError, match="env.program_memory_mib is 1"):
        environments.resolve_environment(config.PythonTool(program_memory_mib=1))
