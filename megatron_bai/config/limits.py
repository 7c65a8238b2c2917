"""What a setting is and what it may be: metadata of the fields in `config/`, which help, docs and checks read.

A field is declared with its range or its choices, which are checked once, before any work, for every verb, and by no
other module again; what contradicts another setting is checked beside the code that reads both. `--help` and
docs/settings.md print the text.

    concurrency: int = number(64, "requests in flight from one client", at_least=1)
    sync: str = setting("disk", "how weights travel", choices=("disk", "tensors", "group"))
    output: str = path("", "a directory")
    overlap: bool = setting(False, "sample the next step's groups while this one trains")

A class that gives a setting of its base another default need not repeat the text.

Limits of a list or of a mapping are those of each of its values. An unset optional value (None) is allowed.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from megatron_bai.errors import UserError

LONGEST_S = 1e8  # three years: more seconds overflow what torch and the operating system count a time limit in
LARGEST_PORT = 65535
LARGEST_SEED = 2**32 - 1  # torch and numpy take it, also with a rank's offset added
_LARGEST_INT = 2**63 - 1
_LIMITS, _HELP = "megatron_bai", "help"  # keys of the fields' metadata


@dataclass(frozen=True)
class Limits:
    """What the values of a setting may be.

    Attributes:
        at_least: inclusive lower limit, or None; at most one of it and `above`.
        above: exclusive lower limit, or None.
        at_most: inclusive upper limit, or None; at most one of it and `below`.
        below: exclusive upper limit, or None.
        finite: whether infinity is refused. NaN always is.
        choices: the only values of a text, or empty.
        keys: the only keys of a mapping, or empty.
        is_number: whether it is a number.
        is_path: whether it is a path, in which a leading `~` is the home directory.
        is_checkpoint: whether that names a checkpoint to read: Megatron-LM's save directories stand for one, too.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    finite: bool = True
    choices: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    is_number: bool = False
    is_path: bool = False
    is_checkpoint: bool = False

    def allow(self, value: float) -> bool:
        """Return whether a number is within the limits."""
        if math.isnan(value) or self.finite and math.isinf(value):
            return False
        if isinstance(value, int) and self.at_most is None and value > _LARGEST_INT:
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def describe(self) -> str:
        """Return the limits of a number in words, such as `at least 1`, or the choices; empty where there are none."""
        if self.choices:
            return join_choices(self.choices)
        if self.at_least is not None and self.at_most is not None:
            return f"from {_format(self.at_least)} to {_format(self.at_most)}"
        parts = [
            f"{words} {_format(limit)}"
            for words, limit in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if limit is not None
        ]
        return " and ".join(parts) or ("a finite number" if self.is_number and self.finite else "")


def setting(default: Any, help: str = "", *, choices: Iterable[str] = (), keys: Iterable[str] = ()) -> Any:
    """Declare a text that is one of some names, a mapping or list of such, or a setting whose every value is allowed.

    Args:
        default: the value, `list` or `dict` for an empty one, or omegaconf's MISSING.
        help: what it means; empty: what the base class says.
        choices: all names that are allowed, the empty text among them where the setting may be left empty; none: any.
        keys: the only keys of a mapping.
    """
    return _declare(default, Limits(choices=tuple(choices), keys=tuple(keys)), help)


def number(
    default: Any,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> Any:
    """Declare a number, or a list or mapping of numbers, within limits; see `Limits`.

    Args:
        default: as for `setting`.
        help: likewise.
        at_least: inclusive lower limit.
        above: exclusive lower limit.
        at_most: inclusive upper limit.
        below: exclusive upper limit.
        finite: whether infinity is refused.
    """
    return _declare(default, Limits(at_least, above, at_most, below, finite, is_number=True), help)


def choice(default: Any, *names: str, keys: Iterable[str] = ()) -> Any:
    """Declare a text that is one of some names, as `setting` does: the form that objectives of other packages have.

    Args:
        default: as for `setting`.
        names: its `choices`.
        keys: likewise.
    """
    return setting(default, choices=names, keys=keys)


def path(default: Any, help: str = "") -> Any:
    """Declare a path, or a list of paths: a text as typed, in which a leading `~` is the home directory.

    Args:
        default: the value, or `list` for an empty one.
        help: as for `setting`.
    """
    return _declare(default, Limits(is_path=True), help)


def checkpoint_path(default: Any, help: str = "") -> Any:
    """Declare the path of a checkpoint that is read, or a list of such paths.

    Args:
        default: the value, or `list` for an empty one.
        help: as for `setting`.
    """
    return _declare(default, Limits(is_path=True, is_checkpoint=True), help)


def limits_of(declared: "Field[Any]") -> Limits:
    """Return the limits of a dataclass's field; of one that declares none, an empty one."""
    limits: Limits = declared.metadata.get(_LIMITS, Limits())
    return limits


def describe_limits(declared: "Field[Any]") -> str:
    """Return in words what a dataclass's field may be, such as `at least 1`; empty where nothing is declared."""
    return limits_of(declared).describe()


def help_of(kind: type[Any], name: str) -> str:
    """Return what a setting means, as its class declares it or the nearest base class that does; empty where none.

    Args:
        kind: a dataclass of settings.
        name: of one of its fields.
    """
    declared = (each.__dataclass_fields__.get(name) for each in kind.__mro__ if is_dataclass(each))
    return next(filter(None, (each.metadata.get(_HELP, "") for each in declared if each)), "")


def _declare(default: Any, limits: Limits, help: str) -> Any:
    metadata = {_LIMITS: limits, _HELP: help}
    if default in (list, dict):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def validate_ranges(settings: Any) -> None:
    """Refuse every number outside its range and every text that is none of its choices.

    Args:
        settings: the whole `Config`.

    Raises:
        UserError: names the setting, its value and what is allowed.
    """
    for group in fields(settings):
        validate_group(group.name, getattr(settings, group.name))


def validate_group(name: str, group: Any) -> None:
    """Refuse what `validate_ranges` does, in one group.

    Args:
        name: of the group, as in `trainer.steps`.
        group: its settings, a dataclass; fields without declared limits are not looked at.

    Raises:
        UserError: as `validate_ranges`.
    """
    if not is_dataclass(group):
        return
    # Choices first: of `merge.method=slurp merge.density=9` the method is what has to be mended.
    for declared in sorted(fields(group), key=lambda each: not limits_of(each).choices):
        limits = limits_of(declared)
        if limits.keys:
            for key in getattr(group, declared.name):
                if key not in limits.keys:
                    raise UserError(unknown_name(f"{name}.{declared.name} names {key!r}", key, limits.keys))
        for label, value in _values(f"{name}.{declared.name}", getattr(group, declared.name)):
            if limits.keys:  # they are names, not patterns
                label = label.replace("[", ".").replace("]", "")
            _validate_value(label, value, limits)


def _validate_value(label: str, value: Any, limits: Limits) -> None:
    if limits.is_number and isinstance(value, int | float) and not isinstance(value, bool):
        if not limits.allow(value):
            too_large = isinstance(value, int) and value > _LARGEST_INT and limits.at_most is None
            wanted = f"at most {_LARGEST_INT}" if too_large else limits.describe() or "a number"
            raise UserError(f"{label} is {_format(value)}: it must be {wanted}")
    elif limits.choices and isinstance(value, str) and value not in limits.choices:
        raise UserError(unknown_name(f"{label} is {value!r}", value, limits.choices))


def _values(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a setting's values, each with its name: those of a list or mapping one by one."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _values(f"{label}[{key}]", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _values(f"{label}[{index}]", each)
    elif value is not None and value is not MISSING:
        yield label, value


def is_set(group: Any, name: str) -> bool:
    """Return whether a setting has another value than its default.

    Args:
        group: of settings, a dataclass whose fields all have defaults.
        name: of the field.
    """
    return bool(getattr(group, name) != getattr(type(group)(), name))


def unknown_name(said: str, name: str, known: Iterable[str]) -> str:
    """Return a line about a name that is none of the known ones, with the nearest of them or all.

    Args:
        said: the beginning of the line, such as `replay.mode is 'r4'`.
        name: the unknown one.
        known: those that are allowed, the empty text where it is.
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), [each for each in known if each], n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{said}: choose {join_choices(known)}{hint}"


def join_choices(names: Iterable[str]) -> str:
    """Return names as text: `a, b or c`, and `or leave it empty` where the empty one is allowed."""
    names = list(names)
    shown = [name for name in names if name]
    text = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else "".join(shown)
    return f"{text}, or leave it empty" if "" in names else text


def _format(value: float) -> str:
    """Return a number as one would type it."""
    return str(value) if isinstance(value, int) else f"{value:.12g}"
