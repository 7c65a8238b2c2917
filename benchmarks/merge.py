"""Speed and memory of `megatron_bai.merge` beside its peers and the limit of the machine, side by side in one run.

    python benchmarks/merge.py --dir /dev/shm --gb 2 --shape moe --format torch_dist --ranks 1 2

Makes three bfloat16 checkpoints and measures, each in a process of its own:

    limit      reading three inputs and writing one output with no arithmetic, in blocks of 64 KiB
    merge      this library, both stages in one pass, for each number of ranks
    verify     the same with `merge.verify=sample`
    two_pass   this library, stage 1 written and read again
    plain      safetensors: a loop of torch and safetensors over whole tensors, as one would write it
    mergekit   safetensors: linear, one torch thread, default and 500 MB shards (--mergekit PYTHON: its environment's)
    megatron   torch_dist: tools/checkpoint/weighted_merge.py (--megatron DIR: a checkout of Megatron-LM that has it)

Seconds are the best of `--repeat` runs, whose order alternates, each until its output is on disk. `of limit` is the
one-process limit's time by that of the row; `cpu` the least time on the cores, of all ranks, which other programs on
the machine distort less; memory the resident peak of the largest process, of which Python and its libraries need `base`
before any work. `--cold` drops the inputs from the page cache before each run (not on tmpfs, which is one).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from merge_inputs import SOURCES, make

WORK = Path(__file__).with_name("merge_work.py")
Case = tuple[str, str, int, str]  # name, argument, ranks, Python


def measure(directory: Path, case: Case, cold: bool) -> dict[str, float]:
    """Run once; of several ranks the slowest's seconds, the largest's memory and the time of all on the cores."""
    what, argument, ranks, python = case
    for name in ("out", "stage1"):
        shutil.rmtree(directory / name, ignore_errors=True)
    os.sync()
    if cold:
        for file in (file for name in SOURCES for file in (directory / name).iterdir()):
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    launch = [python]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*launch, WORK, what, directory, argument], capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or len(results) != ranks:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return {key: (sum if key == "cpu" else max)(result[key] for result in results) for key in results[0]}


def cases(options: argparse.Namespace) -> dict[str, Case]:
    """What to measure, by the name of its row."""
    found: dict[str, Case] = {}
    for n in options.ranks:
        ranks = f", {n} rank{'s' * (n > 1)}"
        found["limit" + (ranks if n > 1 else "")] = ("limit", "", n, sys.executable)
        found["merge" + ranks] = ("merge", "none", n, sys.executable)
        found["verify" + ranks] = ("merge", "sample", n, sys.executable)
        if options.megatron and options.format == "torch_dist":
            found["megatron" + ranks] = ("megatron", options.megatron, n, sys.executable)
    found["two_pass, 1 rank"] = ("two_pass", "none", 1, sys.executable)
    if options.format == "safetensors":
        found["plain"] = ("plain", "", 1, sys.executable)
        if options.mergekit:
            for shard in (5_000_000_000, 500_000_000):
                found[f"mergekit, {shard / 1e9:g} GB shards"] = ("mergekit", str(shard), 1, options.mergekit)
    return {name: case for name, case in found.items() if not options.only or case[0] in options.only}


def table(work: Path, gigabytes: float, options: argparse.Namespace) -> None:
    size, items = make(work, options.shape, gigabytes, options.format)
    rows = cases(options)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for _ in range(options.repeat):
        for name, case in rows.items():
            runs[name].append(measure(work, case, options.cold))
    state = "cold" if options.cold else "warm"
    print(f"three inputs of {size / 1e9:.2f} GB, {options.format}, {options.shape}, {items} chunks each, {state}")
    heads = f"{'of limit':>10}{'of merge':>10}{'cpu s':>8}{'peak MiB':>10}{'base MiB':>10}"
    print(f"{'':26}{'seconds':>9}{'GB/s':>8}{heads}")
    best = {name: min(results, key=lambda run: run["seconds"]) for name, results in runs.items()}
    for name, run in best.items():
        speed = 4 * size / run["seconds"] / 1e9  # read three, write one
        ratios = [f"{best[k]['seconds'] / run['seconds']:.2f}" if k in best else "" for k in ("limit", "merge, 1 rank")]
        cpu = min(each["cpu"] for each in runs[name])
        rest = f"{cpu:>8.2f}{run['peak_mib']:>10.0f}{run['base_mib']:>10.0f}"
        print(f"{name:26}{run['seconds']:>9.2f}{speed:>8.2f}{ratios[0]:>10}{ratios[1]:>10}{rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory to work in, in a folder of its own")
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0], help="sizes of one input, in 10⁹ bytes")
    parser.add_argument("--shape", default="moe", help="moe, dense, or tiny[:layers] for many chunks (default moe)")
    parser.add_argument("--format", choices=("torch_dist", "safetensors"), default="torch_dist")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", nargs="+", help="limit, merge, two_pass, plain, mergekit, megatron")
    parser.add_argument("--mergekit", help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--megatron", help="a checkout of Megatron-LM with tools/checkpoint/weighted_merge.py")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start")
    work = options.dir / "benchmark-merge"  # never a directory that someone else filled
    for gigabytes in options.gb:
        table(work, gigabytes, options)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
