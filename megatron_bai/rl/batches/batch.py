"""Samples as padded tensors, which are split into mini- and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.layout import Packing, assemble
from megatron_bai.routing.routes import RouteSignature

_DEFAULT: Any = None  # a tensor's default, which `Batch.__post_init__` replaces


@dataclass
class Batch:
    """B samples padded on the right to T tokens.

    Position t of the `[B, T]` fields below `tokens` belongs to the token *predicted* at t, which is token t + 1.

    Attributes:
        tokens: `[B, T]` int64.
        mask: `[B, T]` bool, response tokens: those the loss counts.
        infer_logprobs: `[B, T]` float32, of the inference engine; 0 outside the mask.
        old_logprobs: `[B, T]` float32, of the training engine before the step's first update.
        sampled_logprobs: `[B, T]` float32, of the training engine with the weights that sampled the token
            (`staleness.py`); `old_logprobs` where they are the step's, NaN where it has them no longer.
        version_age: `[B, T]` int64, weight versions between the one that sampled the token and the step's; 0 outside
            the mask.
        advantages: `[B]` float32, one a sample; `[B, T]`, one a token, where a critic fills them.
        routes: `[B, T, layers, topk]` experts of input token t in this rank's MoE layers, filled where there is none.
        routed: `[B, T]` bool, rows of `routes` that the inference engine recorded.
        reference_logprobs: `[B, T]` float32, of the reference policy; 0 where the objective has no use for it.
        in_loss: `[B]` bool, false for samples that the loss leaves out (`drop_excluded`).
        prompt_index: `[B]` int64, the sample's prompt among this replica's.
        prompt_tokens: `[B]` int64, tokens in `mask` of all samples of that prompt.
        missing: `[B, T]` bool, tokens it was fed whose route is not known. In neither: padding; none by default.
        rewards: `[B]` float32; 0 by default.
        values: `[B, T]` float32, the critic's before the step's first update; 0 without a critic.
        returns: `[B, T]` float32, the critic's targets; likewise.
        lengths: `[B]` int64, tokens of each sample; T by default.
        sample_index: `[B]` int64, the sample's index among this replica's, whatever their order here.
        router_shift: `[B, T]` float32, Δ of the routers at input token t (`rl/policy/router_shift.py`); 0 by default.
        route_weights: `[B, T, layers, topk]` float32, the inference engine's weights of `routes`; `[B, T, 0, 0]` where
            it was not asked for them.
        packing: how the samples lie in the one row that a model is fed; None: as they lie here.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    infer_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    routes: torch.Tensor
    routed: torch.Tensor
    reference_logprobs: torch.Tensor
    in_loss: torch.Tensor
    prompt_index: torch.Tensor
    prompt_tokens: torch.Tensor
    missing: torch.Tensor = _DEFAULT
    rewards: torch.Tensor = _DEFAULT
    values: torch.Tensor = _DEFAULT
    returns: torch.Tensor = _DEFAULT
    lengths: torch.Tensor = _DEFAULT
    sample_index: torch.Tensor = _DEFAULT
    version_age: torch.Tensor = _DEFAULT
    sampled_logprobs: torch.Tensor = _DEFAULT
    router_shift: torch.Tensor = _DEFAULT
    route_weights: torch.Tensor = _DEFAULT
    packing: Packing | None = None

    def __post_init__(self) -> None:
        b, length = self.tokens.shape
        if self.missing is None:
            self.missing = torch.zeros_like(self.routed)
        if self.rewards is None:
            self.rewards = torch.zeros_like(self.infer_logprobs[:, 0])
        if self.values is None:
            self.values, self.returns = torch.zeros_like(self.infer_logprobs), torch.zeros_like(self.infer_logprobs)
        if self.lengths is None:
            self.lengths = torch.full((b,), length)
        if self.sample_index is None:
            self.sample_index = torch.arange(b)
        if self.version_age is None:
            self.version_age = torch.zeros_like(self.tokens)
        if self.sampled_logprobs is None:
            self.sampled_logprobs = self.old_logprobs.clone()
        if self.router_shift is None:
            self.router_shift = torch.zeros_like(self.infer_logprobs)
        if self.route_weights is None:
            self.route_weights = self.infer_logprobs.new_zeros(b, length, 0, 0)

    def __len__(self) -> int:
        return len(self.tokens)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "packing")

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; itself where it already is there."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors()}
        return replace(self, **moved)

    def drop_excluded(self) -> None:
        """Remove the samples that are not `in_loss` from `mask` and from `prompt_tokens`, in place."""
        self.mask &= self.in_loss[:, None]
        self.prompt_tokens.copy_(_tokens_of_prompts(self.mask, self.prompt_index))

    def split(self, sizes: int | list[int]) -> list["Batch"]:
        """Split into consecutive batches of `sizes` samples: views, so that filling one fills this one."""
        names, tensors = zip(*self._tensors(), strict=True)
        return [
            Batch(**dict(zip(names, part, strict=True)))
            for part in zip(*(tensor.split(sizes) for tensor in tensors), strict=True)
        ]

    def reorder(self, order: list[int]) -> "Batch":
        """Return a copy with the samples in another order."""
        permuted: dict[str, Any] = {name: tensor[order] for name, tensor in self._tensors()}
        return Batch(**permuted)

    @property
    def targets(self) -> torch.Tensor:
        """`[B, T]` int64, the token that follows each; −1 where none of the sample does."""
        last = self.lengths[:, None] - 1
        later = torch.arange(self.tokens.shape[1], device=self.tokens.device) >= last
        return self.tokens.roll(-1, dims=1).masked_fill_(later, -1)

    @property
    def padding(self) -> torch.Tensor:
        """`[B, T]` bool, true for what is no token of the sample."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.lengths[:, None]

    def pack(self, values: torch.Tensor, filling: torch.Tensor | int = 0) -> torch.Tensor:
        """Return `[B, T, …]` as a model is fed it: unchanged, or as the packed row `[1, row, …]` (`Packing.pack`).

        Args:
            values: `[B, T, …]`, padded on the right.
            filling: one value or `[tail, …]`, for the tokens after the last sequence of a packed row.
        """
        return values if self.packing is None else self.packing.pack(values, filling)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Return a model's output for each token it was fed as `[B, T, …]`; differentiable (`Packing.unpack`).

        Args:
            values: `[1, row, …]` of a packed batch, `[B, T, …]` of another.

        Returns:
            `[B, T, …]`: 0 beyond a sequence's tokens if the batch is packed, `values` itself if it is not.
        """
        return values if self.packing is None else self.packing.unpack(values, self.tokens.shape[1])


def padded_length(longest: int, multiple: int) -> int:
    """Return the length to pad to: the next multiple of what a sequence is split by (`layout.Place.multiple`).

    Args:
        longest: tokens of the longest sample.
        multiple: at least 1.
    """
    return -(-longest // multiple) * multiple


def from_samples(
    samples: list[Sample],
    advantages: np.ndarray | None,
    length: int,
    pad_id: int,
    signature: RouteSignature,
    in_loss: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
    weighted: bool = False,
) -> Batch:
    """Build a batch from rollouts.

    Args:
        samples: B of this replica, at least one, all with the routes of the same layers.
        advantages: `[B]`, one a sample; None leaves 0, one a token, for a critic to fill.
        length: T, at least the longest sample.
        pad_id: token id of padding.
        signature: of the whole model's routes.
        in_loss: `[B]` bool; None counts every sample. `mask` still has them all: see `Batch.drop_excluded`.
        rewards: `[B]`; None: 0.
        weighted: whether the samples have `route_weights`; lost ones need none.
    """
    b = len(samples)
    tokens = np.full((b, length), pad_id, dtype=np.int64)
    mask = np.zeros((b, length), dtype=bool)
    logprobs = np.zeros((b, length), dtype=np.float32)
    for i, sample in enumerate(samples):
        total = len(sample.tokens)
        tokens[i, :total] = sample.tokens
        predicted = slice(sample.prompt_length - 1, total - 1)
        mask[i, predicted] = True
        logprobs[i, predicted] = sample.logprobs
    columns = samples[0].columns
    assert all(sample.columns == columns for sample in samples), "samples with the routes of different layers"
    recorded = [sample.route_mask for sample in samples]
    routes, routed, missing = assemble([sample.routes for sample in samples], length, signature, recorded, columns)
    prompt_index = torch.tensor([sample.prompt_index for sample in samples])
    return Batch(
        tokens=torch.from_numpy(tokens),
        mask=torch.from_numpy(mask),
        infer_logprobs=torch.from_numpy(logprobs),
        old_logprobs=torch.zeros(b, length),
        advantages=torch.zeros(b, length) if advantages is None else torch.from_numpy(advantages.astype(np.float32)),
        routes=torch.from_numpy(routes),
        routed=torch.from_numpy(routed),
        reference_logprobs=torch.zeros(b, length),
        in_loss=torch.ones(b, dtype=torch.bool) if in_loss is None else torch.from_numpy(in_loss),
        prompt_index=prompt_index,
        prompt_tokens=_tokens_of_prompts(torch.from_numpy(mask), prompt_index),
        missing=torch.from_numpy(missing),
        rewards=torch.zeros(b) if rewards is None else torch.from_numpy(rewards.astype(np.float32)),
        lengths=torch.tensor([len(sample.tokens) for sample in samples]),
        route_weights=torch.from_numpy(_stack_weights(samples, routes.shape)) if weighted else _DEFAULT,
    )


def _stack_weights(samples: list[Sample], shape: tuple[int, ...]) -> np.ndarray:
    """Stack route weights as `[B, T, layers, topk]` float32, 0 where a sample has no row."""
    weights = np.zeros(shape, dtype=np.float32)
    for i, sample in enumerate(samples):
        assert sample.lost or sample.route_weights is not None, "a sample without the weights of its routes"
        if sample.route_weights is not None:
            weights[i, : len(sample.route_weights)] = sample.route_weights
    return weights


def _tokens_of_prompts(mask: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
    """Count the tokens in the mask of all samples of each sample's prompt, `[B]` int64."""
    return torch.bincount(prompt_index, mask.sum(1)).long()[prompt_index]


def from_sft(tokens: np.ndarray, target_mask: np.ndarray) -> Batch:
    """Build a batch for supervised training.

    Args:
        tokens: `[B, T]` int64.
        target_mask: `[B, T]` bool, true where token t is to be learned. A row's last one is the end of its text: what
            follows is padding.
    """
    batch, targets = empty_batch(torch.from_numpy(tokens)), torch.from_numpy(target_mask)
    batch.mask[:, :-1] = targets[:, 1:]
    batch.lengths = (targets * torch.arange(1, targets.shape[1] + 1)).amax(dim=1)
    return batch


def empty_batch(tokens: torch.Tensor) -> Batch:
    """Build a batch of `[B, T]` tokens with nothing to learn and no routes.

    Args:
        tokens: `[B, T]` int64.
    """
    b, length = tokens.shape
    nothing, never = torch.zeros(b, length), torch.zeros(b, length, dtype=torch.bool)
    none, every = torch.zeros(b, dtype=torch.int64), torch.ones(b, dtype=torch.bool)
    policy = (tokens, never, nothing, nothing.clone(), torch.zeros(b), torch.zeros(b, 0), never.clone())
    return Batch(*policy, nothing.clone(), every, none, none.clone())
