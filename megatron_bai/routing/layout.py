"""Cut a batch's routes to the rows one rank's routers see.

A Megatron router sees its tokens sequence-major: row s·B + b is token s of sample b, and with sequence parallelism
rank r of R holds the tokens [r·T/R, (r+1)·T/R) of every sample.
"""

import numpy as np
import torch

from megatron_bai.routing.routes import RouteSignature


def assemble(samples: list[np.ndarray], length: int, signature: RouteSignature) -> tuple[np.ndarray, np.ndarray]:
    """Stack the routes of samples of different length, filling rows that have none.

    A filled row (padding, and each sample's last token, which was never fed to the rollout model) gets distinct
    experts, spread evenly over tokens and layers: equal ids would break the dispatcher's split sizes, and the same
    few experts would be overloaded. No loss depends on those rows.

    Args:
        samples: `[rows_i, moe_layers, topk]` each, with rows_i < length.
        length: T, tokens of the padded batch.

    Returns:
        ids `[B, T, moe_layers, topk]` in the signature's dtype, and valid `[B, T]` bool: rows that hold a route.
    """
    b, layers, topk = len(samples), signature.moe_layers, signature.topk
    row = np.arange(b * length).reshape(b, length, 1, 1)
    first = (row * layers + np.arange(layers)[:, None]) * topk
    ids = ((first + np.arange(topk)) % signature.num_experts).astype(signature.dtype)
    valid = np.zeros((b, length), dtype=bool)
    for i, routes in enumerate(samples):
        ids[i, : len(routes)] = routes
        valid[i, : len(routes)] = True
    return ids, valid


def rank_rows(values: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rows of `values` on one sequence-parallel rank, in the router's order.

    Args:
        values: `[B, T, …]`, with T a multiple of `ranks`.

    Returns:
        `[T/ranks · B, …]`, sequence-major.
    """
    part = values.shape[1] // ranks
    assert part * ranks == values.shape[1], f"length {values.shape[1]} is not a multiple of {ranks} ranks"
    return values[:, rank * part : (rank + 1) * part].transpose(0, 1).flatten(0, 1)
