"""Where tensors live: `cuda` (NCCL, Transformer Engine) or `cpu` (gloo).

Call `init_backend` before anything imports a Megatron-Core model: on a CPU it applies the compatibility fixes first.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bai import compat, config
from megatron_bai.compat.releases import admit_untested
from megatron_bai.config.limits import validate_group
from megatron_bai.distributed.devices import device_index
from megatron_bai.distributed.hosts import set_network_interface
from megatron_bai.distributed.kernel_packages import prepare_kernel_packages
from megatron_bai.distributed.release_admission import admit_release, require_known_release
from megatron_bai.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """What this process computes on."""

    kind: str  # cpu or cuda
    device: torch.device
    dtype: torch.dtype
    use_transformer_engine: bool = False  # its layers replace Megatron-Core's local ones


def resolve_kind(settings: config.Backend) -> str:
    """Return `cpu` or `cuda`, what `backend.kind` means on this machine, whether or not that is here."""
    if settings.kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.kind


def select_device(settings: config.Backend) -> Device:
    """Resolve `backend.kind` and `backend.dtype` on this machine.

    Raises:
        UserError: a value that is none of its choices, `cuda` where torch sees no device, or as `device_index`.
    """
    validate_group("backend", settings)
    kind = resolve_kind(settings)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("backend.kind is cuda, and torch sees no GPU here: set backend.kind=cpu or see `doctor`")
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", device_index(torch.cuda.device_count(), os.environ))
    return Device(kind, device, DTYPES[settings.dtype])


def init_backend(settings: config.Backend, has_rollouts: bool = False) -> Device:
    """Prepare this process and join the world that torchrun describes (or a world of one). *Collective*.

    Args:
        settings: of the backend.
        has_rollouts: whether what a server samples is trained on.

    Raises:
        UserError: as `select_device`; a Megatron-Core that is not taken; the hosts of the run cannot reach each other.
    """
    require_known_release(settings, select_device(settings).kind)
    device = join_world(settings)
    admit_release(settings, has_rollouts)
    return device


def join_world(settings: config.Backend) -> Device:
    """Do what `init_backend` does, whatever the release of Megatron-Core.

    Raises:
        UserError: as `select_device` and `prepare_kernel_packages`; or the hosts of the run cannot reach each other.
    """
    device = select_device(settings)
    admit_untested(settings.untested)
    if device.kind == "cuda":
        torch.cuda.set_device(device.device)  # first: what is imported may open a context on the device in use
    device = replace(device, use_transformer_engine=prepare_kernel_packages(settings, device.kind))
    if device.kind == "cpu":
        compat.apply("megatron-cpu")
        torch.set_num_threads(1)  # parallel by ranks: OpenMP collapses when two processes share a core
    backend = "gloo" if device.kind == "cpu" else "nccl"
    timeout = timedelta(seconds=settings.timeout_s)
    if "RANK" in os.environ:  # torchrun's own description of the world
        set_network_interface()
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return device


def shutdown_backend() -> None:
    """Leave the world. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
