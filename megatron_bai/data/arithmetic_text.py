"""A small language about sums, written and checked by a program.

A problem asks for the sum of several small numbers. Adding them at once is hard for a tiny model; adding one at a time
is easy, and a program can write that derivation out:

    problem    7+8+5
    direct     answer:20
    steps      7+8=15;15+5=20;answer:20
    checked    7+8=15;7+8=15;15+5=20;15+5=20;15+5=20;answer:20

Everything here is text and exact; `task` turns it into token ids. All randomness comes from the `random.Random` passed
in, so a text is a function of its seed alone.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from megatron_bai.config import Arithmetic
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError

USER, ASSISTANT = "<user>", "<assistant>"
STYLES = ("pretrained", "instruct", "reasoning", "checked")
HOLD_OUT = 8  # one problem in this many is held out


@dataclass(frozen=True)
class Problem:
    """Numbers to add, in the order they are written."""

    terms: tuple[int, ...]

    @property
    def expression(self) -> str:
        """The sum as the prompt writes it."""
        return "+".join(map(str, self.terms))

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(sum(self.terms))

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the eval split: a hash of its text decides, not a list or a seed."""
        return hashlib.sha256(self.expression.encode()).digest()[0] % HOLD_OUT == 0


@dataclass(frozen=True)
class Document:
    """One supervised text. `prompt` is context; `response` is what a chat model is trained to say."""

    prompt: str
    response: str


def validate_arithmetic(data: Arithmetic) -> None:
    """Refuse settings under which the splits would overlap or no problem exists, naming the key.

    A derivation contains two-term sums, so problems have three terms or more: then no text ever contains the solution
    of a problem other than its own.
    """
    validate_group("data", data)
    if data.max_terms < data.min_terms:
        raise UserError(f"data.max_terms is {data.max_terms}: it must be at least data.min_terms ({data.min_terms})")
    problems, terms = 0, data.min_terms
    while problems < data.eval_prompts and terms <= data.max_terms:
        problems, terms = problems + data.max_number**terms, terms + 1
    if problems < data.eval_prompts:
        raise UserError(
            f"data.eval_prompts is {data.eval_prompts}, and the task has {problems} problems: lower it, or raise "
            "data.max_terms or data.max_number"
        )


def draw_problem(data: Arithmetic, rng: Random, held_out: bool = False) -> Problem:
    """Draw a random problem of the eval split (`held_out`) or of the train split.

    Args:
        data: the settings, for the number of terms and their size (1 … `max_number`).
        rng: the only source of randomness.
        held_out: the split, True for eval.

    Raises:
        UserError: the settings allow so few problems that the split has none.
    """
    for _ in range(1000):
        count = rng.randint(data.min_terms, data.max_terms)
        problem = Problem(tuple(rng.randint(1, data.max_number) for _ in range(count)))
        if problem.held_out == held_out:
            return problem
    raise UserError("the task has no held-out problem: raise data.max_number or data.max_terms")


def prompt_text(problem: Problem) -> str:
    """Return the prompt between its chat markers."""
    return f"{USER}{problem.expression}{ASSISTANT}"


def direct_response(problem: Problem) -> str:
    """Write the short response: the answer alone."""
    return f"answer:{problem.answer}"


def derivation(problem: Problem) -> str:
    """Write the long response: a running sum, one line of the derivation a term, then the answer."""
    total, lines = problem.terms[0], []
    for term in problem.terms[1:]:
        lines.append(f"{total}+{term}={total + term}")
        total += term
    return ";".join([*lines, direct_response(problem)])


def checked_derivation(problem: Problem, rng: Random) -> str:
    """Write the longest response: each line of the derivation one to three times, as of a model that checks itself.

    Args:
        problem: whose derivation is written.
        rng: chooses how often each line is repeated; the answer is never repeated.
    """
    *lines, answer = derivation(problem).split(";")
    return ";".join([*(line for line in lines for _ in range(rng.randint(1, 3))), answer])


def is_correct(problem_answer: str, response: str) -> bool:
    """Return whether the last line of a finished response (its end token removed) states the answer, exactly.

    Args:
        problem_answer: the right number, as `Problem.answer` writes it.
        response: lines separated by `;`. The lines before the last are not checked.
    """
    return response.rpartition(";")[2] == f"answer:{problem_answer}"


def _sum_fact(data: Arithmetic, rng: Random) -> str:
    """Write a two-term sum of the sizes that running sums have."""
    left, right = rng.randint(1, data.max_number * (data.max_terms - 1)), rng.randint(1, data.max_number)
    return f"{left}+{right}={left + right}"


def _parity_fact(data: Arithmetic, rng: Random) -> str:
    number = rng.randint(1, data.max_number * data.max_terms)
    return f"{number} is {'odd' if number % 2 else 'even'}"


def _order_fact(data: Arithmetic, rng: Random) -> str:
    first, second = rng.sample(range(1, data.max_number * data.max_terms + 1), 2)
    return f"{first} is {'more' if first > second else 'less'} than {second}"


def _counting_fact(data: Arithmetic, rng: Random) -> str:
    start = rng.randint(1, data.max_number * (data.max_terms - 1))
    return "count:" + " ".join(str(start + i) for i in range(rng.randint(3, 6)))


def _partial_expression(data: Arithmetic, rng: Random) -> str:
    terms = draw_problem(data, rng).terms
    return "+".join(map(str, terms[: rng.randint(1, len(terms))])) + "+"


_FACTS: tuple[Callable[[Arithmetic, Random], str], ...] = (
    _sum_fact,
    _sum_fact,
    _sum_fact,
    _parity_fact,
    _order_fact,
    _counting_fact,
    _partial_expression,
)


def make_document(data: Arithmetic, style: str, rng: Random) -> Document:
    """Draw a random text of a style; its problem, if it has one, is of the train split.

    instruct is the direct answer, reasoning the derivation, checked one whose lines are repeated, and pretrained the
    language at large: a fifth of its texts answer directly, two fifths derive, the others are facts, counting and
    unfinished expressions without chat markers.

    Args:
        data: the settings; `data.style` is not read.
        style: one of `STYLES`.
        rng: the only source of randomness.

    Returns:
        A document; its prompt is empty for texts without chat markers.

    Raises:
        UserError: no such style, or the settings allow so few problems that the train split has none.
    """
    if style not in STYLES:
        raise UserError(f"data.style is {style!r}: it must be one of {', '.join(STYLES)}")
    if style == "pretrained":
        kind = rng.choices(("instruct", "reasoning", "fact"), (1, 2, 2))[0]
        if kind == "fact":
            return Document("", rng.choice(_FACTS)(data, rng))
        style = kind
    problem = draw_problem(data, rng)
    if style == "checked":
        return Document(prompt_text(problem), checked_derivation(problem, rng))
    return Document(prompt_text(problem), direct_response(problem) if style == "instruct" else derivation(problem))
