"""What a rank holds while it gathers, and what it still does for the others after it failed."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from moe import ARCHITECTURE

from megatron_bai.model import gather, hf_checkpoint, hf_gather
from megatron_bai.model.gather_plan import ShardInfo, make_gather_plan
from megatron_bai.model.param_shards import Shard
from megatron_bai.rl.experience import memory_sync

# Two shards of each slice on one rank, so that a slice is memory of its own.
SHARDS = [Shard("w", torch.ones(1, 4), (i,), (half, 0), (2, 4), True) for i in range(4) for half in range(2)]
PLAN = make_gather_plan([gather.describe(SHARDS)], 32)


def test_a_bucket_is_freed_before_the_one_after_the_next_is_gathered() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    upstream = gather._finish

    def finish(*arguments: Any) -> Any:
        assert not [each for each in held if each() is not None], "a bucket that its reader has left is still held"
        return upstream(*arguments)

    with patch.object(dist, "get_rank", return_value=0), patch.object(gather, "_finish", finish):
        buckets = gather.gather_buckets(SHARDS, PLAN)
        for _ in PLAN:
            _, slices = next(buckets)
            assert slices is not None and not slices[0][2].requires_grad
            held.append(weakref.ref(slices[0][2]))
            del slices, _
        assert next(buckets, None) is None
    assert len(held) == 4


def test_a_rank_that_cannot_publish_or_round_a_bucket_still_sends_the_others_theirs() -> None:
    """Its messages are sent as the buckets are gathered: a rank that stopped would leave the others waiting."""
    gathered: list[Any] = []

    def gather_buckets(*_: Any) -> Iterator[tuple[Any, list[Any]]]:
        for bucket in PLAN:
            gathered.append(bucket)
            yield bucket, [("w", torch.ones(1))]

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory")

    plan: Any = [SimpleNamespace(gather=bucket, tensors=()) for bucket in PLAN]
    stubs: dict[str, Any] = {
        "architecture_of": lambda _: None,
        "main_shards": lambda _: [],
        "describe": lambda _: [],
        "exchange_infos": lambda _: [[]],
        "gather_buckets": gather_buckets,
        "publish": fail,
    }
    with patch.multiple(hf_gather, **stubs):
        with pytest.raises(MemoryError, match="no memory"):
            list(hf_gather.HFGather([], None).iter_buckets(plan))  # type: ignore[arg-type] # no model
    assert len(gathered) == len(PLAN)

    gathered.clear()
    session: Any = SimpleNamespace(settings=SimpleNamespace(rollout=SimpleNamespace(quantize="int8")))
    sync = memory_sync.MemorySync(session, None, {})  # type: ignore[arg-type] # no servers
    with patch.object(memory_sync, "fake_quantize", fail), pytest.raises(MemoryError, match="no memory"):
        list(sync._iter_buckets(SimpleNamespace(iter_buckets=gather_buckets), plan))  # type: ignore[arg-type]
    assert len(gathered) == len(PLAN)


def test_the_shapes_that_are_expected_are_the_architectures_whatever_the_shards_have() -> None:
    shape = ARCHITECTURE.vocab_size + 8, ARCHITECTURE.hidden_size
    padded = [ShardInfo("embedding.word_embeddings.weight", (), (0, 0), shape, shape, torch.float32)]
    stubs: dict[str, Any] = {"main_shards": lambda _: [], "exchange_infos": lambda _: [padded]}
    with patch.multiple(hf_checkpoint, **stubs):
        shapes = hf_checkpoint.hf_shapes([], ARCHITECTURE)  # type: ignore[arg-type]
    assert shapes == {"model.embed_tokens.weight": (ARCHITECTURE.vocab_size, ARCHITECTURE.hidden_size)}
