"""Where tensors live: `cuda` (NCCL, Transformer Engine when present) or `cpu` (gloo).

Call `init_backend` before anything imports a Megatron-Core model: on a CPU it applies the compatibility fixes first.
"""

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bai import compat, config
from megatron_bai.distributed.hosts import set_gloo_interface
from megatron_bai.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """What this process computes on."""

    kind: str  # cpu or cuda
    device: torch.device
    dtype: torch.dtype
    use_transformer_engine: bool  # its layers replace Megatron-Core's local ones


def select_device(settings: config.Backend) -> Device:
    """Resolve `backend.kind` and `backend.dtype` on this machine.

    Raises:
        UserError: an unknown kind or dtype, or `cuda` where torch sees no device.
    """
    kind = settings.kind
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"backend.kind is {kind!r}: choose auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("backend.kind is cuda, and torch sees no GPU here: set backend.kind=cpu or see `doctor`")
    if settings.dtype not in DTYPES:
        raise UserError(f"backend.dtype is {settings.dtype!r}: choose one of {', '.join(DTYPES)}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    use_transformer_engine = kind == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    return Device(kind, device, DTYPES[settings.dtype], use_transformer_engine)


def init_backend(settings: config.Backend) -> Device:
    """Prepare this process and join the world that torchrun describes (or a world of one).

    Raises:
        UserError: as `select_device`; or the hosts of the run cannot reach each other.
    """
    device = select_device(settings)
    if device.kind == "cpu":
        compat.apply("megatron-cpu")
        torch.set_num_threads(1)  # parallel by ranks: OpenMP collapses when two processes share a core
    else:
        torch.cuda.set_device(device.device)
    backend = "gloo" if device.kind == "cpu" else "nccl"
    timeout = timedelta(seconds=settings.timeout_s)
    if "RANK" in os.environ:  # torchrun's own description of the world
        set_gloo_interface()
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return device


def shutdown_backend() -> None:
    """Leave the world. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
