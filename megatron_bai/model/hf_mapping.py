"""The table of a model's parameters, its family's: Hugging Face's names ↔ Megatron's checkpoint keys.

mbridge maps live modules by Transformer Engine's parameter names and cannot load local-spec experts at TP > 1; this
table also serves checkpoints for which no model is built, and counts parameters for `plan`.
"""

from collections.abc import Iterator
from itertools import product

from megatron_bai.config import Model
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.param_mapping import MEGATRON_LAYER, OUTPUT_LAYER, ParamMapping

# A critic has this in place of `output_layer.weight`. The name is its own since Megatron loads an output layer with
# another number of rows without a word: a critic could be taken for an actor. Hugging Face's is that of classifiers.
VALUE_HEAD = ParamMapping("value_head.weight", ("score.weight",), lambda m: (1, m.hidden_size))


def mapping_of(key: str, model: Model) -> ParamMapping:
    """Return the table's entry for a Megatron key.

    Args:
        key: in a stacked sharded state dict.
        model: the architecture.

    Raises:
        UserError: the table has none, so the tensor cannot be converted.
    """
    if key == VALUE_HEAD.megatron:
        return VALUE_HEAD
    architecture = architecture_of(model)
    if key not in architecture.mappings:
        raise UserError(
            f"Megatron tensor {key!r} has no Hugging Face name in model/families/{architecture.family.name}.py: add an"
            " entry there"
        )
    return architecture.mappings[key]


def slice_indices(mapping: ParamMapping, model: Model) -> Iterator[tuple[int, ...]]:
    """Return the indices of all stacked slices of a kind of parameter, in order.

    Args:
        mapping: of the kind.
        model: the architecture.
    """
    axes = (architecture_of(model).layers(mapping.layers), range(model.num_experts))
    return product(*axes[: mapping.num_stacked_axes])


def hf_names(model: Model) -> list[str]:
    """Return the names of all tensors of the Hugging Face checkpoint, in the table's order."""
    architecture = architecture_of(model)
    kinds = architecture.mappings.values()
    names = (name for kind in kinds for index in slice_indices(kind, architecture) for name in kind.names(index))
    return list(dict.fromkeys(names))  # once where experts are together


def megatron_slice(mapping: ParamMapping, index: tuple[int, ...], model: Architecture) -> tuple[str, tuple[int, ...]]:
    """Return the key under which Megatron-Core saves a slice, and its index there: layers that differ are not stacked.

    Args:
        mapping: of the kind of parameter.
        index: of the slice, as `slice_indices` has it.
        model: the architecture.
    """
    if not index or len(model.moe_layers) == model.num_layers:
        return mapping.megatron, index
    return f"{MEGATRON_LAYER}{index[0]}.{mapping.megatron.removeprefix(MEGATRON_LAYER)}", index[1:]


def megatron_shapes(model: Architecture, critic: bool = False) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of the tensors that Megatron-Core saves of a model.

    Args:
        model: the architecture.
        critic: whether a value head takes the place of the output layer.
    """
    kinds = [kind for key, kind in model.mappings.items() if not (critic and key == OUTPUT_LAYER)]
    found = {}
    for kind in [*kinds, VALUE_HEAD] if critic else kinds:
        stacked = (model.num_layers, model.num_experts)[: kind.num_stacked_axes]
        for index in product(*[model.layers(kind.layers)][: len(stacked)]):
            key, rest = megatron_slice(kind, index, model)
            found[key] = (*stacked[len(index) - len(rest) :], *kind.shape(model))
    return found
