"""The split of a step's samples into micro-batches of a number of samples, or of a number of tokens.

Counted in samples (`trainer.micro_batch_size`), a micro-batch is padded to the longest sample anywhere in the step.
Counted in tokens (`trainer.tokens_per_micro_batch`), it is one row of that length that holds as many samples side by
side as fit, each attending to itself alone. All rows are equally long, so that every pipeline stage and data-parallel
rank computes with the same shapes, whatever the samples' lengths.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.token_batch import AnyBatch, TokenBatch
from megatron_bai.routing.layout import Packing

MiniBatches = list[list[AnyBatch]]  # the mini-batches of a step, each as its micro-batches


def validate_batches(settings: config.Config, replicas: int) -> None:
    """Refuse batches that do not divide evenly among data-parallel replicas, updates and micro-batches.

    Args:
        settings: of the run.
        replicas: number of data-parallel replicas.

    Raises:
        UserError: names the settings.
    """
    trainer = settings.trainer
    if isinstance(settings.objective, config.Sft):
        _validate_rows(settings, replicas)
        return
    num_mini_batches = replicas * trainer.mini_batches
    if trainer.prompts_per_step % num_mini_batches:
        raise UserError(
            f"trainer.prompts_per_step ({trainer.prompts_per_step}) is not a multiple of trainer.mini_batches × "
            f"data-parallel ranks ({trainer.mini_batches} × {replicas})"
        )
    if settings.rollout.prompts_in_progress % replicas:
        raise UserError(
            f"rollout.prompts_in_progress ({settings.rollout.prompts_in_progress}) is not a multiple of the {replicas} "
            "data-parallel ranks"
        )
    if trainer.tokens_per_micro_batch:
        return  # as many micro-batches as it takes
    samples = trainer.prompts_per_step // num_mini_batches * trainer.group_size
    if samples % trainer.micro_batch_size:
        raise UserError(
            f"trainer.micro_batch_size ({trainer.micro_batch_size}) does not divide the {samples} samples of a rank's "
            f"mini-batch, trainer.prompts_per_step {trainer.prompts_per_step} × trainer.group_size {trainer.group_size}"
            f" / (trainer.mini_batches {trainer.mini_batches} × data-parallel ranks {replicas}); choose a divisor of "
            f"{samples}"
        )
    build.validate_micro_batches(settings.parallel, samples // trainer.micro_batch_size)


def _validate_rows(settings: config.Config, replicas: int) -> None:
    """Refuse rows of supervised training that do not divide evenly."""
    rows, size = settings.supervised.rows, settings.trainer.micro_batch_size
    if rows % (replicas * size):
        raise UserError(
            f"supervised.rows ({rows}) is not a multiple of trainer.micro_batch_size ({size}) × data-parallel ranks "
            f"({replicas})"
        )
    build.validate_micro_batches(settings.parallel, rows // (replicas * size))


def make_mini_batches(
    batch: AnyBatch, settings: config.Config, stats: Stats, device: torch.device = torch.device("cpu")
) -> tuple[AnyBatch, MiniBatches[AnyBatch]]:
    """Split this rank's samples of a step into consecutive mini-batches, and those into micro-batches. Collective.

    Packing changes the order of the samples of a mini-batch. That is done once a step: R2's routes are recorded and
    replayed in the same rows. Adds `padding_fraction`, the share of what the model is fed that is no sample's token.

    Args:
        batch: of this rank.
        settings: of the run.
        stats: gets the metric.
        device: of the ranks' collectives.

    Returns:
        The batch, in the order of the micro-batches, and these: as many in each mini-batch on every rank.

    Raises:
        UserError: a sample is longer than a micro-batch.
    """
    trainer = settings.trainer
    if trainer.tokens_per_micro_batch:
        batch, mini_batches = _pack_mini_batches(batch, settings, device)
    else:
        size = len(batch) // trainer.mini_batches
        mini_batches = [mini_batch.split(trainer.micro_batch_size) for mini_batch in batch.split(size)]
    fed = sum(micro_batch.pack(micro_batch.tokens).numel() for mini_batch in mini_batches for micro_batch in mini_batch)
    stats.ratio("padding_fraction", fed - int(batch.lengths.sum()), fed)
    return batch, mini_batches


def _pack_mini_batches(
    batch: AnyBatch, settings: config.Config, device: torch.device
) -> tuple[AnyBatch, MiniBatches[AnyBatch]]:
    """Split into mini-batches of packed rows, as many rows as the rank needs that needs most."""
    trainer, size = settings.trainer, len(batch) // settings.trainer.mini_batches
    row, lengths = trainer.tokens_per_micro_batch, batch.lengths.tolist()
    rows = [first_fit(lengths[start : start + size], row) for start in range(0, len(batch), size)]  # by mini-batch
    most = torch.tensor([max(lengths), *map(len, rows)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    longest, *counts = most.tolist()
    if longest > row:
        raise UserError(
            f"a sample of {longest} tokens does not fit into trainer.tokens_per_micro_batch ({row}): allow as many "
            "tokens or lower rollout.max_new_tokens"
        )
    parallel = settings.parallel
    multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1  # which the interleaved schedule needs
    for mini_rows, count in zip(rows, counts, strict=True):
        mini_rows += [[] for _ in range(-(-count // multiple) * multiple - len(mini_rows))]
    order = [i * size + index for i, mini_rows in enumerate(rows) for indices in mini_rows for index in indices]
    batch = batch.reorder(order)
    return batch, [
        pack_rows(mini_batch, [len(indices) for indices in mini_rows], row)
        for mini_batch, mini_rows in zip(batch.split(size), rows, strict=True)
    ]


def split_alike(batch: AnyBatch, mini_batches: Sequence[Sequence[TokenBatch]]) -> MiniBatches[AnyBatch]:
    """Split a batch as an earlier stage of it is, samples side by side in the same rows.

    Args:
        batch: in the order of the mini-batches.
        mini_batches: of the earlier stage, as `make_mini_batches` returns them.
    """
    former = [micro_batch for micro_batches in mini_batches for micro_batch in micro_batches]
    parts = batch.split([len(micro_batch) for micro_batch in former])
    packed = iter([replace(part, packing=one.packing) for part, one in zip(parts, former, strict=True)])
    return [list(islice(packed, len(micro_batches))) for micro_batches in mini_batches]


def first_fit(lengths: list[int], row: int) -> list[list[int]]:
    """Distribute sequences over rows: the longest first, each into the first row that has room for it.

    Needs at most 11/9 of the fewest rows possible, and 6/9 of one more (Dósa, 2007).

    Args:
        lengths: of the sequences, in tokens.
        row: tokens of a row.

    Returns:
        The indices that each row holds. A sequence longer than `row` is alone in one.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        chosen = next((i for i, free in enumerate(room) if lengths[index] <= free), len(rows))
        if chosen == len(rows):
            rows.append([])
            room.append(row)
        rows[chosen].append(index)
        room[chosen] -= lengths[index]
    return rows


def pack_rows(batch: AnyBatch, sizes: list[int], row: int) -> list[AnyBatch]:
    """Split into micro-batches of one packed row each.

    No context parallelism: the row alone must be a multiple of what it is split by, not each sample.

    Args:
        batch: B samples.
        sizes: samples of each micro-batch, consecutive; 0 for an empty one.
        row: tokens of a row.

    Returns:
        Micro-batches.
    """
    micro_batches = batch.split(sizes)
    return [
        replace(micro_batch, packing=Packing.of(micro_batch.lengths.tolist(), 1, row)) for micro_batch in micro_batches
    ]
