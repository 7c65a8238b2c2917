"""Families whose first layers are dense."""

from megatron_bai.model.families.architecture import Architecture, Values
from megatron_bai.model.families.family import Family
from megatron_bai.model.families.requirements import require_size

_PREDICTING = "num_nextn_predict_layers"


class DenseFirst(Family):
    """Layers are dense up to `first_k_dense_replace`; behind the decoder's are those for multi-token prediction."""

    exported = {_PREDICTING: 0}

    def moe_layers(self, values: Values, num_layers: int) -> range:
        """Return the layers from `first_k_dense_replace` on.

        Args:
            values: of the configuration.
            num_layers: of the decoder.

        Raises:
            UserError: no such number, or none of layers behind the decoder's.
        """
        require_size("first_k_dense_replace", values["first_k_dense_replace"], may_be_0=True)
        require_size(_PREDICTING, values.get(_PREDICTING) or 0, may_be_0=True)
        return range(values["first_k_dense_replace"], num_layers)

    def is_dropped(self, name: str, model: Architecture) -> bool:
        """Return whether a tensor is of one of `num_nextn_predict_layers` layers, or dropped in every family.

        Others behind the last layer are not: `num_hidden_layers` may be too small.

        Args:
            name: of the tensor.
            model: the architecture.
        """
        count, first = model.values.get(_PREDICTING) or 0, model.num_layers
        predicting = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
        return name.startswith(predicting) or super().is_dropped(name, model)
