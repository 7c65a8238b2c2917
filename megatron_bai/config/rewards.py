"""Settings of rewards: `reward=NAME` chooses one (docs/data.md)."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class Reward:
    """A reward of responses: `reward=NAME` chooses one with its own settings (docs/data.md)."""

    name: str = MISSING  # set by the choice


@dataclass
class Exact(Reward):
    """1 for the exact answer, by the data's own check."""

    name: str = "exact"


@dataclass
class PerSample(Reward):
    """Settings of every reward that is a Python function of one sample and runs in worker processes."""

    timeout_s: float = 10.0  # of one sample; a process that takes longer is killed, and the sample has no reward
    workers: int = 2  # processes of each model replica


@dataclass
class MathVerify(PerSample):
    """1 where math-verify finds the answer, LaTeX or plain, equal to the row's."""

    name: str = "math_verify"


@dataclass
class Function(PerSample):
    """A user's function."""

    name: str = "function"
    function: str = ""  # module:function taking (prompt, response, answer, extra) and returning a number


@dataclass
class RewardModel(Reward):
    """The score of a reward model that SGLang serves (--is-embedding), requested at /classify."""

    name: str = "model"
    url: str = ""  # http://127.0.0.1:30000
    remote: bool = False  # true allows another host than this one: prompts and responses leave the machine
    send: str = "text"  # or ids or chat: prompt and response as text, as the actor's tokens, or in the model's template
    tokenizer: str = ""  # chat: a directory with the reward model's tokenizer
    label: int | None = None  # which of the model's outputs is the reward; unset where it has one
    check: float = 0.0  # added to the score of a response that the data's own check accepts
    concurrency: int = 32  # requests in flight from each model replica
    request_timeout_s: float = 60.0
    retries: int = 3  # of one request, with growing pauses, after a failure that may pass
