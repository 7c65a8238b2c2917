"""One kept sample: what the model was asked, what it said, and what both engines and the reward made of it."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_bai.utils.json_numbers import is_finite_number

TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class KeptSample:
    """A line of a file of samples: the names of the fields are those of the JSON object.

    Attributes:
        step: global step, from 1.
        split: `train` or `eval`; evaluation samples have the weights after the step.
        kept_as: the orders that it was chosen from (`choose.ORDERS`).
        prompt_index: of the prompt in its split; samples with one index are a group.
        member: index in its group.
        prompt: text as the model read it.
        answer: what the reward compared with; empty where the data has none.
        response: text of the response, its end token included; of a conversation turns and replies as the model read
            them.
        reward: None where it failed.
        failure: why there is no reward.
        advantage: mean over the response's tokens; None of an evaluation sample.
        length: tokens of the response.
        finish: `stop` (end token, or the environment's end) or `length` (cut off).
        discrepancy: mean |π_old/μ_old as a log-ratio| over the response's tokens, nats; None where it is not known.
        prompt_length: tokens of the prompt.
        tokens: ids of the prompt, then of the response.
        token_lengths: characters of `response` that each of its tokens adds; they sum to all.
        logprobs_inference: of the response's tokens, in the inference engine that sampled them; None of tokens that an
            environment gave, which alone are None.
        logprobs_training: the same in the training engine before the step's first update; empty of an evaluation
            sample. None where a number is not finite.
        routes_differ: `[position, layers]`: the number of MoE layers in which the training engine's live router chooses
            other experts for input token `position` of `tokens`, where there are any; None where it was not measured.
        moe_layers: of the model.
        versions: `[version, start, end]`: weights that sampled the response's tokens from `start` to before `end`.
        turns: of a conversation, `start` and `end` of each among the response's tokens, whether it `ended` by an end
            token, and `messages` and `reward` of the environment's reply; empty where there is no environment.
    """

    step: int
    split: str
    kept_as: list[str]
    prompt_index: int
    member: int
    prompt: str
    answer: str
    response: str
    reward: float | None
    failure: str
    advantage: float | None
    length: int
    finish: str
    discrepancy: float | None
    prompt_length: int
    tokens: list[int]
    token_lengths: list[int]
    logprobs_inference: list[float | None]
    logprobs_training: list[float | None] = field(default_factory=list)
    routes_differ: list[list[int]] | None = None
    moe_layers: int = 0
    versions: list[list[Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the sample as one line of ASCII: a lone surrogate is an escape, and no text ends the line."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(line: str) -> "KeptSample":
        """Parse a line; keys that a later release added are left out.

        Raises:
            ValueError: it is no sample.
        """
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        known = {f.name: content[f.name] for f in fields(KeptSample) if f.name in content}
        try:
            sample = KeptSample(**known)
        except TypeError as error:
            raise ValueError(str(error).removeprefix("KeptSample.__init__() ")) from None
        if wrong := next(sample._wrong_fields(), None):
            raise ValueError(f"{wrong} is not what it should be")
        return sample

    def _wrong_fields(self) -> Any:
        """Yield the names of fields that hold something else than they should."""
        for name in ("split", "prompt", "answer", "response", "failure", "finish"):
            if not isinstance(getattr(self, name), str):
                yield name
        for name in ("step", "prompt_index", "member", "length", "prompt_length", "moe_layers"):
            if type(getattr(self, name)) is not int:
                yield name
        for name in ("reward", "advantage", "discrepancy"):
            if not _is_number_or_none(getattr(self, name)):
                yield name
        pairs = self.routes_differ if self.routes_differ is not None else []
        for name, values, is_valid in (
            ("kept_as", self.kept_as, lambda v: isinstance(v, str)),
            ("tokens", self.tokens, _is_int),
            ("token_lengths", self.token_lengths, _is_int),
            ("logprobs_inference", self.logprobs_inference, _is_number_or_none),
            ("logprobs_training", self.logprobs_training, _is_number_or_none),
            ("routes_differ", pairs, lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_int, v))),
            ("versions", self.versions, lambda v: isinstance(v, list) and len(v) == 3),
            ("turns", self.turns, _is_turn),
        ):
            if not isinstance(values, list) or not all(map(is_valid, values)):
                yield name
                return
        if len(self.tokens) != self.prompt_length + self.length or len(self.token_lengths) != self.length:
            yield "tokens"
        if len(self.logprobs_inference) != self.length or len(self.logprobs_training) not in (0, self.length):
            yield "logprobs"
        if sum(self.token_lengths) != len(self.response) or any(length < 0 for length in self.token_lengths):
            yield "token_lengths"

    @property
    def from_environment(self) -> list[bool]:
        """Whether a token of the response is an environment's, and was not sampled."""
        starts = [turn["start"] for turn in self.turns]
        given = [False] * self.length
        for turn, following in zip(self.turns, [*starts, self.length][1:], strict=True):
            given[turn["end"] : following] = [True] * (following - turn["end"])
        return given

    @property
    def token_texts(self) -> list[str]:
        """The text that each token adds to the response."""
        texts, start = [], 0
        for length in self.token_lengths:
            texts.append(self.response[start : start + length])
            start += length
        return texts

    @property
    def token_discrepancies(self) -> list[float | None]:
        """|log π_old − log μ_old| of each token of the response, nats; None where one is not known."""
        if not self.logprobs_training:
            return [None] * self.length
        pairs = zip(self.logprobs_training, self.logprobs_inference, strict=True)
        return [None if a is None or b is None else abs(a - b) for a, b in pairs]

    @property
    def token_routes(self) -> list[int]:
        """Of each token of the response, the layers whose routes differ in the row that predicted it."""
        layers = {position: number for position, number in self.routes_differ or []}
        return [layers.get(self.prompt_length - 1 + i, 0) for i in range(self.length)]


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_int(value.get(name)) and value[name] >= 0 for name in ("start", "end"))
        and isinstance(value.get("messages"), list)
        and all(isinstance(m, dict) and all(isinstance(t, str) for t in m.values()) for m in value["messages"])
        and _is_number_or_none(value.get("reward"))
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_finite_number(value)
