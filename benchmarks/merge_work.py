"""What `benchmarks/merge.py` measures, each in a process of its own that prints its seconds and memory.

    python benchmarks/merge_work.py WORK DIRECTORY [ARGUMENT]

Only the standard library is imported at first, so that a peer's own environment can run its part. Timed is the work
and flushing its output to disk, not the start of Python, its imports and, of several ranks, their finding each other.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 16  # the fastest: larger ones leave the core's cache
SOURCES = ("0", "1", "2")
WEIGHTS = (0.5, 0.25, 0.25)
RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def limit(directory: Path, threads: str) -> Callable[[], None]:
    """Reading three inputs and writing one output, with no arithmetic; ranks and threads share the files' blocks."""
    lanes = int(threads or 1)

    def work() -> None:
        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(lambda lane: _copy_lane(directory, RANK * lanes + lane, SIZE * lanes), range(lanes)))

    (directory / "out").mkdir(exist_ok=True)
    return work


def _copy_lane(directory: Path, lane: int, lanes: int) -> None:
    """Copy this lane's part of every file: the system calls release Python's lock."""
    buffer = memoryview(bytearray(BLOCK))
    for file in sorted((directory / "0").iterdir()):
        out = os.open(directory / "out" / file.name, os.O_WRONLY | os.O_CREAT)
        inputs = [os.open(directory / name / file.name, os.O_RDONLY) for name in SOURCES]
        size = os.fstat(inputs[0]).st_size
        part = -(-size // lanes)
        for start in range(lane * part, min(lane * part + part, size), BLOCK):
            length = min(BLOCK, lane * part + part - start, size - start)
            for source in reversed(inputs):
                os.preadv(source, [buffer[:length]], start)
            os.pwrite(out, buffer[:length], start)
        for descriptor in (out, *inputs):
            os.close(descriptor)


def merge(directory: Path, verify: str) -> Callable[[], None]:
    """This library, both stages in one pass."""
    return lambda: _ours(directory, ["0", "1", "2"], [0.5, 0.5], 0.5, "out", verify)


def two_pass(directory: Path, verify: str) -> Callable[[], None]:
    """This library, stage 1 into a checkpoint of its own and stage 2 from that."""

    def work() -> None:
        _ours(directory, ["1", "1", "2"], [0.5, 0.5], 0.0, "stage1", verify)
        _ours(directory, ["0", "stage1"], [1.0], 0.5, "out", verify)

    return work


def _ours(directory: Path, names: list[str], weights: list[float], alpha: float, out: str, verify: str) -> None:
    from megatron_bai.cli import merge as merge_verb
    from megatron_bai.config import Config, Merge

    pretrained, *members = (str(directory / name) for name in names)
    settings = Merge(
        pretrained=pretrained, members=members, weights=weights, alpha=alpha, output=str(directory / out), verify=verify
    )
    merge_verb.run(Config(merge=settings))


def plain(directory: Path, _: str) -> Callable[[], None]:
    """A loop of torch and safetensors over whole tensors, as one would write it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def work() -> None:
        where = json.loads((directory / "0" / "model.safetensors.index.json").read_text())["weight_map"]
        for file in sorted(set(where.values())):
            handles = [safe_open(directory / name / file, "pt") for name in SOURCES]
            merged = {}
            for key in handles[0].keys():
                parts = [handle.get_tensor(key).float() * weight for handle, weight in zip(handles, WEIGHTS)]
                merged[key] = sum(parts).bfloat16()
            save_file(merged, directory / "out" / file)

    (directory / "out").mkdir()
    return work


def mergekit(directory: Path, shard_bytes: str) -> Callable[[], None]:
    """mergekit's linear merge, on one torch thread: more thrash on small tensors."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)
    models = [{"model": str(directory / n), "parameters": {"weight": w}} for n, w in zip(SOURCES, WEIGHTS)]
    recipe = MergeConfiguration.model_validate({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
    options = MergeOptions(out_shard_size=int(shard_bytes), lazy_unpickle=True, quiet=True, copy_tokenizer=False)
    return lambda: run_merge(recipe, str(directory / "out"), options)


def megatron(directory: Path, checkout: str) -> Callable[[], None]:
    """Megatron-LM's tools/checkpoint/weighted_merge.py."""
    sys.path[:0] = [checkout, f"{checkout}/tools/checkpoint"]
    import weighted_merge as tool

    inputs = [directory / name for name in SOURCES]
    return lambda: tool.merge_same_layout_dcp_metadata_checkpoints(
        inputs, list(WEIGHTS), str(directory / "out"), balance_rank_work=True
    )


def flush(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def peak_mib() -> float:
    """Resident peak of this program; `getrusage` would include what the parent had before `exec`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def main() -> None:
    name, directory, argument = sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
    if name in ("merge", "two_pass"):
        import megatron_bai.merge.execution.bf16_kernel  # noqa: F401  likewise; half a second, and seconds where it was never compiled
        import megatron_bai.merge.pipeline  # noqa: F401  not timed, as the peers' are not
    work = {f.__name__: f for f in (limit, merge, two_pass, plain, mergekit, megatron)}[name](directory, argument)
    if SIZE > 1 and name != "limit":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()
    base = peak_mib()
    started, used = time.perf_counter(), time.process_time()
    work()
    flush(directory / "out")
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    line = json.dumps({"seconds": seconds, "cpu": cpu, "base_mib": base, "peak_mib": peak_mib()})
    os.write(1, f"\n{line}\n".encode())  # one write: ranks share the pipe


if __name__ == "__main__":
    main()
