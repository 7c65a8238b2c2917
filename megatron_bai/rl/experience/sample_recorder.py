"""The samples of a step that are kept to be read: chosen over all replicas, and gathered on rank 0.

Every rank learns a few numbers of every sample and makes the same choice; texts, tokens and log-probabilities travel
for the chosen ones alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.monitor.samples.choose import Candidate, Key, choose
from megatron_bai.monitor.samples.kept_sample import EVAL, TRAIN, KeptSample
from megatron_bai.monitor.samples.token_texts import token_lengths
from megatron_bai.rl.batches.stages import ScoredBatch, TrainingBatch
from megatron_bai.rl.batches.token_batch import TokenBatch
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample

_DECIMALS = 6  # of log-probabilities in files; also makes equal what only differs in rounding


class SampleRecorder:
    """Collects the kept samples of one step after another."""

    def __init__(self, session: Session):
        self._session, self._count = session, session.settings.monitor.samples
        self._kept: list[KeptSample] = []

    def add_train(
        self,
        step: int,
        samples: list[Sample],
        batch: TrainingBatch,
        micro_batches: Sequence[TokenBatch],
        routes: list[torch.Tensor],
    ) -> None:
        """Keep some of the samples that a step trains. Collective.

        Args:
            step: global step, from 1.
            samples: of this replica.
            batch: of them, in any order.
            micro_batches: of the batch, at any stage.
            routes: of each micro-batch, `[rows]`: in how many of this rank's layers routes differ; empty: not measured.
        """
        if not self._count:
            return
        rows = {int(index): row for row, index in enumerate(batch.sample_index)}
        discrepancies = _mean_discrepancies(batch) if self._session.reports_stats else [None] * len(batch)
        group_size = self._session.settings.trainer.group_size
        has_critic = isinstance(self._session.settings.objective, config.Ppo)
        chosen = self._choose(TRAIN, step, samples, group_size, lambda i: discrepancies[rows[i]])
        own = [(index, rows[index]) for index in _own(samples, group_size, chosen)]
        differ = self._count_differing(batch, micro_batches, routes, [row for _, row in own]) if routes else None
        records = []
        for i, (index, row) in enumerate(own if self._session.reports_stats else ()):
            predicted = slice(samples[index].prompt_length - 1, len(samples[index].tokens) - 1)
            mask = batch.response_mask[row]
            advantage = batch.advantages[row][mask].mean() if has_critic else batch.sample_advantages[row]
            fed = None if differ is None else differ[i, : len(samples[index].tokens)]
            key = (samples[index].stream_index, index % group_size)
            sample = self._make(
                step, TRAIN, samples[index], key, chosen[key],
                advantage=_rounded(advantage), discrepancy=discrepancies[row],
                logprobs_training=_round(batch.old_logprobs[row, predicted].numpy(), mask[predicted].numpy()),
                routes_differ=None if fed is None else [[int(t), int(fed[t])] for t in fed.nonzero().flatten()],
            )  # fmt: skip
            records.append(sample)
        self._gather(records, chosen)

    def add_eval(self, step: int, samples: list[Sample]) -> None:
        """Keep some of the samples of an evaluation. Collective.

        Args:
            step: global step, from 1.
            samples: of this replica, in groups.
        """
        if not self._count:
            return
        size = self._session.settings.trainer.eval_samples
        chosen = self._choose(EVAL, step, samples, size, lambda index: None)
        own = _own(samples, size, chosen) if self._session.reports_stats else []
        keys = [(samples[index].stream_index, index % size) for index in own]
        self._gather(
            [self._make(step, EVAL, samples[i], key, chosen[key]) for i, key in zip(own, keys, strict=True)], chosen
        )

    def take(self) -> list[KeptSample]:
        """Return the step's kept samples on rank 0, and nothing on others; the next step begins with none."""
        kept, self._kept = self._kept, []
        return kept

    def _choose(
        self, split: str, step: int, samples: list[Sample], group_size: int, discrepancy: Callable[[int], float | None]
    ) -> dict[Key, list[str]]:
        """Choose among the samples of all replicas. Collective.

        Args:
            split: of the samples.
            step: global step, from 1.
            samples: of this replica, in groups.
            group_size: samples of a group.
            discrepancy: of the sample of an index, on the rank that reports.
        """
        candidates = [
            Candidate(sample.stream_index, i % group_size, sample.reward, len(sample.response), discrepancy(i))
            for i, sample in enumerate(samples if self._session.reports_stats else ())
            if not sample.lost
        ]
        gathered: list[list[Candidate]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, candidates)
        salt = f"{self._session.settings.run.seed}/{split}/{step}"
        return choose(sum(gathered, []), self._count, salt)

    def _count_differing(
        self, batch: TokenBatch, micro_batches: Sequence[TokenBatch], routes: list[torch.Tensor], rows: Sequence[int]
    ) -> torch.Tensor | None:
        """Sum the layers whose routes differ over the ranks of the replica. Collective over it.

        Args:
            batch: as in `add_train`.
            micro_batches: likewise.
            routes: likewise.
            rows: of the batch.

        Returns:
            `[len(rows), T]` int64, position t of input token t; None for no row.
        """
        if not rows:
            return None
        engine = self._session.engine
        counts = torch.zeros(len(rows), batch.tokens.shape[1], dtype=torch.int64)
        repeats = engine.place.tensor[1] == 1 and engine.tensor_rank > 0  # another rank sees the same tokens
        first = 0
        for micro_batch, differing in zip(micro_batches, routes, strict=True):
            here = [(i, row - first) for i, row in enumerate(rows) if first <= row < first + len(micro_batch)]
            first += len(micro_batch)
            if not here or repeats:
                continue
            model_tokens = micro_batch.pack(micro_batch.tokens)
            positions = torch.arange(model_tokens.numel()).reshape(model_tokens.shape)
            dense = torch.zeros(model_tokens.numel(), dtype=torch.int64)
            dense[engine.place.rows(positions)] = differing.cpu().long()
            unpacked = micro_batch.unpack(dense.view(model_tokens.shape))
            for i, row in here:
                counts[i] = unpacked[row]
        counts = counts.to(self._session.device.device)
        dist.all_reduce(counts, group=self._session.model_group)
        return counts.cpu()

    def _make(self, step: int, split: str, sample: Sample, key: Key, kept_as: list[str], **measured: Any) -> KeptSample:
        """Make the record of a sample; `measured` has what only a training step knows."""
        session = self._session
        (prompt,) = session.task.prompts(split, session.settings.run.seed, key[0], 1)
        text, lengths = token_lengths(sample.response.tolist(), partial(_decode, session.task.tokenizer))
        defaults: dict[str, Any] = {"advantage": None, "discrepancy": None}
        return KeptSample(
            step=step, split=split, kept_as=kept_as, prompt_index=key[0], member=key[1],
            prompt=prompt.text, answer=prompt.answer, response=text,
            reward=sample.reward, failure=sample.failure, length=len(sample.response), finish=sample.finish,
            prompt_length=sample.prompt_length, tokens=sample.tokens.tolist(), token_lengths=lengths,
            logprobs_inference=_round(sample.logprobs, sample.full_sampled_mask),
            moe_layers=session.signature.moe_layers,
            versions=[[span.version, span.start, span.end] for span in sample.spans],
            turns=[
                {"start": turn.start, "end": turn.end, "ended": turn.ended,
                 "messages": list(turn.messages), "reward": turn.reward}
                for turn in sample.turns
            ],
            **defaults | measured,
        )  # fmt: skip

    def _gather(self, records: list[KeptSample], chosen: dict[Key, list[str]]) -> None:
        """Gather records on rank 0, in the order of the choice. Collective."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if self._session.is_rank_0 else None
        dist.gather_object(records, gathered)
        by_key = {(r.prompt_index, r.member): r for ranks in gathered or () for r in ranks}
        self._kept += [by_key[key] for key in chosen if gathered is not None]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _own(samples: list[Sample], group_size: int, chosen: dict[Key, list[str]]) -> list[int]:
    """Return the indices of the chosen samples that this replica has."""
    return [
        i for i, sample in enumerate(samples) if (sample.stream_index, i % group_size) in chosen and not sample.lost
    ]


def _mean_discrepancies(batch: ScoredBatch) -> list[float | None]:
    """Return the mean |log π_old − log μ_old| of each row, over usable tokens for which both are known."""
    delta = (batch.sampled_logprobs - batch.infer_logprobs).abs()
    known = batch.usable_mask & delta.isfinite()
    number = known.sum(1)
    means = delta.masked_fill(~known, 0.0).sum(1, dtype=torch.float64) / number.clamp(min=1)
    return [round(mean, _DECIMALS) if n else None for mean, n in zip(means.tolist(), number.tolist(), strict=True)]


def _round(values: np.ndarray, mask: np.ndarray | None = None) -> list[float | None]:
    """Round to what files hold; None where a number is not finite or outside the mask, `[len(values)]` bool."""
    rounded = np.round(values.astype(np.float64), _DECIMALS)
    known = np.isfinite(rounded) if mask is None else np.isfinite(rounded) & mask
    return [value if there else None for value, there in zip(rounded.tolist(), known, strict=True)]


def _rounded(value: torch.Tensor) -> float | None:
    return _round(np.array([float(value)]))[0]
