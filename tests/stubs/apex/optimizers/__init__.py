"""Names of Apex's optimizers."""

import torch


class FusedAdam(torch.optim.AdamW):
    pass


class FusedSGD(torch.optim.SGD):
    pass
