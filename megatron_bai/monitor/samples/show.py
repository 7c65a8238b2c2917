"""Kept samples in the order and form that a reader asks for."""

from collections.abc import Callable, Sequence

from megatron_bai.errors import UserError
from megatron_bai.monitor.samples.kept_sample import EVAL, TRAIN, KeptSample
from megatron_bai.monitor.samples.printable import make_printable

_RULE = "-" * 72
# What comes first has the lowest value; what has none comes last.
_SORTS: dict[str, Callable[[KeptSample], float | None]] = {
    "best": lambda sample: None if sample.reward is None else -sample.reward,
    "worst": lambda sample: sample.reward,
    "longest": lambda sample: -sample.length,
    "discrepancy": lambda sample: None if sample.discrepancy is None else -sample.discrepancy,
    "mismatch": lambda sample: None if sample.routes_differ is None else -differing_fraction(sample),
}
SORTS = tuple(_SORTS)
SPLITS = (TRAIN, EVAL)


def select(
    samples: Sequence[KeptSample], sort: str, count: int = 0, split: str = "", prompt: str = ""
) -> list[KeptSample]:
    """Return some of the samples, in order.

    Args:
        samples: to choose from.
        sort: one of `SORTS`.
        count: of the samples returned, at most; 0: all.
        split: of the samples; empty: any.
        prompt: text that the prompt contains, or its index; empty: any.

    Raises:
        UserError: no sample is left; names what there is.
    """
    matching = [s for s in samples if split in ("", s.split) and (prompt in s.prompt or prompt == str(s.prompt_index))]
    if not matching:
        there = ", ".join(
            f"{s.split} {s.prompt_index}" for s in {(s.split, s.prompt_index): s for s in samples}.values()
        )
        raise UserError(
            f"no kept sample is of samples.split={split!r} and samples.prompt={prompt!r}: there are {there}"
        )
    value = _SORTS[sort]
    keys = [(value(sample) is None, value(sample) or 0.0, i) for i, sample in enumerate(matching)]
    ordered = [matching[i] for *_, i in sorted(keys)]
    return ordered[:count] if count else ordered


def describe(sample: KeptSample) -> list[str]:
    """Return what is known of a sample besides its text, a few words each."""
    reward = f"no reward ({make_printable(sample.failure)})" if sample.reward is None else f"reward {sample.reward:.4g}"
    facts = [reward]
    if sample.advantage is not None:
        facts.append(f"advantage {sample.advantage:+.3g}")
    turns = f" in {len(sample.turns)} turns" if sample.turns else ""
    facts.append(f"{sample.length} tokens{turns}" + (", cut off" if sample.finish == "length" else ""))
    if sample.discrepancy is not None:
        facts.append(f"discrepancy {sample.discrepancy:.2g} nats")
    if sample.routes_differ is not None and sample.moe_layers:
        facts.append(f"{differing_fraction(sample):.2%} of routes differ")
    versions = list(dict.fromkeys(str(version) for version, *_ in sample.versions))
    if versions:
        facts.append(f"weights {', '.join(map(make_printable, versions))}")
    return facts


def format_sample(sample: KeptSample, max_characters: int = 0) -> str:
    """Return a sample as lines for a terminal, without anything in it that moves a cursor.

    Args:
        sample: to format.
        max_characters: of prompt and of response, whose middle is left out beyond; 0: no bound.
    """
    kept_as = ", ".join(map(make_printable, sample.kept_as))
    title = f"step {sample.step} · {sample.split} · prompt {sample.prompt_index}, sample {sample.member} · {kept_as}"
    lines = [_RULE, title, " · ".join(describe(sample)), ""]
    texts = [("prompt", sample.prompt), *list_parts(sample), *([("answer", sample.answer)] if sample.answer else [])]
    for name, text in texts:
        lines += [f"[{name}]", make_printable(shorten(text, max_characters)), ""]
    return "\n".join(lines[:-1])


def list_parts(sample: KeptSample) -> list[tuple[str, str]]:
    """Return the response under its name; of a conversation each turn, and each reply as the model read it.

    Returns:
        Pairs of name and text. The reply that ended a conversation is its messages: the model did not read it.
    """
    if not sample.turns:
        return [("response", sample.response)]
    texts, parts = sample.token_texts, []
    starts = [turn["start"] for turn in sample.turns]
    for i, (turn, following) in enumerate(zip(sample.turns, [*starts, sample.length][1:], strict=True), start=1):
        parts.append((f"turn {i}", "".join(texts[turn["start"] : turn["end"]])))
        reply = "".join(texts[turn["end"] : following])
        reply = reply or (format_last_reply(sample) if i == len(sample.turns) else "")
        paid = "" if turn["reward"] is None else f", reward {turn['reward']:.4g}"
        if reply or paid:
            parts.append((f"reply {i}{paid}", reply))
    return parts


def format_last_reply(sample: KeptSample) -> str:
    """Return the messages of the reply that ended a conversation, which the model did not read; empty without any."""
    messages = sample.turns[-1]["messages"] if sample.turns else []
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def shorten(text: str, limit: int) -> str:
    """Leave out the middle of a long text.

    Args:
        text: to shorten.
        limit: characters that remain; 0: no bound.
    """
    if not limit or len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def differing_fraction(sample: KeptSample) -> float:
    """Return the share of (token, layer) routes of prompt and response that differ."""
    rows = max(len(sample.tokens) - 1, 1) * max(sample.moe_layers, 1)
    return sum(layers for _, layers in sample.routes_differ or ()) / rows
