"""Weight syncs of a family's model as a run makes them, from connecting to servers to the last request. Collective."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from fake_sglang import serve
from weight_receiver import WeightReceiver

from megatron_bai import config
from megatron_bai.data.task import Prompt


@dataclass(frozen=True)
class Case:
    """A way of weight sync, and what is sent by it."""

    way: str
    dtype: torch.dtype = torch.float32
    quantize: str = ""
    bucket_bytes: int = 0  # less than a run can be told, since models of tests are small; 0: as a run is told


BFLOAT16 = torch.bfloat16
CASES = {
    "disk": Case("disk"),
    "tensors": Case("tensors"),
    "group, in buckets": Case("group", BFLOAT16, bucket_bytes=1 << 14),
    "tensors, quantised": Case("tensors", BFLOAT16, "fp8"),
}
MORE_CASES = {
    "group": Case("group"),
    "tensors, in buckets": Case("tensors", BFLOAT16, bucket_bytes=1 << 12),
    "disk, quantised": Case("disk", BFLOAT16, "int8"),
    "group, quantised": Case("group", BFLOAT16, "int8"),
}
# By layout of `family_worker.py`; the others have the shards of one of these.
SYNCED = dict.fromkeys(("one", "tp1_ep2", "pp2_uneven"), CASES) | {"tp2_ep2": CASES | MORE_CASES}


def session_of(bench: Any, actor: Any, device: Any, run_dir: Path, rollout: config.Rollout) -> Any:
    """What the inference engine reads of a session."""
    prompts = [Prompt(list(range(2, 18)), "", "")]
    return SimpleNamespace(
        settings=replace(bench.settings, rollout=rollout, run=config.Run(dir=str(run_dir))),
        actor=actor,
        device=device,
        engine=bench.engine,
        signature=bench.replay.signature,
        is_rank_0=dist.get_rank() == 0,
        dp_rank=0,
        reports_stats=dist.get_rank() == 0,
        tokenizer_dir=bench.directory / "published",
        task=SimpleNamespace(eval_size=len(prompts), prompts=lambda *_: prompts),
    )


def build_bfloat16(bench: Any, device: Any) -> Any:
    """Build the family's model in bfloat16, from its published checkpoint, without an optimizer."""
    from megatron_bai.model import build, hf_checkpoint

    actor = build.build_actor(bench.settings, replace(device, dtype=torch.bfloat16), train=False)
    hf_checkpoint.load_hf(actor.modules, bench.model, bench.directory / "published")
    return actor


@contextmanager
def in_buckets(num_bytes: int) -> Iterator[None]:
    """Gather and send tensors in buckets of so many bytes; 0 changes nothing."""
    from megatron_bai.rl.experience.memory_sync import MemorySync

    with patch.object(MemorySync, "_bucket_bytes", lambda self: num_bytes) if num_bytes else nullcontext():
        yield


@contextmanager
def frozen_routers(actor: Any) -> Iterator[list[torch.Tensor]]:
    """Train all but the routers, which are given, within the block."""
    named = [pair for module in actor.modules for pair in module.named_parameters()]
    before = [parameter.requires_grad for _, parameter in named]
    for name, parameter in named:
        parameter.requires_grad_(".router." not in name)
    yield [parameter for name, parameter in named if ".router." in name]
    for (_, parameter), requires_grad in zip(named, before, strict=True):
        parameter.requires_grad_(requires_grad)


def receive(bench: Any, device: Any, run_dir: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """What a server receives of a family's weights, on rank 0: by case, requests of its ranks' digests.

    Out of memory they are sent twice more in buckets, with routers that are frozen: as they were, and after they moved.
    """
    from megatron_bai.rl.experience import inference_engine

    actors = {torch.float32: bench.actor, BFLOAT16: build_bfloat16(bench, device)}
    server, found = WeightReceiver(), {}
    with serve(server) if dist.get_rank() == 0 else nullcontext("") as url:
        for name, case in cases.items():
            rollout = config.Rollout(urls=[url], sync=case.way, quantize=case.quantize)
            actor = actors[case.dtype]
            session = session_of(bench, actor, device, run_dir, rollout)
            # The server computes nothing that could be compared
            with patch.object(inference_engine.InferenceEngine, "_check_probe"), in_buckets(case.bucket_bytes):
                with frozen_routers(actor) as routers, inference_engine.start_inference(session) as inference:
                    found[name] = server.take()
                    if not case.bucket_bytes:
                        continue
                    inference.sync()
                    found[f"{name}, frozen"] = server.take()
                    kept = [router.detach().clone() for router in routers]
                    for router in routers:
                        router.data.add_(1)
                    inference.sync()
                    found[f"{name}, moved"] = server.take()
                    for router, before in zip(routers, kept, strict=True):
                        router.data.copy_(before)
    return found
