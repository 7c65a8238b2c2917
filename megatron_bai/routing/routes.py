"""The experts a sequence of tokens was sent to.

Row t holds the experts of input token t in every MoE layer. A sequence of T tokens has T − 1 rows: its last token
is sampled but never fed to the model. Order inside the top-k set carries no meaning.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RouteSignature:
    """What routes must agree on to be replayed in a model."""

    moe_layers: int
    num_experts: int
    topk: int

    @property
    def dtype(self) -> type[np.generic]:
        """uint8 holds the ids of up to 256 experts, int16 more (torch lacks kernels for uint16)."""
        return np.uint8 if self.num_experts <= 256 else np.int16


def check_ids(ids: np.ndarray, signature: RouteSignature, where: str) -> np.ndarray:
    """Return `ids` compactly stored, having proved that they are routes of this model.

    Args:
        ids: `[rows, moe_layers, topk]`, any integer dtype.
        signature: the model's.
        where: names the source in an error.

    Raises:
        ValueError: another shape, an id outside `[0, num_experts)`, or an expert chosen twice for one token.
    """
    shape = (signature.moe_layers, signature.topk)
    if ids.ndim != 3 or ids.shape[1:] != shape:
        raise ValueError(f"{where}: routes have shape {ids.shape}, the model needs [rows, {shape[0]}, {shape[1]}]")
    if ids.size and (ids.min() < 0 or ids.max() >= signature.num_experts):
        raise ValueError(f"{where}: expert ids from {ids.min()} to {ids.max()}, the model has {signature.num_experts}")
    ordered = np.sort(ids, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{where}: a token has the same expert twice in one layer")
    return ids.astype(signature.dtype, copy=False)
