"""From rewards to advantages."""

import numpy as np


def group_centred(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """A = R − mean of the group's R (arXiv 2512.01374): no division by the standard deviation.

    Args:
        rewards: `[groups · group_size]`, the samples of a group side by side.

    Returns:
        `[groups · group_size]` float64.
    """
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)
