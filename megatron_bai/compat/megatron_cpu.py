"""Let Megatron-Core train on a CPU over gloo.

Symptom: Megatron-Core names CUDA throughout: it allocates with `device="cuda"`, waits on CUDA streams, keeps its
random states in CUDA generators, and compares tensor type names with `torch.cuda.FloatTensor`.
Upstream: `optimizer/clip_grads.py`, `optimizer/distrib_optimizer.py`, `pipeline_parallel/schedules.py`,
`tensor_parallel/random.py`, `transformer/moe/{moe_utils,token_dispatcher}.py`.
Can go: when Megatron-Core takes its device from one setting.

Only a process that trains on a CPU calls `install`: it changes what `torch.cuda` means there.
"""

import contextlib
import functools
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch


class _NoopStream:
    """A CUDA stream or event on a machine that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoopStream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _do_nothing

    def record_event(self, *args: Any) -> "_NoopStream":
        return self


def _cpu(device: Any) -> Any:
    """Return the CPU in place of a CUDA device, and any other device unchanged."""
    import torch

    return torch.device("cpu") if torch.device(device).type == "cuda" else device


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return make


def _patch_devices() -> None:
    """Make `cuda` as a device mean the CPU."""
    import torch
    from torch.utils._device import _device_constructors

    _device_constructors()  # cached: `with torch.device(…)`, which transformers uses, must know the original functions
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = module.cuda = lambda self, *args, **kwargs: self
    typename = torch.Tensor.type

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = typename(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    tensor.type = type_
    for dtype in ("Float", "Half", "BFloat16", "Int", "Long", "Byte", "Double"):
        setattr(torch.cuda, f"{dtype}Tensor", getattr(torch, f"{dtype}Tensor"))


def _patch_streams() -> None:
    """Replace streams and events: nothing is asynchronous on a CPU, so there is nothing to wait for."""
    import torch

    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _NoopStream
    cuda.current_stream = cuda.default_stream = lambda *args: _NoopStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *args: None


def _patch_rng() -> None:
    """Make the CPU's random generator stand for CUDA's."""
    import torch
    from megatron.core.tensor_parallel import random

    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _patch_all_to_all() -> None:
    """Convert split sizes to ints, which gloo's all_to_all_single requires; Megatron passes elements of tensors."""
    import torch

    distributed: Any = torch.distributed
    inner = distributed.all_to_all_single

    def ints(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        return inner(output, input, ints(output_split_sizes), ints(input_split_sizes), **kwargs)

    distributed.all_to_all_single = all_to_all_single


def _fix_te_names() -> None:
    """Mend names that are wrong without Transformer Engine: one that is not there, and one that is always true."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # which `moe_router_dtype` looks up
        moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE  # True if its classes can be imported: stand-ins are


def install() -> None:
    """Replace CUDA's devices, streams and generators. Call before any model module of Megatron-Core is imported."""
    _patch_devices()
    _patch_streams()
    from megatron.core import jit

    jit.disable_jit_fuser()  # torch.compile of one-line functions: minutes of C compilation, no gain on a CPU
    _patch_rng()
    _patch_all_to_all()
    _fix_te_names()


PATCH = Patch(
    name="megatron_cpu",
    distribution="megatron-core",
    versions=(releases.MEGATRON_CORE, *(known for known in releases.MEGATRON if known != releases.MEGATRON_CORE)),
    scope="megatron-cpu",
    summary="Megatron-Core allocates, waits and draws random numbers on CUDA: it does not train on a CPU",
    install=install,
)
