"""Speed and memory of `megatron_bai.merge` beside its peers and the limit of the machine.

    python benchmarks/merge.py --dir /dev/shm --gb 2 --shape moe --format torch_dist --ranks 1 2
    python benchmarks/merge.py --report

The first makes three bfloat16 checkpoints and measures, each in a process of its own:

    limit      reading three inputs and writing one output with no arithmetic, in blocks of 64 KiB: in one thread, in
               as many threads as this machine has cores, which a rank of ours uses, and in as many processes
    merge      this library, both stages in one pass, for each number of ranks
    verify     the same with `merge.verify=sample`
    two_pass   this library, stage 1 written and read again
    plain      safetensors: a loop of torch and safetensors over whole tensors, as one would write it
    mergekit   safetensors: linear, one torch thread, default and 500 MB shards (--mergekit PYTHON: its environment's)
    megatron   torch_dist: tools/checkpoint/weighted_merge.py (--megatron DIR: a checkout of Megatron-LM that has it)

Every run appends a line to `--results`; those it has already are not run again, so that a comparison can be made piece
by piece and goes on where it was stopped. (Another version of the code needs another file.) The second prints the
tables of a file of results.

Seconds are the best of `--repeat` runs, whose order alternates, each until its output is on disk. `of limit` is the
fastest limit's time by that of the row; `cpu s` the least time on the cores, of all ranks, which other programs on the
machine distort less; memory the resident peak of the largest process, of which Python and its libraries need `base`
before any work. `load` is the machine's before each run, the benchmark's own included: 1 to 2 where nothing else runs.
`--cold` drops the inputs from the page cache before each run (not on tmpfs, which is one).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from merge_inputs import SOURCES, make
from merge_report import report

WORK = Path(__file__).with_name("merge_work.py")
SLOW = 590  # seconds: what takes longer is noted as such
Case = tuple[str, str, int, str]  # name, argument, ranks, Python
Result = dict[str, Any]


def measure(directory: Path, case: Case, cold: bool) -> Result:
    """Run once; of several ranks the slowest's seconds, the largest's memory and the time of all on the cores."""
    what, argument, ranks, python = case
    clear(directory)
    os.sync()  # what is not on disk yet would be written meanwhile, and stays in the page cache
    if cold:
        for file in (file for name in SOURCES for file in (directory / name).iterdir()):
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    launch = [python]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [str(word) for word in (*launch, WORK, what, directory, argument)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW)
    except subprocess.TimeoutExpired:
        return {"error": f"over {SLOW} s"}
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or len(results) != ranks:
        print(f"{what} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["no result"])[-1][:200]}
    return {key: (sum if key == "cpu" else max)(result[key] for result in results) for key in results[0]}


def clear(directory: Path) -> None:
    for name in ("out", "stage1", ".out.unfinished", ".stage1.unfinished"):
        shutil.rmtree(directory / name, ignore_errors=True)


def cases(options: argparse.Namespace) -> dict[str, Case]:
    """What to measure, by the name of its row."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Case] = {"limit": ("limit", "1", 1, sys.executable)}
    if cores > 1:
        found[f"limit, {cores} threads"] = ("limit", str(cores), 1, sys.executable)
        found[f"limit, {cores} ranks"] = ("limit", "1", cores, sys.executable)
    for n in options.ranks:
        ranks = f", {n} rank{'s' * (n > 1)}"
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
    return {name: case for name, case in found.items() if not options.only or name.split(",")[0] in options.only}


def inputs(work: Path, shape: str, gigabytes: float, form: str) -> tuple[int, int]:
    """The bytes and the chunks of one input; those that lie there from before are taken."""
    note, what = work / "inputs.json", [shape, gigabytes, form]
    if not note.is_file() or json.loads(note.read_text())[:3] != what:
        what += make(work, shape, gigabytes, form)
        note.write_text(json.dumps(what))
    nbytes, chunks = json.loads(note.read_text())[3:]
    return nbytes, chunks


def series(work: Path, gigabytes: float, options: argparse.Namespace) -> None:
    """The runs of one size that the results lack."""
    state = "cold" if options.cold else "warm"
    which = {"state": state, "format": options.format, "shape": options.shape, "gb": gigabytes}
    for turn in range(options.repeat):
        for row, case in cases(options).items():
            had = [r for r in read(options.results) if r.items() >= (which | {"row": row}).items()]
            if len(had) > turn or any("error" in result for result in had):
                continue
            size, items = inputs(work, options.shape, gigabytes, options.format)
            about = which | {"row": row, "bytes": size, "items": items, "load": os.getloadavg()[0]}
            result = about | measure(work, case, options.cold) | {"at": time.strftime("%F %T")}
            with open(options.results, "a") as file:
                file.write(json.dumps(result) + "\n")
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
            clear(work)


def read(results: Path) -> list[Result]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="directory to work in, in a folder of its own")
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0], help="sizes of one input, in 10⁹ bytes")
    parser.add_argument("--shape", default="moe", help="moe, dense, or tiny[:layers] for many chunks (default moe)")
    parser.add_argument("--format", choices=("torch_dist", "safetensors"), default="torch_dist")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", nargs="+", help="limit, merge, verify, two_pass, plain, mergekit, megatron")
    parser.add_argument("--mergekit", help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--megatron", help="a checkout of Megatron-LM with tools/checkpoint/weighted_merge.py")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark-merge.jsonl"))
    parser.add_argument("--keep", action="store_true", help="leave the inputs for the next call, which may take them")
    parser.add_argument("--report", action="store_true", help="print the tables of --results, measure nothing")
    options = parser.parse_args()
    if options.report:
        print(report(read(options.results)))
        return
    if options.dir is None:
        parser.error("--dir is missing")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    work = options.dir / "benchmark-merge"  # never a directory that someone else filled
    for gigabytes in options.gb:
        series(work, gigabytes, options)
    if not options.keep:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
