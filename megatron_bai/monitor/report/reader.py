"""The samples that a report shows: which of those that runs kept, within a bound, and as data for the page's script.

Texts are data to the script, which puts them into the page as text: no markup in them is read.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.monitor.samples.printable import make_printable
from megatron_bai.monitor.samples.show import describe, differing_fraction, format_last_reply, shorten

_log = logging.getLogger(__name__)

MAX_CHARACTERS = 3_000_000  # of all samples of a page, about
_MAX_TOKENS = 1500  # of a response: beyond, its middle is left out
_MAX_PROMPT = 6000  # characters of a prompt, and of an answer, likewise
_TOKEN_CHARACTERS = 24  # of a token's numbers in the page
_SAMPLE_CHARACTERS = 500  # of a sample's other fields


@dataclass
class ReaderData:
    """What the page's reader has of all runs.

    Attributes:
        samples: as the script reads them.
        notes: what was left out, a sentence each.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_samples(runs: Sequence[tuple[str, Path, list[int]]], max_characters: int = MAX_CHARACTERS) -> ReaderData:
    """Read samples of runs for a page.

    First come those of the last and the first step and of alarms, then of steps in between, evenly, while they fit.

    Args:
        runs: name, directory and steps of alarms of each.
        max_characters: of all samples together, about; the runs share it equally.
    """
    data = ReaderData()
    for name, directory, alarm_steps in runs:
        steps = store.list_steps(directory)
        shown: list[int] = []
        remaining, number = max_characters // len(runs), 0
        for step in _order_steps(steps, alarm_steps):
            try:
                samples = store.read_step(directory, step)
            except UserError as error:
                _log.warning("%s; left out of the report", error)
                data.notes.append(f"{error}.")
                continue
            entries = [_make_entry(sample, name) for sample in samples]
            size = sum(map(_estimate_characters, entries))
            if size > remaining and shown:
                break
            while entries and size > remaining:  # of the first step that is tried as many as fit
                size -= _estimate_characters(entries.pop())
            remaining -= size
            shown.append(step)
            number += len(entries)
            data.samples += entries
        if len(shown) < len(steps):
            data.notes.append(
                f"{name}: {number} samples of {len(shown)} of the {len(steps)} steps that keep any are in this page; "
                f"`megatron-bai samples samples.run={directory} samples.step=…` prints the others."
            )
    data.samples.sort(key=lambda entry: entry["step"])
    return data


def _order_steps(steps: list[int], alarm_steps: list[int]) -> list[int]:
    """Return the steps in the order of their importance: last, first, those of alarms, then ever finer in between."""
    between = [steps[i] for i in _bisect(0, len(steps) - 1)]
    ends = [*steps[-1:], *steps[:1], *(step for step in alarm_steps if step in steps)]
    return list(dict.fromkeys([*ends, *between]))


def _bisect(low: int, high: int) -> Iterator[int]:
    """Yield the indices between two, those that halve the widest gaps first."""
    gaps = [(low, high)]
    while gaps:
        later = []
        for left, right in gaps:
            if right - left > 1:
                middle = (left + right) // 2
                yield middle
                later += [(left, middle), (middle, right)]
        gaps = later


def _make_entry(sample: KeptSample, run: str) -> dict[str, Any]:
    """Return a sample as the script reads it: texts are printable, and the middle of a long response is left out."""
    texts, routes = [make_printable(text) for text in sample.token_texts], sample.token_routes
    training = sample.logprobs_training or [None] * sample.length
    tokens = list(zip(texts, training, sample.logprobs_inference, routes, sample.from_environment, strict=True))
    left_out = max(len(tokens) - _MAX_TOKENS, 0)
    if left_out:
        tokens[_MAX_TOKENS // 2 : -_MAX_TOKENS // 2] = []
    columns = [list(column) for column in zip(*tokens, strict=True)] or [[], [], [], [], []]
    return {
        "run": run,
        "step": sample.step,
        "split": sample.split,
        "index": sample.prompt_index,
        "member": sample.member,
        "kept": [make_printable(name) for name in sample.kept_as],
        "facts": describe(sample),
        "prompt": make_printable(shorten(sample.prompt, _MAX_PROMPT)),
        "answer": make_printable(shorten(sample.answer, _MAX_PROMPT)),
        "reward": sample.reward,
        "length": sample.length,
        "discrepancy": sample.discrepancy,
        "mismatch": None if sample.routes_differ is None else differing_fraction(sample),
        "layers": sample.moe_layers,
        "texts": columns[0],
        "training": [None if value is None else round(value, 5) for value in columns[1]],
        "inference": [None if value is None else round(value, 5) for value in columns[2]],
        "routes": columns[3],
        "last_reply": make_printable(shorten(format_last_reply(sample), _MAX_PROMPT)),
        "given": [int(value) for value in columns[4]] if sample.turns else [],
        "left_out": left_out,
        "head": _MAX_TOKENS // 2 if left_out else 0,
    }


def _estimate_characters(entry: dict[str, Any]) -> int:
    """Estimate the size of an entry in the page; what is not ASCII is an escape of six characters there."""
    texts = (entry["prompt"], entry["answer"], entry["last_reply"], *entry["texts"], *entry["facts"])
    characters = sum(len(text) if text.isascii() else 6 * len(text) for text in texts)
    return characters + _TOKEN_CHARACTERS * len(entry["texts"]) + _SAMPLE_CHARACTERS
