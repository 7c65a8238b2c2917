"""Settings of rewards: `reward=NAME` chooses one (docs/data.md)."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_bai.config.limits import LONGEST_S, number, path, setting


@dataclass
class Reward:
    """A reward of responses: `reward=NAME` chooses one with its own settings (docs/data.md)."""

    name: str = setting(MISSING, "set by the choice")


@dataclass
class Exact(Reward):
    """1 for the exact answer, by the data's own check."""

    name: str = "exact"


@dataclass
class EnvironmentReward(Reward):
    """The sum of the environment's rewards of turns: a conversation's own (docs/conversations.md)."""

    name: str = "environment"


@dataclass
class PerSample(Reward):
    """Settings of every reward that is a Python function of one sample and runs in worker processes."""

    timeout_s: float = number(
        10.0,
        "of one sample; a process that takes longer is killed, and the sample has no reward",
        above=0,
        at_most=LONGEST_S,
    )
    workers: int = number(2, "processes of each model replica", at_least=1)


@dataclass
class MathVerify(PerSample):
    """1 where math-verify finds the answer, LaTeX or plain, equal to the row's."""

    name: str = "math_verify"


@dataclass
class Function(PerSample):
    """A user's function."""

    name: str = "function"
    function: str = setting("", "module:function taking (prompt, response, answer, extra) and returning a number")


@dataclass
class RewardModel(Reward):
    """The score of a reward model that SGLang serves (--is-embedding), requested at /classify."""

    name: str = "model"
    url: str = setting("", "http://127.0.0.1:30000")
    remote: bool = setting(False, "true allows another host than this one: prompts and responses leave the machine")
    send: str = setting(
        "text",
        "or ids or chat: prompt and response as text, as the actor's tokens, or in the model's template",
        choices=("text", "ids", "chat"),
    )
    tokenizer: str = path("", "chat: a directory with the reward model's tokenizer")
    label: int | None = number(None, "which of the model's outputs is the reward; unset where it has one", at_least=0)
    check: float = number(0.0, "added to the score of a response that the data's own check accepts")
    concurrency: int = number(32, "requests in flight from each model replica", at_least=1)
    request_timeout_s: float = number(60.0, "of one request", above=0, at_most=LONGEST_S)
    retries: int = number(3, "of one request, with growing pauses, after a failure that may pass", at_least=0)


@dataclass
class Several(Reward):
    """A weighted sum of rewards, each logged apart."""

    name: str = "several"
    parts: dict[str, Any] = setting(
        dict, "by name: reward.parts.right.reward=exact reward.parts.right.weight=1, and the reward's own settings"
    )


@dataclass
class Code(PerSample):
    """The cases that a program in the response passes, run without network and files in processes of its own."""

    name: str = "code"
    timeout_s: float = number(60.0, above=0, at_most=LONGEST_S)
    cases: str = setting("", "column with the row's cases; empty: the answer has them, as JSON")
    pay: str = setting("all", "1 where all cases pass, or the share of those that do", choices=("all", "share"))
    case_timeout_s: float = number(5.0, "of one case", above=0, at_most=LONGEST_S)
    memory_mib: int = number(512, "of each process of a program", at_least=16)
