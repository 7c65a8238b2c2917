"""The form of the routes in SGLang's replies: base64 of little-endian int32 `[rows, layers, topk]`, shape not sent.

Layers without experts have zeros. With `compat/sglang_route_weights.py` a layer has topk more int32: the bits of the
experts' float32 weights, in the order of their ids.
"""

import base64
import binascii
from dataclasses import dataclass

import numpy as np

from megatron_bai.routing.layout import ServedColumns
from megatron_bai.routing.routes import RouteSignature, check_ids


@dataclass(frozen=True)
class RouteFormat:
    """What the routes of a server's replies are.

    Attributes:
        signature: of the served model's routes.
        served: the columns that the server sends; None: one for each MoE layer.
        weight_limit: replies also have the weights of a token's experts, whose sum in a layer is at most this, to a
            hundredth; None: they have not.
    """

    signature: RouteSignature
    served: ServedColumns | None = None
    weight_limit: float | None = None

    @property
    def num_columns(self) -> int:
        """Layers that the server sends."""
        return self.served.total if self.served else self.signature.moe_layers

    @property
    def column_numbers(self) -> int:
        """Numbers of a token and column: its experts' ids, and their weights if there are any."""
        return self.signature.topk * (1 if self.weight_limit is None else 2)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's routes."""
        return 4 * self.num_columns * self.column_numbers

    def decode(self, encoded: str, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Decode expert ids, and their weights where the server sends these.

        Args:
            encoded: base64.
            rows: number of rows that it must hold.

        Returns:
            `[rows, moe_layers, topk]` in the signature's dtype, and as float32; None without weights.

        Raises:
            ValueError: not base64, another number of bytes, ids that no route can have, those of a dense layer, or
                weights that no router can have.
        """
        try:
            data = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise ValueError(f"routes are not base64: {error}") from error
        size = rows * self.row_bytes
        if len(data) != size:
            raise ValueError(f"routes have {len(data)} bytes, {rows} tokens of {self.row_bytes} bytes need {size}")
        values = np.frombuffer(data, dtype="<i4").reshape(rows, self.num_columns, self.column_numbers)
        if self.served and self.served.total != len(self.served.moe):
            _require_zeros(values, self.served)
            values = values[:, list(self.served.moe)]
        topk = self.signature.topk
        ids = check_ids(values[..., :topk], self.signature, "SGLang's reply")
        if self.weight_limit is None:
            return ids, None
        weights = np.ascontiguousarray(values[..., topk:]).view("<f4").astype(np.float32, copy=False)
        _require_weights(weights, self.weight_limit)
        return ids, weights


def _require_zeros(values: np.ndarray, served: ServedColumns) -> None:
    """Raise a ValueError unless the columns of dense layers, of `[rows, columns, …]`, have zeros."""
    dense = sorted(set(range(served.total)) - set(served.moe))
    if values[:, dense].any():
        raise ValueError(
            f"routes of layer {next(layer for layer in dense if values[:, layer].any())}, which has no experts: the"
            " server takes it for a layer that has, and lacks patches/sglang-0.5.21/dense-layers.patch"
        )


def _require_weights(weights: np.ndarray, limit: float) -> None:
    """Raise a ValueError unless a router can have these weights, `[rows, moe_layers, topk]`."""
    sums = weights.sum(axis=-1, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (sums > 0).all() and (sums <= 1.01 * limit).all()):
        raise ValueError(
            f"weights of experts are not finite, negative, or sum to {sums.min():.3g} to {sums.max():.3g} in a layer,"
            f" where {limit:g} is the most"
        )
