"""The interface of a merge method, resolved before any file is opened; each method is a file of `methods/`.

Every method gives each source a weight in each tensor (`terms`). For a weighted sum Σ coefficient · value these are the
coefficients, and nothing more is needed. There are two extensions:

- A method with `stats_passes` reads the sources that many times beforehand and measures each slice (`slices`: the
  parameter of one layer or expert). The coefficients of its weighted sum may differ between slices (`coefficients`).
- A method that is `elementwise` is no weighted sum: `combine` computes its values.

The weights of methods on task vectors τ_i = M_i − M_pretrained are those of τ_i; their `terms` give the pretrained
checkpoint 1.
"""

import dataclasses
import glob
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch

from megatron_bai.checkpoint.iterations import resolve_iteration
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.slices import SliceBox
from megatron_bai.merge.tensor_names.param_groups import matches, parse_layers
from megatron_bai.utils.dataclass_defaults import read_defaults

T = TypeVar("T")
ReadBlocks = Callable[[], Iterator[torch.Tensor]]  # yields a slice's values, some rows at a time
SliceStats = tuple[float, ...]  # of one slice, as its method defines them

NON_SETTINGS = ("method", "pretrained", "members", "terms")  # keys of `Recipe.describe` that are no settings
# The settings of methods that fingerprints always had; one that came later enters them unless it has its default.
ORIGINAL_SETTINGS = (
    "weights", "weights_for", "normalize", "alpha", "alpha_for", "t", "t_for", "scale", "density", "drop_rate", "seed",
)  # fmt: skip
WEIGHT_SUM_TOLERANCE = 1e-6  # how far weights that must sum to 1 may be from it: the error of seven decimals


@dataclass(frozen=True)
class Term:
    """A source and its weight: in a weighted sum, `coefficient` (float64) times the checkpoint at `source`."""

    source: str
    coefficient: float


@dataclass(frozen=True)
class Recipe(ABC):
    """A merge method with its settings: the fields of a method are the settings it uses.

    Args:
        pretrained: the base checkpoint, or empty where the method has none.
        members: the other checkpoints.

    Raises:
        UserError: a checkpoint is missing, a number is outside its range, or a pattern is no regular expression.
    """

    method: ClassVar[str]
    title: ClassVar[str]  # with the paper, for people
    sweep_setting: ClassVar[str] = ""  # the setting that `merge.sweep` gives values for; empty: none
    stats_passes: ClassVar[int] = 0
    elementwise: ClassVar[bool] = False

    pretrained: str
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members or not all(self.members):
            raise UserError("merge.members is empty or holds an empty path: give the checkpoints to merge")
        for pattern in self.patterns:
            if (layers := parse_layers(pattern)) is not None and not layers:
                raise UserError(f"{pattern!r} names no layer: write the first before the last, as in layers.0-11")
            try:
                matches(pattern, "")
            except re.error as error:
                raise UserError(f"{pattern!r} is neither a parameter group nor a regular expression: {error}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the method, without the checkpoints; patterns last."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NON_SETTINGS}

    @cached_property  # asked for each tensor
    def patterns(self) -> tuple[str, ...]:
        """The patterns of all settings that have some."""
        return tuple(pattern for name, value in self.settings.items() if name.endswith("_for") for pattern, _ in value)

    @abstractmethod
    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return the sources, each once, and their weights; the first gives the output its layout and non-tensor state.

        Args:
            key: name of the tensor; None gives the terms of tensors that no pattern matches.
            layer: decoder layer of the tensor that is merged, from 0; None where it belongs to none.
        """

    def needs_stats(self, weights: Sequence[float]) -> bool:
        """Return whether a tensor with these weights must be measured; called for methods with `stats_passes`."""
        return True

    def measure_slice(self, read_blocks: ReadBlocks, name: str, num_elements: int) -> SliceStats:
        """Compute what `coefficients` or `combine` need of a whole slice.

        The result must depend neither on the order of the blocks nor on their number of rows.

        Args:
            read_blocks: yields the slice's values, float64 `[sources, …, columns]`; called `stats_passes` times.
            name: of the slice.
            num_elements: of the slice.
        """
        raise NotImplementedError

    def coefficients(self, weights: tuple[float, ...], stats: SliceStats | None) -> tuple[float, ...]:
        """Return the weighted sum's coefficients in a slice with these statistics, or in any tensor.

        Args:
            weights: of the sources that are read, in the tensor.
            stats: of the slice, from `measure_slice`; None where it was not measured.

        Returns:
            One for each weight; of a method that measures nothing, the weights.
        """
        return weights

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        """Compute the merged values of an elementwise method.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; must not be changed. Sources of
                weight 0 may be zero.
            weights: one for each source.
            slice_box: box of the elements.
            stats: of their slice, where it was measured.

        Returns:
            float64 `[elements]`; where a method does not move an element, the pretrained checkpoint's bits.
        """
        raise NotImplementedError

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the merged values by the method's plain formula, for `verify` and apart from what the executor does.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first.
            weights: one for each source.
            slice_box: box of the elements.
            stats: of their slice, where it was measured.

        Returns:
            float64 `[elements]` each: the values, and the sum of the magnitudes of their summands, which bounds the
            rounding of the executor's sums; infinite where rounding alone decides the value.
        """
        coefficients = torch.tensor(self.coefficients(tuple(weights), stats), dtype=torch.float64)
        summands = values * coefficients.unsqueeze(1)
        return summands.sum(0), summands.abs().sum(0)

    def summarize(self) -> str:
        """Format the settings in a line, such as `alpha 0.5, weights 0.25 0.75`."""
        return format_settings(self.settings)

    def describe(self) -> dict[str, Any]:
        """Return the recipe and its terms, as they are written to `provenance.json`."""
        return {
            "method": self.method,
            "pretrained": self.pretrained,
            "members": list(self.members),
            **_as_mappings(self.settings),
            "terms": [{"source": t.source, "coefficient": t.coefficient} for t in self.terms()],
        }

    def describe_defaults(self) -> dict[str, Any]:
        """Return the defaults of the method's settings as `describe` has them: those of merges older than a setting."""
        return _as_mappings({name: value for name, value in read_defaults(type(self)).items() if name in self.settings})

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what the merged values depend on besides the terms, for the fingerprint.

        A setting that a method gets later is left out where it has its default.
        """
        return {"method": self.method}


def _as_mappings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the pairs of patterns and values as mappings."""
    return {name: dict(value) if name.endswith("_for") else value for name, value in settings.items()}


@dataclass(frozen=True, kw_only=True)
class WeightedMethod(Recipe):
    """A method with a weight for each member.

    Args:
        weights: one for each member, finite; none where `weights_for` fits every tensor.
        weights_for: (pattern, weights) pairs that replace `weights` for the tensors that match the pattern, a parameter
            group's name or a regular expression; the first match decides.
    """

    weights: tuple[float, ...] = ()
    weights_for: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weights in self.all_weight_settings():
            if not weights and name == "merge.weights":
                raise UserError(
                    f"{name} is not given: merge.method={self.method} needs a weight for each of the"
                    f" {len(self.members)} members"
                )
            if len(weights) != len(self.members):
                raise UserError(f"{name} has {len(weights)} entries for {len(self.members)} members: give one a member")
            if not all(math.isfinite(w) for w in weights):
                raise UserError(f"{name} [{format_numbers(weights)}] holds a number that is not finite")

    def all_weight_settings(self) -> list[tuple[str, tuple[float, ...]]]:
        """Return every set of weights with its setting's name."""
        named = [(f"merge.weights_for[{pattern}]", weights) for pattern, weights in self.weights_for]
        return named if named and not self.weights else [("merge.weights", self.weights), *named]

    def weights_for_tensor(self, key: str | None, layer: int | None) -> tuple[float, ...]:
        """Return the weights of the members in one tensor, or in one layer of it.

        Args:
            key: name of the tensor, which patterns of `weights_for` match; None: `weights` apply.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.
        """
        return first_match("weights", self.weights_for, key, layer, self.weights or None)


def first_match(
    name: str, choices: Sequence[tuple[str, T]], key: str | None, layer: int | None, default: T | None
) -> T:
    """Return the value of the first pattern that matches a tensor, or this layer of it.

    Args:
        name: of the setting, for the error.
        choices: (pattern, value) pairs.
        key: name of the tensor; None matches no pattern.
        layer: decoder layer of it, from 0.
        default: the value where no pattern matches; None where it is not given: the first one's, of no tensor.

    Raises:
        UserError: no pattern matches the tensor, and there is no default.
    """
    matching = (value for pattern, value in choices if key is not None and matches(pattern, key, layer))
    value = next(matching, choices[0][1] if key is None and default is None else default)
    if value is None:
        raise UserError(f"merge.{name} is not given, and no pattern of merge.{name}_for fits {key}: give either")
    return value


def require_pretrained(recipe: Recipe) -> None:
    """Raise a UserError unless the recipe has a pretrained checkpoint."""
    if not recipe.pretrained:
        raise UserError("merge.pretrained is empty: give the base checkpoint's directory")


def require_distinct(recipe: Recipe) -> None:
    """Raise a UserError unless all checkpoints differ: a second mention would not just add to the weight."""
    paths = [path for path in (recipe.pretrained, *recipe.members) if path]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"merge.method={recipe.method} names {twice} twice: name each checkpoint once")


def require_no_negative(method: WeightedMethod, why: str) -> None:
    """Refuse negative weights.

    Args:
        method: whose weights are looked at, those of patterns too.
        why: what the method does to weights, for the message.

    Raises:
        UserError: names the setting and its weights.
    """
    for name, weights in method.all_weight_settings():
        if min(weights) < 0:
            raise UserError(f"{name} [{format_numbers(weights)}] holds a negative weight: {why}")


def expand_members(members: Sequence[str]) -> list[str]:
    """Replace patterns such as `run/checkpoints/step-*` by the directories that match, in the order of their numbers.

    Raises:
        UserError: a pattern matches no directory.
    """
    expanded: list[str] = []
    for member in members:
        if os.path.exists(member) or not glob.has_magic(member):
            expanded.append(member)
            continue
        matching = [path for path in glob.glob(member) if os.path.isdir(path)]
        if not matching:
            raise UserError(f"merge.members: no directory matches {member}: give checkpoints, or a pattern of some")
        expanded += sorted(matching, key=_natural_key)
    return expanded


def resolve_sources(pretrained: str, members: Sequence[str]) -> tuple[str, list[str]]:
    """Return the real paths of the checkpoints to merge, so that one that is named in two ways counts as one.

    Args:
        pretrained: as given; may be empty.
        members: likewise, with patterns.

    Raises:
        UserError: a pattern matches no directory, or a save directory of Megatron-LM names no iteration.
    """
    paths = [pretrained, *expand_members(members)]
    found = [os.path.realpath(resolve_iteration(path)) if path else "" for path in paths]
    return found[0], found[1:]


def _natural_key(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts `step-9` before `step-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def require_fraction(name: str, value: float) -> None:
    """Raise a UserError unless the value of the setting `name` is in [0, 1].

    Args:
        name: as the user writes it, such as `merge.alpha`.
        value: NaN is refused too.
    """
    if not 0 <= value <= 1:  # also catches NaN
        raise UserError(f"{name} is {value:g}: it lies between 0 and 1")


def require_finite(name: str, value: float) -> None:
    """Raise a UserError unless the value of the setting `name` is finite.

    Args:
        name: as the user writes it, such as `merge.scale`.
        value: of any sign; NaN and infinities are refused.
    """
    if not math.isfinite(value):
        raise UserError(f"{name} is {value:g}: give a finite number")


def require_positive_sum(name: str, weights: Sequence[float]) -> None:
    """Raise a UserError unless the weights of the setting `name` can be divided by their sum.

    Args:
        name: as the user writes it, such as `merge.weights`.
        weights: finite; some may be negative, as long as the sum is above 0.
    """
    if math.fsum(weights) <= 0:
        raise UserError(
            f"{name} [{format_numbers(weights)}] sum to {math.fsum(weights):g}: merge.normalize needs a positive sum"
        )


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings in a line, without patterns and what is left out."""
    plain = {n: v for n, v in settings.items() if not n.endswith("_for") and v not in (None, ()) and v is not False}
    shown = {n: " ".join(f"{w:g}" for w in v) if isinstance(v, Sequence) else v for n, v in plain.items()}
    return ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())


def format_numbers(weights: Sequence[float]) -> str:
    """Format numbers as a list without brackets."""
    return ", ".join(f"{w:g}" for w in weights)
