"""Routes predicted for a step's later updates, which R2 replays in place of the old policy's (PR², arXiv 2606.00395).

Experimental. Each router has a predictor W `[E, H]`, linear in the router's input h and 0 at first. In the pass that
records R2's routes it shifts the logits p that choose; with ρ the router's distribution in an update,

    ρ̂ = softmax(p_old + W h_old),  route = top-k of ρ̂  (eq. 4 to 6);  loss of W: Σ_layers mean_t KL(ρ ‖ ρ̂)  (eq. 7, 8)

without gradient through ρ, p_old and h_old, in each update of a step but its first (algorithm 3), before which no
router has moved. Nothing else depends on W: it is no part of the model that is saved, exported or sent to servers.

The paper itself could not be read but for its abstract. The equations, the zero start, the skipped update and the
predictors' own learning rate are those that its authors' code and notes state: DaizeDong/miles, branch `pr2`,
docs/predictive-routing-replay.md and miles/backends/megatron_utils/predictive_router_replay.py (the loss `kl-post`),
and DaizeDong/verl, branch `replay`, verl/utils/megatron/router_replay_patch.py (where the KL is the reverse one). There
the predictors are in the actor's Adam, at 100 to 1000 times its rate (the paper: 10⁴), and learn from a few samples.
Ours are three things: π_old's weights of the chosen experts come from p_old, in their code from p_old + W h_old, with
which π_θ/π_old would not be 1 before a step's first update; tokens are left out evenly; the rate is one of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.micro_batches import MiniBatches
from megatron_bai.rl.batches.stages import RolloutBatch
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.routing.replay.router_scores import observe_logits
from megatron_bai.routing.replay.shifted_topk import LogitShift

_FILES, _MOMENTS = "route_predictors", ("exp_avg", "exp_avg_sq")
_METRICS = ("predict_loss", "predict_changed_fraction", "predict_correct_fraction", "predict_correct_fraction_r2")


def compute_kl(
    weight: torch.Tensor, hidden: torch.Tensor, old_logits: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute KL(ρ ‖ ρ̂) of a router's predictor, and its gradient.

    ∂ Σ KL / ∂W = (ρ̂ − ρ)ᵀ h_old.

    Args:
        weight: `[E, H]`, W.
        hidden: `[rows, H]`, h_old.
        old_logits: `[rows, E]`, p_old.
        logits: `[rows, E]`, whose softmax is ρ.

    Returns:
        `[rows]` in nats, and the gradient of their sum, `[E, H]`.
    """
    predicted = (old_logits + hidden @ weight.T).log_softmax(dim=-1)
    current = logits.log_softmax(dim=-1)
    probabilities = current.exp()
    kl = (probabilities * (current - predicted)).sum(dim=-1)
    return kl, (predicted.exp() - probabilities).T @ hidden


@dataclass
class _OldRows:
    """The routers' inputs, logits and choices of a micro-batch's tokens that train predictors, layer by layer.

    Attributes:
        index: `[rows]` int64, of these tokens among those that this rank's routers see.
        hidden: `[rows, H]` each, in the router's dtype.
        logits: `[rows, E]` float32 each.
        chosen: `[rows, E]` bool each.
    """

    index: torch.Tensor
    hidden: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)


class RoutePrediction:
    """The predictors of this rank's routers, which all ranks that have these routers hold with the same bits.

    Attributes:
        is_enabled: whether `replay.predict` is set; if not, nothing is recorded or learned.
        num_updates: of the predictors in the run so far.
        weights: `[layers, E, H]` float32, the predictors of the rank's MoE layers in order.
        optimizer: theirs.
    """

    def __init__(self, engine: TrainingEngine, settings: config.Config):
        self.is_enabled = settings.replay.predict
        self.num_updates = 0
        self._engine, self._settings = engine, settings
        self._old: list[list[_OldRows]] = []  # of each mini-batch; none of the first
        if self.is_enabled:
            replay, width = engine.replay, engine.actor.transformer_config.hidden_size
            shape = (len(replay.layers), replay.signature.num_experts, width)
            self.weights = torch.nn.Parameter(torch.zeros(shape, device=engine.device))
            betas, decay = (0.9, settings.trainer.adam_beta2), settings.trainer.weight_decay
            self.optimizer = torch.optim.AdamW([self.weights], betas=betas, weight_decay=decay)

    @property
    def shift(self) -> LogitShift | None:
        """What the predictors add to logits; None while they are 0."""
        return self._compute_shift if self.num_updates else None

    def _compute_shift(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(-1, hidden.shape[-1]).float() @ self.weights[index].detach().T

    @contextmanager
    def record(self, step: int, mini_batches: MiniBatches[RolloutBatch]) -> Iterator[None]:
        """Record what predictors learn from in the first pass of a block, which records π_old's routes.

        Args:
            step: global step, from 0.
            mini_batches: of the step.
        """
        if not self.is_enabled:
            yield
            return
        self._old = [[self._select_rows(step, micro) for micro in micros] for micros in mini_batches[1:]]
        first, later = len(mini_batches[0]), sum(self._old, [])
        seen = [0] * len(self._engine.replay.routers)

        def observe(index: int, hidden: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
            position = seen[index] - first
            seen[index] += 1
            if 0 <= position < len(later):
                old = later[position]
                old.hidden.append(hidden[old.index])
                old.logits.append(logits[old.index])
                old.chosen.append(chosen[old.index])

        with observe_logits(self._engine.replay, observe):
            yield

    def _select_rows(self, step: int, micro_batch: RolloutBatch) -> _OldRows:
        """Select one of `predict_every` tokens by its position in the sample, which no layout changes."""
        positions, every = torch.arange(micro_batch.tokens.shape[1]), self._settings.replay.predict_every
        fed = micro_batch.routed | micro_batch.missing
        rows = self._engine.place.rows(micro_batch.pack(fed & ((positions + step) % every == 0).to(fed.device)))
        return _OldRows(rows.nonzero()[:, 0].to(self._engine.device))

    @contextmanager
    def learn(self, update: int, rate: float, stats: Stats) -> Iterator[None]:
        """Make one step of the predictors on what the routers do in a block, which makes the actor's. Collective.

        Args:
            update: of the step, from 0; nothing is learned in the first.
            rate: the actor's learning rate.
            stats: of every rank; gets the metrics, means over the (token, layer) pairs learned from, from before the
                predictors' step.

        Raises:
            RuntimeError: the ranks' predictors differ.
        """
        if not self.is_enabled or not update:
            yield
            return
        old, self._old[update - 1] = self._old[update - 1], []
        gradient = torch.zeros_like(self.weights.detach())
        sums = torch.zeros(len(_METRICS), dtype=torch.float64, device=self._engine.device)
        seen, topk = [0] * len(gradient), self._engine.replay.signature.topk

        def observe(index: int, hidden: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
            rows = old[seen[index]]
            seen[index] += 1
            live, before, predicted = logits[rows.index], rows.logits[index], rows.chosen[index]
            kl, part = compute_kl(self.weights[index].detach(), rows.hidden[index].float(), before, live)
            gradient[index] += part
            own, later = (_top(values, topk) for values in (before, live))
            differ = [(a != b).any(dim=-1).sum() for a, b in ((predicted, own), (predicted, later), (own, later))]
            same = [len(live) - count for count in differ[1:]]
            sums.add_(torch.stack([kl.double().sum(), differ[0], *same]))

        with observe_logits(self._engine.replay, observe):
            yield
        assert set(seen) <= {len(old)}, f"routers ran for {seen} of {len(old)} micro-batches"
        num_rows = sum(len(rows.index) for rows in old)
        for name, total in zip(_METRICS, sums.tolist(), strict=True):
            stats.ratio(name, total, num_rows * len(gradient))
        self._step(gradient, num_rows, rate)

    def _step(self, gradient: torch.Tensor, num_rows: int, rate: float) -> None:
        """Make an optimizer step on the mean gradient over the rows of all ranks that have these routers."""
        from megatron.core import parallel_state

        # Without sequence parallelism all tensor-parallel ranks add the same rows, which leaves the mean unchanged.
        group = parallel_state.get_tensor_and_data_parallel_group()
        count = torch.tensor([num_rows], dtype=torch.int64, device=gradient.device)
        dist.all_reduce(count, group=group)
        if not int(count):
            return
        self.num_updates += 1  # also where a pipeline stage has no MoE layer: it is the same on every rank
        if not gradient.numel():
            return
        dist.all_reduce(gradient, group=group)
        self.weights.grad = gradient / count
        full = self._settings.trainer.learning_rate
        scale = rate / full if full else 0.0
        self.optimizer.param_groups[0]["lr"] = self._settings.replay.predict_learning_rate * scale
        self.optimizer.step()
        self.weights.grad = None
        checksum = self.weights.detach().view(torch.int32).sum(dtype=torch.int64)
        extremes = torch.stack([checksum, -checksum])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if int(extremes.sum()):
            raise RuntimeError("the ranks of a layer have different route predictors")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates; `save_files` has the predictors."""
        return {"updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the number of updates in `state`."""
        self.num_updates = state["updates"]

    def save_files(self, directory: Path) -> None:
        """Write the predictors and their moments to a checkpoint's directory, a file for each layer.

        Raises:
            OSError: a file cannot be written.
        """
        from megatron.core import parallel_state

        if self._engine.tensor_rank or parallel_state.get_data_parallel_rank():
            return
        (directory / _FILES).mkdir(exist_ok=True)
        for index, layer in enumerate(self._engine.replay.layers):
            arrays: dict[str, Any] = {name: values[index].cpu().numpy() for name, values in self._tensors().items()}
            np.savez(_file(directory, layer), **arrays)

    def load_files(self, directory: Path) -> None:
        """Read what `save_files` wrote, in any layout.

        Raises:
            UserError: a file is missing or damaged.
        """
        tensors = self._tensors()
        for index, layer in enumerate(self._engine.replay.layers):
            path = _file(directory, layer)
            try:
                with np.load(path, allow_pickle=False) as archive:
                    for name, values in tensors.items():
                        values[index].copy_(torch.from_numpy(archive[name]))
            except (OSError, BadZipFile, KeyError, ValueError, RuntimeError) as error:
                raise UserError(f"{path} cannot be read ({error}): restore it") from None
        if self.num_updates:
            step = torch.tensor(float(self.num_updates))
            self.optimizer.state[self.weights] = {"step": step} | {name: tensors[name] for name in _MOMENTS}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the predictors and Adam's moments by name, `[layers, E, H]` each; moments are 0 before an update."""
        weight = self.weights.detach()
        moments = self.optimizer.state.get(self.weights) or {name: torch.zeros_like(weight) for name in _MOMENTS}
        return {"weight": weight} | {name: moments[name] for name in _MOMENTS}


def _file(directory: Path, layer: int) -> Path:
    """Return the file of a decoder layer, counted from 0."""
    return directory / _FILES / f"layer-{layer:05}.npz"


def _top(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the top-k of `[rows, E]` as a bool mask of the same shape."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(topk, dim=-1).indices, True)
