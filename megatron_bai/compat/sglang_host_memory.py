"""Plain host memory for the routes SGLang returns, on a CPU.

Symptom: with `--device cpu --enable-return-routed-experts` the scheduler dies at start in `torch.cuda.cudart()`.

Upstream: srt/state_capturer/base.py `BaseHostCache` asks for pinned memory and takes the allocator from
srt/mem_cache/pool_host/common.py `ALLOC_MEMORY_FUNCS[device]`, whose default registers the buffer with CUDA; the table
names npu, musa and xpu, not cpu.

Can go: when upstream's table has an entry for cpu.
"""

from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch


def install() -> None:
    """Enter an allocator for `cpu` into SGLang's own table."""
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, **unused: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


PATCH = Patch(
    name="sglang_host_memory",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="route capture pins its host buffer through CUDA: the scheduler dies on a CPU",
    install=install,
)
