"""The words of a command line: texts and paths as typed, mappings with any key, unknown names with the nearest known.

Hydra's grammar reads `20251128_0931` as a number and stops at `~`, at an umlaut or at a bracket. So the value of a
setting that is a text is quoted here before Hydra sees it, unless it is quoted already; `${group.key}` in it stays a
reference. The values of a mapping such as `merge.alpha_for` are read here altogether: Hydra takes neither quoted keys
nor new ones.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from omegaconf import MISSING

from megatron_bai import config
from megatron_bai.config.limits import limits_of
from megatron_bai.errors import UserError

_WORD = re.compile(r"(\+{0,2})([A-Za-z_]\w*(?:\.[^=\s]+)?)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)  # Hydra's functions
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclasses.dataclass(frozen=True)
class Override:
    """One word `group.key=value`.

    Attributes:
        prefix: `+` or `++`, which Hydra reads, or empty.
        key: dotted name; of one key of a mapping too.
        value: as typed.
        setting: the dotted name of the setting, without a mapping's key.
        kind: its type as text, such as `str`, `list[str]` or `dict[str, float]`; empty: no setting of ours.
    """

    prefix: str
    key: str
    value: str
    setting: str
    kind: str


def parse_word(word: str) -> Override | None:
    """Split a word of the command line; return None for a flag of Hydra's, a deletion and what is left to Hydra.

    Raises:
        UserError: it is no `group.key=value`, or no group has such a setting.
    """
    if word.startswith("~"):
        return None
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{ascii(word)} is no text in this locale's encoding: set PYTHONUTF8=1, or give what it names an ASCII name"
        ) from None
    match = _WORD.fullmatch(word)
    if match is None:
        if word.startswith("-") or "=" not in word:
            raise UserError(
                f"{word!r} is no setting: write group.key=value; `megatron-bai VERB --help` lists what there is"
            )
        return None  # such as hydra/… and group@package=…: Hydra's
    prefix, key, value = match.groups()
    group, _, rest = key.partition(".")
    if group == "hydra":
        return None
    kinds = setting_types()
    if not rest:
        groups = [path.name for path in sorted(config.conf_dir().iterdir()) if path.is_dir()]
        if group not in [*groups, *(field.name for field in dataclasses.fields(config.Config))]:
            near = difflib.get_close_matches(key, groups, n=1, cutoff=0.75)
            raise UserError(f"there is no setting {key}{_hint(key, kinds, *near)}")
        return Override(prefix, key, value, key, "")
    name = f"{group}.{rest.partition('.')[0]}"
    if name not in kinds:
        raise UserError(f"there is no setting {name}{_hint(name, kinds)}")
    if "." in rest and not kinds[name].startswith("dict"):
        raise UserError(f"{name} has no setting {rest.partition('.')[2]!r} of its own: write {name}=VALUE")
    return Override(prefix, key, value, name, kinds[name])


@cache
def setting_types() -> dict[str, str]:
    """Return the type of every setting of every choice of every group, as text by dotted name."""
    found: dict[str, str] = {}
    for group in dataclasses.fields(config.Config):
        for kind in _descendants(getattr(config, group.name.capitalize())):
            for field in dataclasses.fields(kind):
                text = getattr(field.type, "__name__", "") if isinstance(field.type, type) else ""
                whole = str(field.type).replace("typing.", "")
                found[f"{group.name}.{field.name}"] = text if text in ("str", "int", "float", "bool") else whole
    return found


@cache
def setting_choices() -> dict[str, tuple[str, ...]]:
    """Return the choices of every setting that has some, by dotted name."""
    return {
        f"{group.name}.{field.name}": limits_of(field).choices
        for group in dataclasses.fields(config.Config)
        for kind in _descendants(getattr(config, group.name.capitalize()))
        for field in dataclasses.fields(kind)
        if limits_of(field).choices
    }


def _descendants(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all classes that derive from it, those of other packages too."""
    yield kind
    for child in kind.__subclasses__():
        yield from _descendants(child)


def _hint(name: str, known: dict[str, str], near: str = "") -> str:
    near = near or nearest_setting(name, known)
    return f": did you mean {near}?" if near else ": `megatron-bai VERB --help` lists those of a verb"


def nearest_setting(name: str, known: Iterable[str]) -> str:
    """Return the known setting that a name most likely means, or an empty text.

    That is one that differs little, one whose words have these initials, or the same key of another group.

    Args:
        name: dotted, or a key alone.
        known: dotted names.
    """
    group, _, key = name.rpartition(".")
    if same := [each for each in known if each.partition(".")[2] == key]:
        return same[0]
    own = [each for each in known if each.startswith(f"{group}.")]
    for candidates in (own, list(known)):
        keys = {each.partition(".")[2]: each for each in reversed(candidates)}
        initials = {"".join(part[0] for part in each.split("_") if part): keys[each] for each in reversed(keys)}
        if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75 if candidates is own else 0.85):
            return keys[close[0]]
        if len(key) > 1 and key in initials:
            return initials[key]
        if parts := [each for each in keys if len(key) > 3 and (key in each or each in key and len(each) > 3)]:
            return keys[min(parts, key=len)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return close[0] if close else ""


def quote(text: str) -> str:
    """Return a text as Hydra's grammar has it, quoted."""
    escaped = re.sub(r"(\\*)'", lambda match: 2 * match[1] + "\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{trailing * chr(92)}'"


def quote_value(override: Override) -> str:
    """Return an override of a text or a list of texts as Hydra's grammar has it, each text as it was typed.

    Raises:
        UserError: the value of a list is none.
    """
    value = override.value
    if override.kind.startswith("list") and not value.startswith("${"):
        inner = value.strip()
        if not (inner.startswith("[") and inner.endswith("]")):
            raise UserError(f"{override.key} is a list: write '{override.key}=[{value}]'")
        texts = [each.strip() for each in split_values(inner[1:-1])] if inner[1:-1].strip() else []
        for index, text in enumerate(texts):
            _require_text(f"{override.key}[{index}]", text)
        value = f"[{','.join(map(_quote_unless_quoted, texts))}]"
    else:
        _require_text(override.key, value)
        _require_one_value(override)
        value = _quote_unless_quoted(value)
    return f"{override.prefix}{override.key}={value}"


def _require_text(name: str, text: str) -> None:
    """Refuse Hydra's `???`, and a reference that does not end."""
    if text == MISSING:
        raise UserError(f"{name} is {text}, which means that it is not given: leave it out")
    if text.count("${") != len(re.findall(r"\$\{[^{}$]+\}", text)):
        raise UserError(f"{name}: in {text} `${{` begins a reference, as in `${{run.dir}}`, and none ends")


def _require_one_value(override: Override) -> None:
    """Refuse a text that is a list of values for `--multirun`."""
    value = override.value
    choices = setting_choices().get(override.setting, ())
    if "," in value and len(set(value.split(",")) & set(choices)) > 1:
        raise UserError(f"{override.key}={value} lists several values: --multirun runs each; choose one without it")


def _quote_unless_quoted(text: str) -> str:
    return text if _QUOTED.fullmatch(text) else quote(text)


def split_values(text: str) -> list[str]:
    """Split a text at its commas, but for those in quotes that begin a value and in brackets that are closed."""
    values, start, i = [], 0, 0
    while i < len(text):
        if text[i] in "'\"" and not text[start:i].strip():
            match = _QUOTED.match(text, i)
            i = match.end() if match else i + 1
        elif text[i] in _BRACKETS:
            i = _closing(text, i) + 1
        elif text[i] == ",":
            values.append(text[start:i])
            start = i = i + 1
        else:
            i += 1
    return [*values, text[start:]]


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`; `start` itself where none does."""
    opened, closed, depth = text[start], _BRACKETS[text[start]], 0
    for i in range(start, len(text)):
        depth += (text[i] == opened) - (text[i] == closed)
        if not depth:
            return i
    return start


def sweep_values(word: str) -> list[str] | None:
    """Return the overrides that a word of `--multirun` stands for, one a value; None where Hydra's grammar says it.

    Args:
        word: of a text, a list of texts or a mapping, whose commas separate values unless they are quoted.
    """
    override = parse_word(word)
    if override is None or not _is_ours(override) or _SWEEP.fullmatch(override.value.strip()):
        return None
    return [f"{override.prefix}{override.key}={value}" for value in split_values(override.value)]


def _is_ours(override: Override) -> bool:
    return override.kind in ("str", "list[str]") or override.kind.startswith("dict[") and "Any" not in override.kind


def for_hydra(words: Sequence[str]) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Return the overrides as Hydra reads them, and the values of mappings, which are set after it.

    Raises:
        UserError: names the word that is no setting or cannot be read.
    """
    overrides, mappings = [], []
    for word in words:
        override = parse_word(word)
        if override is None or not override.kind:
            overrides.append(word)
        elif override.kind == "dict[str, Any]":
            overrides.append(f"++{override.key}={override.value}")  # its keys are new ones
        elif override.kind.startswith("dict["):
            mappings.append((override.setting, _parse_mapping(override)))
        elif _is_ours(override):
            overrides.append(quote_value(override))
        else:
            overrides.append(word)
    return overrides, mappings


def _parse_mapping(override: Override) -> dict[str, Any]:
    """Return the values that a word gives a mapping, by key."""
    value, setting = override.value.strip(), override.setting
    if override.key != setting:
        return {override.key[len(setting) + 1 :]: _parse_entry(override, override.key, value)}
    if not (value.startswith("{") and value.endswith("}")):
        raise UserError(f"{setting} is a mapping: write '{setting}={{KEY: VALUE}}'")
    entries: dict[str, Any] = {}
    for pair in split_values(value[1:-1]) if value[1:-1].strip() else []:
        key, colon, text = pair.rpartition(":")
        key = key.strip()
        if not colon or not key:
            raise UserError(f"{setting}: {pair.strip()!r} is no KEY: VALUE; a key with a comma or a colon is quoted")
        key = _unquote(key)
        if key in entries:
            raise UserError(f"{setting} names {key!r} twice: give each pattern once")
        entries[key] = _parse_entry(override, f"{setting}[{key}]", text.strip())
    return entries


def _unquote(text: str) -> str:
    if not _QUOTED.fullmatch(text):
        return text
    return re.sub(rf"\\([\\{text[0]}])", r"\1", text[1:-1]) if f"\\{text[0]}" in text[1:-1] else text[1:-1]


def _parse_entry(override: Override, name: str, text: str) -> Any:
    if text.startswith("${"):
        return text
    if override.kind.endswith("str]"):
        return _unquote(text)
    if not override.kind.endswith("list[float]]"):
        return _parse_number(name, text)
    if not (text.startswith("[") and text.endswith("]")):
        raise UserError(f"{name} is {text!r}: write a list, as in [0.5, 0.5]")
    return [_parse_number(name, each.strip()) for each in split_values(text[1:-1])] if text[1:-1].strip() else []


def _parse_number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}: give a number") from None
