"""What sources must agree on besides their tensors: how a model computes, and which token a row of the vocabulary is.

Weights are averaged element by element, so they must mean the same. Two checkpoints with the same tensors do not if one
was trained with another rotary base or another number of chosen experts, or numbers its tokens otherwise. Compared are

    values         of `config.json` or Megatron-LM's arguments (`source_configs`): those that change the forward pass
                   are refused, unless `merge.allow_different` names them; begin, end and padding tokens are said, and
                   are those of `merge.tokenizer`'s source; others are said
    tokenizers     by id: two texts under one id are refused, unless `merge.allow_different` names `tokenizer`. Ids that
                   only one source has (an instruct model's added tokens) and sources without a tokenizer are said

What the tensors themselves show, the number of layers, experts and rows and tied embeddings, is the plan's business.
The output has the `config.json` of the base.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.iterations import resolve_iteration
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.source_configs import (
    FORWARD,
    SILENT,
    TOKEN_IDS,
    changes_forward,
    differing_values,
    read_source_configs,
)
from megatron_bai.merge.recipe.token_texts import has_chat_template, read_token_texts

TOKENIZER = "tokenizer"
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Difference:
    """Something that sources say differently, and goes on nevertheless.

    Attributes:
        key: of `config.json`, or `tokenizer`.
        values: by the source's path, as text.
        outcome: whose the output has, or what that means for it.
    """

    key: str
    values: dict[str, str]
    outcome: str

    def __str__(self) -> str:
        """Format it in a line."""
        listed = ", ".join(f"{value} ({path})" for path, value in self.values.items())
        return f"{self.key}: {listed}; {self.outcome}"


@dataclass(frozen=True)
class Agreement:
    """How far sources agree, and whose tokenizer the output has.

    Attributes:
        differences: that are allowed.
        tokenizer: directory of the source whose tokenizer, chat template and generation config the output has.
        token_ids: that `config.json` gets from there; empty where that is the base.
    """

    differences: tuple[Difference, ...]
    tokenizer: Path
    token_ids: dict[str, Any]


def compare_sources(base: Path, others: Sequence[Path], allowed: Sequence[str], tokenizer: Path | None) -> Agreement:
    """Compare what sources say about the forward pass and their tokens.

    Args:
        base: of which the output has the `config.json`.
        others: the other sources.
        allowed: `merge.allow_different`: keys of `config.json`, or `tokenizer`, that may differ.
        tokenizer: whose tokenizer the output has; None: the base's, or that of the first of the others that has one.

    Raises:
        UserError: they differ in what changes the forward pass or the tokens, or `allowed` has an unknown name.
    """
    paths = list(dict.fromkeys((base, *others)))
    configs = read_source_configs(paths)
    keys = sorted({key for config in configs.values() for key in config})
    known = {TOKENIZER, *FORWARD, *SILENT, *keys, *(_last_part(key) for key in keys)}
    for name in allowed:
        if name not in known:
            near = difflib.get_close_matches(name, [*sorted(FORWARD), *keys, TOKENIZER], n=1)
            hint = f"; did you mean {near[0]}?" if near else ", or tokenizer"
            raise UserError(
                f"merge.allow_different names {name!r}, which no source has: give keys of config.json{hint}"
            )
    texts = {path: read_token_texts(path) for path in paths}
    chosen = tokenizer or next((path for path in paths if texts[path]), base)
    all_differing = {key: values for key in keys if (values := differing_values(configs, key))}
    refused = {
        key: values
        for key, values in all_differing.items()
        if changes_forward(key) and key not in allowed and _last_part(key) not in allowed
    }
    if refused:
        raise UserError(_refusal(refused, base, allowed))
    differences = []
    for key, differing in all_differing.items():
        owner = chosen if key in TOKEN_IDS else base
        shown = {str(path): _format(value) for path, value in differing.items()}
        differences.append(Difference(key, shown, f"taken: that of {owner}"))
    differences += _compare_tokens(texts, TOKENIZER in allowed, chosen)
    templates = [path for path in paths if has_chat_template(path)]
    if templates and chosen not in templates:
        outcome = (
            f"the output has none, as {chosen} has none; merge.tokenizer={templates[0]} takes that one's tokenizer"
        )
        differences.append(Difference("chat template", {str(path): "has one" for path in templates}, outcome))
    ids = {key: configs[chosen].get(key) for key in TOKEN_IDS if key in all_differing and chosen in configs}
    return Agreement(tuple(differences), chosen, {} if chosen == base else ids)


def _last_part(key: str) -> str:
    """Return the name of a key within the section that it is in."""
    return key.rpartition(".")[2]


def find_repeated(pretrained: str, members: Sequence[str]) -> list[Difference]:
    """Describe checkpoints that are named more than once, whose weights are added.

    Args:
        pretrained: resolved path; may be empty.
        members: resolved paths.
    """
    names: dict[str, list[str]] = {}
    for name, path in ((PRETRAINED, pretrained), *((f"member {i}", member) for i, member in enumerate(members, 1))):
        names.setdefault(path, []).append(name)
    return [
        Difference("named more than once", {path: " and ".join(each)}, "one checkpoint: its weights are added")
        for path, each in names.items()
        if path and len(each) > 1
    ]


def choose_tokenizer(setting: str, pretrained: str, members: Sequence[str]) -> Path | None:
    """Return the source that `merge.tokenizer` names; None where it is empty.

    Args:
        setting: `pretrained`, a member's number from 1, its path or the last part of it.
        pretrained: resolved path; may be empty.
        members: resolved paths.

    Raises:
        UserError: it names none of them.
    """
    if not setting:
        return None
    paths = [*([pretrained] if pretrained else []), *members]
    numbers = {str(index): member for index, member in enumerate(members, 1)}
    if pretrained:
        numbers[PRETRAINED] = pretrained
    if setting in numbers:
        return Path(numbers[setting])
    resolved = str(resolve_iteration(setting).resolve())
    if resolved in paths:
        return Path(resolved)
    named = list(dict.fromkeys(path for path in paths if Path(path).name == setting))
    if len(named) > 1:
        raise UserError(
            f"merge.tokenizer is {setting!r}, the last part of {' and of '.join(named)}: give the whole path"
        )
    if not named:
        choices = [*([PRETRAINED] if pretrained else []), *(str(index) for index in range(1, len(members) + 1))]
        raise UserError(
            f"merge.tokenizer is {setting!r}: choose {', '.join(choices)} (a member's number) or the path of a source"
        )
    return Path(named[0])


def _refusal(differing: dict[str, dict[Path, Any]], base: Path, allowed: Sequence[str]) -> str:
    """Return the line that refuses different values of some keys."""
    pairs = []
    for key, values in differing.items():
        first = next(iter(values))
        other = next(path for path in values if values[path] != values[first])
        pairs.append(f"{key} is {_format(values[first])} in {first} and {_format(values[other])} in {other}")
    names = ",".join([*allowed, *differing])
    return (
        f"{'; '.join(pairs)}: such weights do not compute the same; 'merge.allow_different=[{names}]' merges them"
        f" nevertheless, and the output has the values of {base}"
    )


def _compare_tokens(texts: dict[Path, dict[int, str]], allowed: bool, chosen: Path) -> list[Difference]:
    """Compare tokenizers id by id; refuse two texts under one id unless that is allowed."""
    known = {path: tokens for path, tokens in texts.items() if tokens}
    differences = []
    if known and len(known) < len(texts):
        missing = {str(path): "none" for path in texts if path not in known}
        differences.append(Difference(TOKENIZER, missing, f"not compared; taken: that of {chosen}"))
    all_tokens: dict[int, tuple[str, Path]] = {}
    conflicts: dict[int, tuple[Path, Path]] = {}
    for path, tokens in known.items():
        for index, text in tokens.items():
            first = all_tokens.setdefault(index, (text, path))
            if first[0] != text:
                conflicts.setdefault(index, (first[1], path))
    if conflicts:
        index = min(conflicts)
        a, b = conflicts[index]
        values = {str(path): repr(known[path][index]) for path in (a, b)}
        if not allowed:
            raise UserError(
                f"token {index} is {values[str(a)]} in {a} and {values[str(b)]} in {b} ({len(conflicts)} ids differ):"
                " rows of different tokens must not be averaged; 'merge.allow_different=[tokenizer]' does so"
                " nevertheless"
            )
        outcome = f"the first of {len(conflicts)} ids that differ; taken: those of {chosen}"
        differences.append(Difference(f"token {index}", values, outcome))
    for path, tokens in known.items():
        only = [index for index in all_tokens if index not in tokens]
        if only:
            index = min(only)
            text, owner = all_tokens[index]
            outcome = f"the first of {len(only)} ids without a token there: its rows are merged as they are"
            differences.append(Difference(f"token {index}", {str(owner): repr(text), str(path): "none"}, outcome))
    return differences


def _format(value: Any) -> str:
    """Return a value as JSON has it."""
    return json.dumps(value, sort_keys=True, default=str)
