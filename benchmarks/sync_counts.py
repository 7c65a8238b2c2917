"""What a weight sync of Qwen3-30B-A3B sends between ranks, counted without memory and without a network.

    python benchmarks/sync_counts.py
    python benchmarks/sync_counts.py --layouts gpus_16 --layers 4

Builds the model of each rank of a preset's world on the meta device, in torch's `fake` process group, and makes the
plans of gathering that the ranks would make. "Before" is one message a shard to rank 0, which then sends all of it to
the servers. Bytes are of bfloat16; `peak` is what the rank that holds most has beside its model: messages and tensors
of the bucket at hand, and the flat buckets being sent and made.
"""

import argparse
import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bai import compat, config
from megatron_bai.config import Rollout
from megatron_bai.distributed import backend
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.gather_plan import GatherBucket, ShardInfo, make_gather_plan
from megatron_bai.model.hf_gather import publish, unit_of
from megatron_bai.project_files import conf_dir

GIB = 1 << 30


@dataclass
class Counts:
    """A row of the table; bytes unless it says otherwise."""

    messages: int
    messages_of_rank_0: int
    gathered_on_rank_0: int
    moved: int
    to_servers_from_one_rank: int
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="gpus_8,gpus_16,gpus_32")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--bucket-mib", type=int, default=Rollout().sync_bucket_mib)
    asked = parser.parse_args()
    compat.apply("megatron-cpu")
    dist.new_group = functools.partial(_without_backend, dist.new_group)
    for layout in asked.layouts.split(","):
        began = time.perf_counter()
        of_ranks, architecture = build_infos(layout, asked.layers)
        size = asked.bucket_mib << 20
        rows = {"before": count_before(of_ranks, size)}
        for senders in (1, Rollout().sync_senders, len(of_ranks)):
            plan = make_gather_plan(of_ranks, size, senders, unit_of(architecture))
            rows[f"{senders} senders"] = count_plan(plan, architecture)
        total = sum(info.num_bytes for infos in of_ranks for info in infos)
        print(f"{layout}: {len(of_ranks)} ranks, {total / GIB:.2f} GiB, {time.perf_counter() - began:.0f} s")
        for name, row in rows.items():
            print(
                f"{name:12} {row.messages:7} messages, {row.messages_of_rank_0:7} at rank 0; gathered on rank 0 "
                f"{row.gathered_on_rank_0 / GIB:6.2f}, moved {row.moved / GIB:6.2f}, to servers from one rank "
                f"{row.to_servers_from_one_rank / GIB:6.2f}, peak {row.peak / GIB:5.2f} GiB"
            )


def build_infos(layout: str, layers: int) -> tuple[list[list[ShardInfo]], Architecture]:
    """Return what every rank of a preset's world tells the others, and the architecture."""
    from megatron.core import parallel_state

    from megatron_bai.model import build
    from megatron_bai.model.architecture import architecture_of
    from megatron_bai.model.gather import describe, main_shards

    cluster, shape = (OmegaConf.load(conf_dir() / path) for path in
                      (f"cluster/{layout}.yaml", "model/qwen3_30b_a3b.yaml"))  # fmt: skip
    model = replace(config.Model(**shape), num_layers=layers)
    parallel = config.Parallel(**cluster.parallel)
    device = backend.Device("cpu", torch.device("cpu"), torch.bfloat16, False)
    of_ranks = []
    for rank in range(cluster.cluster.processes):
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cluster.cluster.processes)
        build.init_parallel(parallel, seed=0)
        transformer_config = build.transformer_config(model, parallel, device)
        transformer_config.use_cpu_initialization = transformer_config.perform_initialization = False
        with torch.device("meta"):
            gpt = build._build_gpt(architecture_of(model), transformer_config, False, None, False)
            of_ranks.append(describe(main_shards([gpt])))
    return of_ranks, architecture_of(model)


def _without_backend(new_group: Any, *arguments: Any, backend: Any = None, **others: Any) -> Any:
    """Gloo would look for the other ranks."""
    return new_group(*arguments, **others)


def count_before(of_ranks: list[list[ShardInfo]], bucket_bytes: int) -> Counts:
    """Count one message a shard that rank 0 does not hold; rank 0 fills buckets from them and sends each as a copy."""
    others = [info.num_bytes for infos in of_ranks[1:] for info in infos]
    total = sum(info.num_bytes for infos in of_ranks for info in infos)
    largest = max(torch.Size(info.shape).numel() * info.dtype.itemsize for infos in of_ranks for info in infos)
    peak = 2 * max(bucket_bytes, largest) + largest + max(others, default=0)
    return Counts(len(others), len(others), sum(others), sum(others), total, peak)


def count_plan(plan: list[GatherBucket], architecture: Architecture) -> Counts:
    """Count what a plan sends."""
    at_0 = [bucket.message_bytes for bucket in plan if bucket.collector == 0]
    from_0 = sum(0 in bucket.message_bytes for bucket in plan)
    moved = [num_bytes for bucket in plan for num_bytes in bucket.message_bytes.values()]
    collectors = {bucket.collector for bucket in plan}
    own = {rank: [bucket for bucket in plan if bucket.collector == rank] for rank in collectors}
    return Counts(
        len(moved),
        sum(map(len, at_0)) + from_0,
        sum(sum(messages.values()) for messages in at_0),
        sum(moved),
        max(sum(bucket.num_bytes for bucket in buckets) for buckets in own.values()),
        max(_peak(buckets, architecture) for buckets in own.values()),
    )


def _peak(buckets: list[GatherBucket], architecture: Architecture) -> int:
    """Return the most bytes that a collector holds: a bucket's messages, tensors and copy, the copy before it, and what
    comes already of the one behind it."""
    peak = 0
    for i, bucket in enumerate(buckets):
        held = sum(bucket.message_bytes.values()) + bucket.num_bytes + _copied(bucket, architecture)
        before = buckets[i - 1].num_bytes if i else 0
        behind = sum(buckets[i + 1].message_bytes.values()) if i + 1 < len(buckets) else 0
        peak = max(peak, held + before + behind)
    return peak


def _copied(bucket: GatherBucket, architecture: Architecture) -> int:
    """Return the bytes of slices that are put together of shards, and of published tensors that are no view of one."""
    copied = sum(each.num_bytes for each in bucket.slices if len(each.shards) > 1)
    for each in bucket.slices:
        whole = torch.empty(each.shape, dtype=each.dtype, device="meta")
        for _, tensor in publish([(each.key, each.index, whole)], architecture):
            copied += tensor.nbytes if tensor.untyped_storage()._cdata != whole.untyped_storage()._cdata else 0
    return copied


if __name__ == "__main__":
    main()
