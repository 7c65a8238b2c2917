"""A family of models: how one is recognised, built by Megatron-Core, named in checkpoints and served.

A family is a subclass of `Family` in a module of its own in this package, with an instance `FAMILY`; nothing else
mentions it (docs/families.md). What most have in common is here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model.families import rope
from megatron_bai.model.families.architecture import Architecture, Values
from megatron_bai.model.families.layer_parts import norm_full_width
from megatron_bai.model.families.param_mapping import ParamMapping
from megatron_bai.model.families.requirements import require_full_attention, require_size

# Our name of a setting → Hugging Face's, as most model types have it.
HF_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "moe_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
_MAY_BE_0 = ("norm_epsilon", "init_std")
# Frequencies of rotary positions, which older code saved with the weights: they follow from `config.json`.
_FREQUENCIES = "rotary_emb.inv_freq"
_FLOATS = (*_MAY_BE_0, "rope_theta")


class Family:
    """A family of models; an instance has no state.

    Attributes:
        name: of the family, as in its module.
        model_types: of `config.json`, by which it is recognised.
        transformers_class: what `architectures` of a written `config.json` says, which transformers and SGLang read.
        hf_fields: our name of a setting → Hugging Face's.
        dense_field: Hugging Face's name of the width of a layer without experts.
        partial_rotary: whether it rotates a part of each head, `partial_rotary_factor`; else that is refused.
        full_width_norms: whether queries and keys are normed over all heads at once.
        windows: whether layers may attend to a sliding window; else all attend to everything before a token.
        only: values that it needs: another one is refused by name.
        read_as: a model type that transformers lacks → one of the same configuration that it has.
        defaults: where transformers lacks the model type: the values of keys that a `config.json` leaves out. None:
            transformers' own.
        preset: values of a configuration that is made from settings alone, beside those of `only` and the sizes.
        served_by: SGLang's module with the model, or empty where SGLang has none.
        served_ranks: most tensor-parallel ranks of a server; 0: as many as divide the sizes.
        loaded_together: endings of a layer's names that SGLang merges into one weight where they come in one request,
            and forgets where they do not.
        dropped: beginnings of tensors' names, with `{num_layers}`, that are not imported, such as layers for
            multi-token prediction; they are left out of what is exported, too.
        exported: what a written `config.json` says in place of what the source's does, such as that such layers are
            none.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    transformers_class: ClassVar[str]
    hf_fields: ClassVar[Mapping[str, str]] = HF_FIELDS
    partial_rotary: ClassVar[bool] = False
    full_width_norms: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    dense_field: ClassVar[str] = "intermediate_size"
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu"}
    read_as: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Any] | None] = None
    preset: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": False}
    served_by: ClassVar[str] = ""
    served_ranks: ClassVar[int] = 0
    loaded_together: ClassVar[tuple[str, ...]] = ()
    dropped: ClassVar[tuple[str, ...]] = ()
    exported: ClassVar[Mapping[str, Any]] = {}

    def moe_layers(self, values: Values, num_layers: int) -> Sequence[int]:
        """Return the decoder layers with experts, counted from 0, in order.

        Args:
            values: of the configuration.
            num_layers: of the decoder.
        """
        return range(num_layers)

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return all kinds of parameters, one entry each."""
        raise NotImplementedError

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return arguments of Megatron-Core's TransformerConfig beyond the sizes that all families state.

        Values of other types than JSON's are not compared between checkpoints.
        """
        return {}

    def config_class(self) -> Any:
        """Return the class of the configuration: Megatron-Core's TransformerConfig or one derived from it."""
        from megatron.core.transformer.transformer_config import TransformerConfig

        return TransformerConfig

    def rope_arguments(self, model: Architecture) -> rope.RopeArguments:
        """Return what Megatron-Core is told of positions.

        Raises:
            UserError: a kind of scaling that it does not compute as transformers does.
        """
        return rope.rope_arguments(model.values, self.partial_rotary)

    def adapt_layer(self, layer: Any, model: Architecture, transformer_engine: bool) -> None:
        """Change the spec of one layer in place, after the norms and attention of a CPU were put in.

        Args:
            layer: Megatron-Core's ModuleSpec of a TransformerLayer.
            model: the architecture.
            transformer_engine: whether the spec is Transformer Engine's.
        """
        if self.full_width_norms:
            norm_full_width(layer)

    def validate(self, model: Architecture) -> None:
        """Refuse an architecture of the family that is not built.

        Raises:
            UserError: names the key and its value, without the file's name.
        """

    def unserved(self, model: Architecture) -> str:
        """Return why SGLang does not serve a model as it is, with the line of SGLang 0.5.21; empty where it does."""
        return "" if self.served_by else "it has no such model"

    def stated(self, model: Architecture) -> Mapping[str, Any]:
        """Return what a written `config.json` says where the source's does not.

        These are values that transformers and Megatron-Core take for granted, and that SGLang 0.5.21 asks the file for.

        Args:
            model: the architecture.
        """
        return {}

    def route_columns(self, model: Architecture) -> tuple[int, tuple[int, ...]]:
        """Return how many layers a server's routes have, and which of them are the MoE layers, in order.

        SGLang 0.5.21 has one for each decoder layer, zeros where it is dense.
        """
        return model.num_layers, model.moe_layers

    def cached_values_per_token(self, model: Architecture, ranks: int) -> int:
        """Return how many numbers a server keeps of a token in one layer's cache, on each of its ranks.

        Args:
            model: the architecture.
            ranks: number of the server's tensor-parallel ranks.
        """
        return 2 * max(1, model.num_query_groups // ranks) * model.head_dim

    def attention_values_per_token(self, model: Architecture) -> int:
        """Return how many numbers of a token autograd keeps in attention, beside the layer's input and its norm.

        Queries, keys and values as projected and as rotated, and the result, of all heads.
        """
        heads = model.num_attention_heads
        return (2 * (heads + 2 * model.num_query_groups) + heads) * model.head_dim

    # What follows is the same for all.

    def make_architecture(
        self, values: Values, raw: Values, where: str, names: Mapping[str, str] | None = None
    ) -> Architecture:
        """Make an architecture from a configuration.

        Args:
            values: effective.
            raw: the file's own, which tell a default apart from what was said.
            where: put before messages, such as the file's name.
            names: what each size is called where it is stated; None: by `hf_fields`.

        Raises:
            UserError: a value that the family does not build, numbers that are none or contradict each other.
        """
        names = names or {**self.hf_fields, "rope_theta": "rope_theta"}
        prefix = f"{where}: " if where else ""
        for name, value in self.only.items():
            if values.get(name, value) != value:
                default = "" if name in raw else ", its model type's default where it is missing"
                raise UserError(f"{prefix}{name} is {values[name]!r}{default}, only {value!r} is supported")
        if values.get("is_causal") is False:
            raise UserError(f"{prefix}is_causal is false, only causal attention is supported")
        numbers: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in self.hf_fields.items()}
        numbers["rope_theta"] = values.get("rope_theta")
        for ours, value in numbers.items():
            require_size(prefix + names[ours], value, ours in _FLOATS, ours in _MAY_BE_0)
        numbers["rope_theta"] = float(numbers["rope_theta"])
        try:
            model = Architecture(**numbers, family=self, values=values, raw=raw)
            model.moe_layers = tuple(self.moe_layers(values, model.num_layers))
            model.tied = bool(values.get("tie_word_embeddings"))
            if model.layers("dense"):
                require_size(self.dense_field, values.get(self.dense_field))
                model.dense_ffn_hidden_size = values[self.dense_field]
            self._validate_sizes(model, names)
            if not self.windows:
                require_full_attention(model)
            self.rope_arguments(model)
            self.validate(model)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None
        return model

    def _validate_sizes(self, model: Architecture, names: Mapping[str, str]) -> None:
        """Refuse sizes that contradict each other or that Megatron-Core does not build."""

        def name(field: str) -> str:
            return f"{names[field]} ({getattr(model, field)})"

        if model.num_attention_heads % model.num_query_groups:
            raise UserError(f"{name('num_attention_heads')} is not a multiple of {name('num_query_groups')}")
        if model.moe_topk > model.num_experts:
            raise UserError(f"{name('moe_topk')} is more than {name('num_experts')}")
        if model.head_dim % 2:
            raise UserError(f"{name('head_dim')} is odd: rotary embeddings turn pairs of its elements")
        if not model.moe_layers:
            raise UserError("no layer has experts: dense models are not supported")
        router = self.transformer_arguments(model)
        softmax = router.get("moe_router_score_function", "softmax") == "softmax"
        if model.moe_topk == 1 and softmax and not router.get("moe_router_pre_softmax"):
            raise UserError(
                f"{name('moe_topk')} is not supported: with normalised weights (norm_topk_prob) the one expert's is"
                " always 1, the router gets no gradient, and Megatron-Core refuses it; 2 and more are"
            )

    def make_config(self, model: config.Model) -> dict[str, Any]:
        """Return the configuration of a model that settings alone describe, by Hugging Face's names."""
        sizes = {theirs: getattr(model, ours) for ours, theirs in self.hf_fields.items()}
        rope_parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
        return {
            "architectures": [self.transformers_class],
            "model_type": self.model_types[0],
            **self.only,
            **self.preset,
            self.dense_field: model.moe_ffn_hidden_size,
            **sizes,
            "rope_theta": model.rope_theta,
            "rope_parameters": rope_parameters,
        }

    def exported_values(self, model: Architecture, content: Values) -> dict[str, Any]:
        """Return what a written `config.json` says in place of the source's, and beside it.

        Args:
            model: the architecture.
            content: of the source's.
        """
        replaced = {key: value for key, value in self.exported.items() if key in content}
        return replaced | self.missing_values(model, content)

    def missing_values(self, model: Architecture, content: Values) -> dict[str, Any]:
        """Return what SGLang asks a `config.json` for and does not find there.

        Args:
            model: the architecture.
            content: of the file.
        """
        return {key: value for key, value in self.stated(model).items() if key not in content}

    def is_dropped(self, name: str, model: Architecture) -> bool:
        """Return whether a tensor of a Hugging Face checkpoint is left out by rule.

        Args:
            name: of the tensor.
            model: the architecture.
        """
        beginnings = tuple(each.format(num_layers=model.num_layers) for each in self.dropped)
        return name.startswith(beginnings) or name.endswith(_FREQUENCIES)


def shared_experts_width(model: Architecture, field: str = "n_shared_experts", may_be_0: bool = False) -> int:
    """Return the width of a layer's shared experts, which are one; 0 where there are none.

    Args:
        model: the architecture.
        field: Hugging Face's name of their number.
        may_be_0: whether it may be 0 or null.

    Raises:
        UserError: no such number.
    """
    count = model.values[field]
    if may_be_0:
        count = count or 0
    require_size(field, count, may_be_0=may_be_0)
    width: int = count * model.moe_ffn_hidden_size
    return width
