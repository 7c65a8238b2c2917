"""What is known of a model: its family, its sizes, and all that its `config.json` means."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_bai import config

if TYPE_CHECKING:
    from megatron_bai.model.families.family import Family
    from megatron_bai.model.families.param_mapping import ParamMapping

Values = Mapping[str, Any]
"""Effective values of a `config.json` by Hugging Face's names: the file's, and the defaults of its model type."""


@dataclass
class Architecture(config.Model):
    """A model whatever its layout: what `model.*` says of it, and what only its family knows.

    Attributes:
        family: how it is built and named.
        values: effective values of its configuration, which the family reads.
        raw: its `config.json`, as the file has it.
        moe_layers: decoder layers with experts, counted from 0, in order.
        tied: whether the output layer is the embedding.
        dense_ffn_hidden_size: of layers without experts.
    """

    rope_theta: float = 0.0  # always given, as all sizes are
    norm_epsilon: float = 0.0
    family: "Family" = None  # type: ignore[assignment]  # always given: a dataclass's parents have defaults
    values: Values = field(default_factory=dict, repr=False)
    raw: Values = field(default_factory=dict, repr=False)
    moe_layers: tuple[int, ...] = ()
    tied: bool = False
    dense_ffn_hidden_size: int = 0

    def settings(self) -> config.Model:
        """Return it as settings: what `model.*` can say."""
        return config.Model(**{each.name: getattr(self, each.name) for each in fields(config.Model)})

    @cached_property
    def mappings(self) -> "dict[str, ParamMapping]":
        """The kinds of parameters that there are, by their Megatron keys, in the family's order."""
        kinds = self.family.mappings(self)
        return {kind.megatron: kind for kind in kinds if not kind.num_stacked_axes or self.layers(kind.layers)}

    def layers(self, kind: str) -> list[int]:
        """Return the decoder layers of a kind, counted from 0, in order.

        Args:
            kind: `all`, `moe` or `dense`.
        """
        moe = set(self.moe_layers)
        return [n for n in range(self.num_layers) if kind == "all" or (n in moe) == (kind == "moe")]
