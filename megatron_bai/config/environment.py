"""Settings of environments: `env=NAME` chooses one (docs/conversations.md)."""

from dataclasses import dataclass

from omegaconf import MISSING

from megatron_bai.config.limits import LONGEST_S, number, setting


@dataclass
class Env:
    """What answers the model's turns: `env=NAME` chooses it with its own settings (docs/conversations.md)."""

    name: str = setting(MISSING, "set by the choice")


@dataclass
class NoEnvironment(Env):
    """No conversations: a prompt has one response."""

    name: str = "none"


@dataclass
class PerTurn(Env):
    """Settings of every environment: a class that is asked in worker processes after each turn."""

    max_turns: int = number(4, "of the model; the conversation ends after the last of them", at_least=1)
    max_turn_tokens: int = number(
        0, "of one turn; a longer one ends the conversation; 0: rollout.max_new_tokens, which bounds all", at_least=0
    )
    max_reply_tokens: int = number(
        256, "that the environment's messages may add at once; more end the conversation", at_least=1
    )
    timeout_s: float = number(
        10.0,
        "of one call; a process that takes longer is killed, and the sample has no reward",
        above=0,
        at_most=LONGEST_S,
    )
    workers: int = number(2, "processes of each model replica", at_least=1)
    earlier_thinking: str = setting(
        "refuse",
        "of a chat template that leaves out the thinking of earlier turns: refuse it, or keep the turns as sampled",
        choices=("refuse", "keep"),
    )


@dataclass
class UserEnvironment(PerTurn):
    """A class of the user's."""

    name: str = "class"
    environment: str = setting("", "module:Class or path.py:Class, with a method respond(conversation)")


@dataclass
class Calculator(PerTurn):
    """A calculator that the model calls as a tool."""

    name: str = "calculator"
    tool_parser: str = setting("hermes", "SGLang's parser that finds calls, as in --tool-call-parser")
    call_reward: float = number(0.0, "of a turn whose calls are all right, for reward=environment; 0: none")


@dataclass
class PythonTool(PerTurn):
    """Programs that the model writes, run without network and files in processes of their own."""

    name: str = "python"
    tool_parser: str = setting(
        "hermes", "SGLang's parser that finds calls, as in --tool-call-parser; empty: programs in fenced blocks alone"
    )
    program_timeout_s: float = number(5.0, "of one program", above=0, at_most=LONGEST_S)
    program_memory_mib: int = number(512, "of each process of a program", at_least=16)
    max_reply_tokens: int = number(
        2048, "that the environment's messages may add at once; more end the conversation", at_least=1
    )  # what `max_output_characters` leaves of an output has fewer
    max_output_characters: int = number(2000, "of what a program wrote; the middle of more is left out", at_least=16)
