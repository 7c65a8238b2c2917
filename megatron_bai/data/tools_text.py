"""A small language about calculations and the tool that makes them.

A product of three-digit numbers is nothing that a tiny model computes, but copying it into a call of a calculator, and
the result into the answer, is easy:

    prompt    384*917
    call      <tool_call>{"name":"calculator","arguments":{"expression":"384*917"}}</tool_call>
    tool      352128
    answer    answer:352128

A share of the supervised texts call the tool (`data.call_fraction`); the others answer directly. Everything here is
text and exact; all randomness comes from the `random.Random` that is passed in.
"""

import hashlib
from dataclasses import dataclass
from random import Random

from megatron_bai.config import Tools
from megatron_bai.config.limits import validate_group
from megatron_bai.data.arithmetic_text import ASSISTANT, HOLD_OUT, USER
from megatron_bai.errors import UserError

TOOL, CALL, END_CALL = "<tool>", "<tool_call>", "</tool_call>"
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

# What stands for a conversation: as the prompts of the arithmetic task, with a role for the tool's messages.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + '<eos>' }}"
    "{% elif message['role'] == 'tool' %}{{ '<tool>' + message['content'] }}"
    "{% else %}{{ raise_exception('there are roles user, assistant and tool') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class Calculation:
    """Two numbers and what to do with them."""

    left: int
    operation: str
    right: int

    @property
    def expression(self) -> str:
        """The calculation as the prompt writes it."""
        return f"{self.left}{self.operation}{self.right}"

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(_OPERATIONS[self.operation](self.left, self.right))

    @property
    def held_out(self) -> bool:
        """Whether the calculation belongs to the eval split: a hash of its text decides."""
        return hashlib.sha256(self.expression.encode()).digest()[0] % HOLD_OUT == 0


def validate_tools(data: Tools) -> None:
    """Refuse settings under which there are too few calculations, naming the key."""
    validate_group("data", data)
    problems = len(_OPERATIONS) * data.max_number**2
    if problems < 2 * HOLD_OUT * data.eval_prompts:
        raise UserError(
            f"data.eval_prompts is {data.eval_prompts}, and the task has {problems} calculations, of which one in "
            f"{HOLD_OUT} is held out: lower it, or raise data.max_number"
        )


def draw_calculation(data: Tools, rng: Random, held_out: bool = False) -> Calculation:
    """Draw a random calculation of the eval split (`held_out`) or of the train split.

    Args:
        data: the settings, for the size of the numbers (1 … `max_number`).
        rng: the only source of randomness.
        held_out: the split, True for eval.

    Raises:
        UserError: the settings allow so few calculations that the split has none.
    """
    for _ in range(1000):
        left, right = rng.randint(1, data.max_number), rng.randint(1, data.max_number)
        found = Calculation(left, rng.choice(list(_OPERATIONS)), right)
        if found.held_out == held_out:
            return found
    raise UserError("the task has no held-out calculation: raise data.max_number")


def tool_call(expression: str) -> str:
    """Write the call of the calculator, as SGLang's parser `hermes` reads it."""
    return f'{CALL}{{"name":"calculator","arguments":{{"expression":"{expression}"}}}}{END_CALL}'


def make_messages(data: Tools, rng: Random) -> list[dict[str, str]]:
    """Draw a conversation of the train split: with a call of the tool, or without.

    Args:
        data: the settings.
        rng: the only source of randomness.
    """
    problem = draw_calculation(data, rng)
    messages = [{"role": "user", "content": problem.expression}]
    if rng.random() < data.call_fraction:
        messages += [
            {"role": "assistant", "content": tool_call(problem.expression)},
            {"role": "tool", "content": problem.answer},
        ]
    return [*messages, {"role": "assistant", "content": f"answer:{problem.answer}"}]


def split_messages(messages: list[dict[str, str]], end: str) -> list[tuple[str, bool]]:
    """Return a conversation's text in parts, as the chat template has it, each with whether the model says it.

    Args:
        messages: of the roles that the template has.
        end: text of the end token.
    """
    parts: list[tuple[str, bool]] = []
    for message in messages:
        if message["role"] == "assistant":
            parts += [(ASSISTANT, False), (message["content"] + end, True)]
        else:
            parts.append(({"user": USER, "tool": TOOL}[message["role"]] + message["content"], False))
    return parts
