"""Speed and memory of `megatron_bai.merge` beside the limit of the machine, side by side in one run.

    python benchmarks/merge.py --dir /dev/shm/merge --gb 2 --shape moe --format torch_dist --ranks 1 2

Makes three bfloat16 checkpoints and measures, each in a process of its own:

    limit     reading three inputs and writing one output with no arithmetic, in blocks of 1 MiB
    merge     this library, for each number of ranks, without and with `merge.verify=sample`
    plain     safetensors only: a loop of torch and safetensors over whole tensors, as one would write it

Seconds are those of the work, without the start of Python; the best of `--repeat` runs, whose order alternates. Memory
is the resident peak of the largest process; `base` is what Python and torch need before any work. `--cold` drops the
inputs from the page cache before each run (not on tmpfs, which is one).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_bai.config import Config, Merge
from megatron_bai.merge import command, safetensors_files
from megatron_bai.merge.torch_dist import ItemWriter, write_index

BLOCK = 1 << 20
SOURCES = ("0", "1", "2")


def shapes(kind: str, gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of this size: Qwen3-MoE's small experts, stacked over layers, or dense matrices."""
    hidden, vocabulary = 1024, 32_768
    size = gigabytes * 1e9 / 2 - 2 * vocabulary * hidden
    tensors = {"embedding.word_embeddings.weight": (vocabulary, hidden), "output_layer.weight": (vocabulary, hidden)}
    width, experts = (384, 64) if kind == "moe" else (4 * hidden, 1)
    layers = max(round(size / (experts * 3 * width * hidden + 4 * hidden * hidden)), 1)
    tensors["decoder.layers.self_attention.linear_qkv.weight"] = (layers, 3 * hidden, hidden)
    tensors["decoder.layers.self_attention.linear_proj.weight"] = (layers, hidden, hidden)
    tensors["decoder.layers.mlp.router.weight"] = (layers, experts, hidden)
    tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"] = (layers, experts, 2 * width, hidden)
    tensors["decoder.layers.mlp.experts.experts.linear_fc2.weight"] = (layers, experts, hidden, width)
    return tensors


def chunks(key: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """As Megatron-Core saves them at tensor parallel size 1: one a layer, and one an expert, gate and up apart."""
    if len(shape) == 2:
        yield (0, 0), shape
    elif len(shape) == 3:
        yield from (((layer, 0, 0), (1, *shape[1:])) for layer in range(shape[0]))
    else:
        parts = 2 if "fc1" in key else 1
        rows = shape[2] // parts
        for layer in range(shape[0]):
            for expert in range(shape[1]):
                yield from (((layer, expert, part * rows, 0), (1, 1, rows, shape[3])) for part in range(parts))


def make(directory: Path, kind: str, gigabytes: float, form: str) -> int:
    """Write the three inputs; returns the bytes of one."""
    shutil.rmtree(directory, ignore_errors=True)
    tensors = shapes(kind, gigabytes)
    pool = torch.randn(40 << 20).mul_(0.02).bfloat16()  # values to take from: drawing all takes longer than merging

    def draw(seed: int, sizes: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(sizes).numel()
        return pool[(start := (seed * 7919) % (pool.numel() - count + 1)) : start + count].view(sizes).clone()

    for number, name in enumerate(SOURCES):
        path = directory / name
        path.mkdir(parents=True)
        boxes = [(key, *box) for key, shape in tensors.items() for box in chunks(key, shape)]
        if form == "safetensors":
            save_hf(path, [(f"{key}.{i}", draw(i + number, sizes)) for i, (key, _, sizes) in enumerate(boxes)])
            continue
        with ItemWriter(path, "__0_0") as first, ItemWriter(path, "__0_1") as second:
            for i, (key, offsets, sizes) in enumerate(boxes):
                (first, second)[i % 2].tensor(key, offsets, draw(i + number, sizes))
        torch.save({}, path / "common.pt")
        described = [(key, torch.bfloat16, shape) for key, shape in tensors.items()]
        write_index(path, described, first.written + second.written)
    return sum(file.stat().st_size for file in (directory / "0").iterdir())


def save_hf(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    from safetensors.torch import save_file

    where = {}
    for part in range(4):  # as many files as a model of this size has
        name = f"model-{part + 1:05}-of-00004.safetensors"
        save_file(dict(tensors[part::4]), path / name)
        where |= {key: name for key, _ in tensors[part::4]}
    (path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": where}))


# What is measured; each runs in a process of its own and prints its seconds.


def run_limit(directory: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    (directory / "out").mkdir()
    for name in SOURCES:
        for file in sorted((directory / name).iterdir()):
            with open(file, "rb", buffering=0) as source, open(directory / "out" / file.name, "ab", buffering=0) as out:
                while count := source.readinto(buffer):
                    if name == SOURCES[0]:
                        out.write(buffer[:count])


def run_merge(directory: Path, verify: str) -> None:
    paths = [str(directory / name) for name in SOURCES]
    settings = Merge(
        pretrained=paths[0], members=paths[1:], weights=[0.5, 0.5], output=str(directory / "out"), verify=verify
    )
    command.run(Config(merge=settings))


def run_plain(directory: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    where = json.loads((directory / "0" / safetensors_files.INDEX).read_text())["weight_map"]
    (directory / "out").mkdir()
    for file in sorted(set(where.values())):
        handles = [safe_open(directory / name / file, "pt") for name in SOURCES]
        merged = {}
        for key in handles[0].keys():
            parts = [handle.get_tensor(key).float() * weight for handle, weight in zip(handles, (0.5, 0.25, 0.25))]
            merged[key] = sum(parts).bfloat16()
        save_file(merged, directory / "out" / file)


def child(directory: Path, what: str) -> None:
    base = peak_mib()
    started = time.perf_counter()
    name, _, verify = what.partition(":")
    {"limit": run_limit, "plain": run_plain}[name](directory) if name != "merge" else run_merge(directory, verify)
    seconds = time.perf_counter() - started
    line = json.dumps({"seconds": seconds, "base_mib": base, "peak_mib": peak_mib()})
    os.write(1, f"{line}\n".encode())  # one write: ranks share the pipe


def peak_mib() -> float:
    """Resident peak of this program; `getrusage` would include what the parent had before `exec`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def measure(directory: Path, what: str, ranks: int, cold: bool) -> dict[str, float]:
    """Run once; of several ranks the slowest's seconds and the largest's memory."""
    shutil.rmtree(directory / "out", ignore_errors=True)
    if cold:
        os.sync()
        for file in (file for name in SOURCES for file in (directory / name).iterdir()):
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*launch, __file__, "--child", what, "--dir", directory], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return {key: max(result[key] for result in results) for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory to work in; its contents are replaced")
    parser.add_argument("--gb", type=float, default=2.0, help="size of one input, in 10⁹ bytes")
    parser.add_argument("--shape", choices=("moe", "dense"), default="moe")
    parser.add_argument("--format", choices=("torch_dist", "safetensors"), default="torch_dist")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.dir, options.child)
        return
    work = options.dir / "benchmark-merge"  # never a directory that someone else filled
    size = make(work, options.shape, options.gb, options.format)
    cases = [("limit", 1)] + [(f"merge:{verify}", n) for n in options.ranks for verify in ("none", "sample")]
    cases += [("plain", 1)] if options.format == "safetensors" else []
    runs: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.repeat):
        for what, ranks in cases:
            runs[what, ranks].append(measure(work, what, ranks, options.cold))
    items = sum(1 for key, shape in shapes(options.shape, options.gb).items() for _ in chunks(key, shape))
    print(f"three inputs of {size / 1e9:.2f} GB, {options.format}, {options.shape}, {items} chunks each")
    print(f"{'':24}{'seconds':>9}{'GB/s':>8}{'of limit':>10}{'peak MiB':>10}{'base MiB':>10}")
    limit = min(run["seconds"] for run in runs["limit", 1])
    for (what, ranks), results in runs.items():
        best = min(results, key=lambda run: run["seconds"])
        name = f"{what}, {ranks} rank{'s' * (ranks > 1)}" if what.startswith("merge") else what
        speed = 4 * size / best["seconds"] / 1e9  # read three, write one
        memory = f"{best['peak_mib']:>10.0f}{best['base_mib']:>10.0f}"
        print(f"{name:24}{best['seconds']:>9.2f}{speed:>8.2f}{limit / best['seconds']:>10.2f}{memory}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
