"""Stands for Transformer Engine on a machine without a GPU: its names, parameters and shapes, in plain torch.

What Megatron-Core derives from and calls is here, with the parameters that Transformer Engine 2.11 registers, and
nothing of its kernels. Tests put the directory above on the path, or a copy of it with a fault.
"""

from types import SimpleNamespace

from transformer_engine import pytorch

__version__ = "2.11.0"
common = SimpleNamespace(recipe=SimpleNamespace(DelayedScaling=object, Format=SimpleNamespace(E4M3=0, HYBRID=1)))

__all__ = ["common", "pytorch"]
