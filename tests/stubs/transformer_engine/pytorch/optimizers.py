"""Names of Transformer Engine's optimizers and of the kernels that they use."""

import torch


class FusedAdam(torch.optim.AdamW):
    pass


class FusedSGD(torch.optim.SGD):
    pass


def multi_tensor_applier(*arguments: object) -> None:
    raise NotImplementedError


def multi_tensor_l2norm(*arguments: object) -> None:
    raise NotImplementedError


def multi_tensor_scale(*arguments: object) -> None:
    raise NotImplementedError


def multi_tensor_scale_tensor(*arguments: object) -> None:
    """Without it, Megatron-Core from 0.17 on takes none of these kernels."""
    raise NotImplementedError
