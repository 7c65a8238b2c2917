"""What routes cost: in bytes and seconds to encode, to deliver to the ranks that replay them, and in a training step.

    python benchmarks/replay.py codec --samples 16
    python benchmarks/replay.py deliver --samples 32
    python benchmarks/replay.py step --rounds 15

`codec` encodes and decodes samples one by one, on one core, as int32 (what SGLang sends), `plain` and `compact`.

`deliver` hands samples to 8 ranks, each a process of its own, data parallel 4 × pipeline 2, over pipes:

    int32     every sample with all layers to every rank, which then takes its part
    plain     to every rank the envelopes of its own samples, cut to its own layers, which it decodes
    compact   likewise

`step` measures training steps without replay, with R2, R3 and RSPO, and with `rollout.exact`: see `replay_step.py`.

Every other measurement is made in processes of its own; the best of `--repeat` runs counts, whose order alternates.
Routes are drawn uniformly: the codes have fixed lengths, so sizes do not depend on them. Memory is the resident peak,
`base` what a rank needs before any work. Seconds contain the conversion from the uint8 that a `Sample` holds.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import replay_step

from megatron_bai.routing.routes import RouteSignature, check_ids
from megatron_bai.routing.store.codec import SampleRoutes, decode, encode, min_bytes, slice_layers

METHODS = ("int32", "plain", "compact")
DATA, PIPELINE = 4, 2
FULL = 256 * 8192 * 48  # sets of 256 samples of 8k tokens of a model with 48 layers


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    samples: int
    tokens: int
    signature: RouteSignature

    @property
    def sets(self) -> int:
        return self.samples * self.tokens * self.signature.moe_layers


def draw(scale: Scale) -> list[np.ndarray]:
    """uint8 or int16 `[tokens, layers, topk]` of each sample, from a pool of sets: drawing all would take minutes."""
    signature, random = scale.signature, np.random.default_rng(0)
    pool = random.random((4096, signature.num_experts)).argsort(axis=-1)[:, : signature.topk].astype(signature.dtype)
    shape = scale.tokens, signature.moe_layers
    return [pool[random.integers(0, len(pool), shape)] for _ in range(scale.samples)]


def recording(ids: np.ndarray, signature: RouteSignature) -> SampleRoutes:
    return SampleRoutes(signature, ids, np.ones(len(ids), dtype=bool), (), bytes(16))


# The codec.


def run_codec(scale: Scale, method: str) -> dict[str, float]:
    """Processor seconds, to which other programs add little, and bytes; what is decoded is what was drawn."""
    signature, spent, size = scale.signature, [0.0, 0.0], 0
    for warm, ids in enumerate([draw(scale)[0], *draw(scale)]):
        began = time.process_time()
        if method == "int32":
            data = ids.astype("<i4").tobytes()
        else:
            data = encode(recording(ids, signature), method)
        middle = time.process_time()
        if method == "int32":
            found = check_ids(np.frombuffer(data, "<i4").reshape(ids.shape), signature, "int32")
        else:
            found = decode(data, signature).ids
        ended = time.process_time()
        assert np.array_equal(found, np.sort(ids, axis=-1) if method == "compact" else ids)
        if warm:  # the first builds tables
            spent, size = [spent[0] + middle - began, spent[1] + ended - middle], size + len(data)
    return {"encode": spent[0], "decode": spent[1], "bytes": size, "peak_mib": peak_mib()}


def report_codec(scale: Scale, results: dict[str, dict[str, float]]) -> None:
    tokens, s = scale.samples * scale.tokens, scale.signature
    bound = min_bytes(s, scale.sets) / tokens
    print(
        f"{scale.samples} samples × {scale.tokens} tokens × {s.moe_layers} layers, {s.topk} of {s.num_experts} experts"
    )
    print(f"bound {bound:.1f} bytes a token; seconds are those of one core for 256 × 8192 tokens × 48 layers")
    header = ("bytes/token", "of bound", "encode M/s", "decode M/s", "encode s", "decode s")
    print(f"{'':10}" + "".join(f"{name:>13}" for name in header))
    for method, found in results.items():
        rate = [scale.sets / found[name] for name in ("encode", "decode")]
        size = found["bytes"] / tokens
        values = (size, size / bound, rate[0] / 1e6, rate[1] / 1e6, FULL / rate[0], FULL / rate[1])
        digits = (1, 3, 1, 1, 2, 2)
        print(f"{method:10}" + "".join(f"{value:>13.{n}f}" for value, n in zip(values, digits)))


# Delivery.


def parts(scale: Scale) -> list[tuple[range, range]]:
    """The samples and the layers of each rank."""
    layers = scale.signature.moe_layers
    return [
        (range(d * scale.samples // DATA, (d + 1) * scale.samples // DATA),
         range(p * layers // PIPELINE, (p + 1) * layers // PIPELINE))
        for d in range(DATA) for p in range(PIPELINE)
    ]  # fmt: skip


def rank_main(pipe: Connection, method: str, scale: Scale, samples: range, layers: range) -> None:
    """Receive, end with this rank's own routes in their smallest dtype, and report."""
    base, signature = peak_mib(), scale.signature
    pipe.send("ready")
    if method == "int32":
        shape = scale.tokens, signature.moe_layers, signature.topk
        everything = [np.frombuffer(pipe.recv_bytes(), "<i4").reshape(shape) for _ in range(scale.samples)]
        own = [everything[sample][:, layers.start : layers.stop].astype(signature.dtype) for sample in samples]
    else:
        own = [decode(pipe.recv_bytes(), signature).ids for _ in samples]
    pipe.send("done")
    pipe.send((sum(int(ids.sum(dtype=np.int64)) for ids in own), base, peak_mib()))


def run_deliver(scale: Scale, method: str) -> dict[str, float]:
    """Seconds until every rank has its routes, and peaks of memory."""
    samples, context = draw(scale), multiprocessing.get_context("spawn")
    pipes, ranks = [], []
    for part in parts(scale):
        here, there = context.Pipe()
        ranks.append(context.Process(target=rank_main, args=(there, method, scale, *part)))
        ranks[-1].start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    sent, began = 0, time.perf_counter()
    for number, ids in enumerate(samples):
        data = ids.astype("<i4").tobytes() if method == "int32" else encode(recording(ids, scale.signature), method)
        for pipe, (own, layers) in zip(pipes, parts(scale)):
            if method == "int32" or number in own:
                message = data if method == "int32" else slice_layers(data, layers.start, layers.stop)
                pipe.send_bytes(message)
                sent += len(message)
    for pipe in pipes:
        pipe.recv()
    seconds = time.perf_counter() - began
    peaks, bases = [], []
    for pipe, (own, layers) in zip(pipes, parts(scale)):
        total, base, peak = pipe.recv()
        assert total == sum(int(samples[i][:, layers.start : layers.stop].sum(dtype=np.int64)) for i in own)
        peaks.append(peak)
        bases.append(base)
    for rank in ranks:
        rank.join()
    memory = {"sender_mib": peak_mib(), "rank_mib": max(peaks), "all_mib": sum(peaks), "base_mib": max(bases)}
    return {"seconds": seconds, "bytes": sent, **memory}


def report_deliver(scale: Scale, results: dict[str, dict[str, float]]) -> None:
    s = scale.signature
    print(
        f"{scale.samples} samples × {scale.tokens} tokens × {s.moe_layers} layers, {s.topk} of {s.num_experts} experts"
    )
    print(f"to {DATA * PIPELINE} ranks: data parallel {DATA} × pipeline {PIPELINE}; peaks are resident MiB")
    header = ("seconds", "MB sent", "one rank", "all ranks", "base", "sender")
    print(f"{'':10}" + "".join(f"{name:>11}" for name in header))
    for method, found in results.items():
        values = (found["bytes"] / 1e6, *(found[f"{name}_mib"] for name in ("rank", "all", "base", "sender")))
        print(f"{method:10}{found['seconds']:>11.2f}" + "".join(f"{value:>11.0f}" for value in values))


def peak_mib() -> float:
    """Resident peak of this program; `getrusage` would include what the parent had before `exec`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


Results = dict[str, dict[str, float]]
WORK: dict[str, tuple[Callable[[Scale, str], dict[str, float]], str, Callable[[Scale, Results], None]]] = {
    "codec": (run_codec, "decode", report_codec),
    "deliver": (run_deliver, "seconds", report_deliver),
}


def measure(options: argparse.Namespace, scale: Scale) -> None:
    """Each method in a process of its own; of its runs the one that is best by what the work says."""
    _, best, report = WORK[options.work]
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for _ in range(options.repeat):
        for method in options.methods:
            done = subprocess.run([sys.executable, *sys.argv, "--child", method], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
            runs[method].append(json.loads(done.stdout))
    report(scale, {method: min(found, key=lambda run: run[best]) for method, found in runs.items()})


def main() -> None:
    if sys.argv[1:2] == ["step"]:  # a training step: it has settings of its own
        replay_step.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signature = RouteSignature(options.layers, options.experts, options.topk)
    scale = Scale(options.samples, options.tokens, signature)
    if options.child:
        print(json.dumps(WORK[options.work][0](scale, options.child)))
    else:
        measure(options, scale)


if __name__ == "__main__":
    main()
