"""What a merge method must say, resolved before any file is opened; each method is a file of `methods/`.

Every method gives each source a weight in each tensor (`terms`). For a weighted sum Σ coefficient · value these are the
coefficients and there is nothing more to say. Two steps away from that:

- A method with `stats_passes` reads the sources that many times beforehand and measures each slice (`slices`: one layer's or
  one expert's parameter). A weighted sum may then have other coefficients in each slice (`coefficients`).
- A method that is `elementwise` is no weighted sum: `combine` computes its values.

Methods on task vectors τ_i = M_i − M_pretrained weigh those; their `terms` give the pretrained checkpoint 1.
"""

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.slices import SliceBox
from megatron_bai.merge.tensor_names.param_groups import matches, parse_layers

T = TypeVar("T")
ReadBlocks = Callable[[], Iterator[torch.Tensor]]  # a slice's values [sources, …, columns] in float64, some rows at a time
SliceStats = tuple[float, ...]  # what a method measured of one slice

NON_SETTINGS = ("method", "pretrained", "members", "terms")  # of a description, what is no setting of the method
WEIGHT_SUM_TOLERANCE = 1e-6  # how far weights that must sum to 1 may be from it: the error of seven decimals


@dataclass(frozen=True)
class Term:
    """A source's part in a merge: in a weighted sum, `coefficient` (float64) times the checkpoint at `source`."""

    source: str
    coefficient: float


@dataclass(frozen=True)
class Recipe(ABC):
    """A merge as the user writes it: the fields of a method are the settings it uses.

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
        """Everything but the checkpoints; patterns last."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NON_SETTINGS}

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern for name, value in self.settings.items() if name.endswith("_for") for pattern, _ in value)

    @abstractmethod
    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """The sources, each once, and their weights; the first gives the output its layout and non-tensor state.

        Args:
            key: the tensor to merge; None gives the terms of tensors that no pattern fits.
            layer: the decoder layer of it that is merged, if it has any.
        """

    def needs_stats(self, weights: Sequence[float]) -> bool:
        """Whether a tensor with these weights of the sources must be measured; only asked where there are passes."""
        return True

    def measure_slice(self, blocks: ReadBlocks, name: str, count: int) -> SliceStats:
        """What `coefficients` or `combine` must know of a whole slice; calls `blocks` as often as there are passes.

        Must not depend on the order of the blocks, nor on how many rows are in one.

        Args:
            name: the slice's.
            count: of its elements.
        """
        raise NotImplementedError

    def coefficients(self, weights: tuple[float, ...], stats: SliceStats | None) -> tuple[float, ...]:
        """The weighted sum's coefficients in a slice that was measured, or in any tensor."""
        return weights

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        """The merged values of an elementwise method.

        Args:
            values: float64 [sources, elements], the pretrained checkpoint first; it must not be changed. Sources of
                weight 0 may be left at zero.
            weights: one for each source.
            part: which elements these are.

        Returns:
            float64 [elements]; where a method does not move an element, the pretrained checkpoint's bits.
        """
        raise NotImplementedError

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The merged values by the method's plain formula, written apart from how the engine computes them.

        Returns:
            float64 [elements] each: the values, and the magnitude of what was added up for them, which bounds the
            rounding of the engine's sums; infinite where rounding alone decides the value.
        """
        coefficients = torch.tensor(self.coefficients(tuple(weights), stats), dtype=torch.float64)
        summands = values * coefficients.unsqueeze(1)
        return summands.sum(0), summands.abs().sum(0)

    def summarize(self) -> str:
        """The settings in a line, such as `alpha 0.5, weights 0.25 0.75`."""
        return format_settings(self.settings)

    def describe(self) -> dict[str, Any]:
        """The recipe and its terms, as `provenance.json` keeps them."""
        return {
            "method": self.method,
            "pretrained": self.pretrained,
            "members": list(self.members),
            **{name: dict(value) if name.endswith("_for") else value for name, value in self.settings.items()},
            "terms": [{"source": t.source, "coefficient": t.coefficient} for t in self.terms()],
        }

    def fingerprint_fields(self) -> dict[str, Any]:
        """What the merged values depend on besides the terms, for the fingerprint."""
        return {"method": self.method}


@dataclass(frozen=True, kw_only=True)
class WeightedMethod(Recipe):
    """A method that weighs its members.

    Args:
        weights: one for each member, finite.
        weights_for: (pattern, weights) pairs that replace `weights` for the tensors that fit the pattern, a parameter
            group's name or a regular expression; the first that fits decides.
    """

    weights: tuple[float, ...] = ()
    weights_for: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weights in self.all_weight_settings():
            if len(weights) != len(self.members):
                raise UserError(f"{name} has {len(weights)} entries for {len(self.members)} members: give one a member")
            if not all(math.isfinite(w) for w in weights):
                raise UserError(f"{name} [{format_numbers(weights)}] holds a number that is not finite")

    def all_weight_settings(self) -> list[tuple[str, tuple[float, ...]]]:
        """Every set of weights with its setting's name."""
        named = [(f"merge.weights_for[{pattern}]", weights) for pattern, weights in self.weights_for]
        return [("merge.weights", self.weights), *named]

    def weights_for_tensor(self, key: str | None, layer: int | None) -> tuple[float, ...]:
        return first_match(self.weights_for, key, layer, self.weights)


def first_match(choices: Sequence[tuple[str, T]], key: str | None, layer: int | None, default: T) -> T:
    """The value of the first pattern that fits a tensor, or this layer of it."""
    fitting = (value for pattern, value in choices if key is not None and matches(pattern, key, layer))
    return next(fitting, default)


def require_pretrained(recipe: Recipe) -> None:
    if not recipe.pretrained:
        raise UserError("merge.pretrained is empty: give the base checkpoint's directory")


def require_distinct(recipe: Recipe) -> None:
    """For methods in which a checkpoint's second mention would not just add to its weight."""
    paths = [path for path in (recipe.pretrained, *recipe.members) if path]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"merge.method={recipe.method} names {twice} twice: name each checkpoint once")


def require_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also catches NaN
        raise UserError(f"{name} is {value:g}: it lies between 0 and 1")


def require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"{name} is {value:g}: give a finite number")


def require_positive_sum(name: str, weights: Sequence[float]) -> None:
    if math.fsum(weights) <= 0:
        raise UserError(
            f"{name} [{format_numbers(weights)}] sum to {math.fsum(weights):g}: merge.normalize needs a positive sum"
        )


def format_settings(settings: Mapping[str, Any]) -> str:
    """Settings in a line; those of patterns, and those left out, are not in it."""
    plain = {name: value for name, value in settings.items() if not name.endswith("_for") and value is not False}
    shown = {n: " ".join(f"{w:g}" for w in v) if isinstance(v, Sequence) else v for n, v in plain.items()}
    return ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())


def format_numbers(weights: Sequence[float]) -> str:
    return ", ".join(f"{w:g}" for w in weights)
