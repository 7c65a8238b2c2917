"""The training engine: log-probabilities of a batch, and updates with an objective."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_bai import config
from megatron_bai.model.build import MegatronModel
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.stages import RolloutBatch, TrainingBatch
from megatron_bai.rl.batches.token_batch import TokenBatch, make_token_batch
from megatron_bai.rl.objectives import Objective, aggregate
from megatron_bai.rl.policy.forward_backward import ForwardBackward
from megatron_bai.rl.policy.held_back import HeldBack
from megatron_bai.rl.policy.kept_logprobs import kept_logprobs_and_entropy
from megatron_bai.rl.policy.logprobs import logprobs_and_entropy
from megatron_bai.rollout.kept_ids import NO_ID
from megatron_bai.routing.layout import Place, filler_routes
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.route_weights import WeightGap, force_weights
from megatron_bai.routing.replay.routing_replay import RoutingReplay
from megatron_bai.routing.replay.shifted_topk import LogitShift


@dataclass
class Scores:
    """Results of a forward pass over a batch.

    Attributes:
        logprobs: `[B, T]` float32, log π of the next token, 0 where the sample has none; None on ranks without the
            pipeline's last stage.
        entropy: `[B, T]` float32 nats, likewise.
        routes: of each micro-batch on this rank, if they were recorded.
    """

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    routes: list[MicroRoutes]


class TrainingEngine:
    """The actor with its passes and the replay of its routers."""

    def __init__(
        self,
        actor: MegatronModel,
        replay: RoutingReplay,
        device: torch.device,
        temperature: float,
        exact: bool = False,
        held_back: HeldBack | None = None,
    ):
        """Build what the passes share.

        Args:
            actor: the policy.
            replay: of its routers.
            device: what this process computes on.
            temperature: of sampling.
            exact: compute log-probabilities as the server does (`rollout.exact`); the actor's layers do so already.
            held_back: ids that the first tokens of a response were not sampled from; None: there are none.
        """
        from megatron.core import parallel_state

        self.actor, self.replay, self.device, self.temperature = actor, replay, device, temperature
        self.exact, self.held_back = exact, held_back
        self.forward_backward = ForwardBackward(actor, device)
        self.tensor_rank: int = parallel_state.get_tensor_model_parallel_rank()
        self.last_stage: bool = parallel_state.is_pipeline_last_stage()
        self.place = Place.here(actor.transformer_config)

    def local_routes(self, micro_batch: RolloutBatch) -> MicroRoutes:
        """Return the inference engine's routes of a micro-batch, of this rank's tokens."""
        assert micro_batch.columns == tuple(self.replay.columns), "routes of other layers than this rank's"
        tail = micro_batch.packing.tail if micro_batch.packing else 0
        fill = torch.from_numpy(filler_routes(tail, self.replay.signature, self.replay.columns))
        ids = self.place.rows(micro_batch.pack(micro_batch.routes, fill))
        routed, missing = (
            self.place.rows(micro_batch.pack(rows)) for rows in (micro_batch.routed, micro_batch.missing)
        )
        live = missing.to(self.device) if missing.any() else None
        return MicroRoutes(ids.to(self.device), routed.to(self.device), live)

    def local_weights(self, micro_batch: RolloutBatch) -> torch.Tensor:
        """Return the inference engine's weights of a micro-batch's experts, as `local_routes` returns these."""
        assert micro_batch.route_weights is not None, "the samples come without the weights of their routes"
        return self.place.rows(micro_batch.pack(micro_batch.route_weights)).to(self.device)

    def score_weights(self, micro_batches: list[RolloutBatch]) -> tuple[torch.Tensor | None, WeightGap]:
        """Compute log-probabilities with the inference engine's experts and its weights of them. Collective.

        Args:
            micro_batches: as in `score`, with `route_weights`.

        Returns:
            `[B, T]` as in `Scores`, and what the weights differ by from those that this rank's routers computed.
        """
        routes = [self.local_routes(micro_batch) for micro_batch in micro_batches]
        weights = [self.local_weights(micro_batch) for micro_batch in micro_batches]
        with force_weights(self.replay, routes, weights) as gap:
            logprobs = self.score(micro_batches, routes).logprobs
        return logprobs, gap

    def _live_routes(self, micro_batch: TokenBatch) -> MicroRoutes:
        """Return routes that leave the choice to the routers, but for padding, which moves no expert bias then."""
        rows = self.place.rows(micro_batch.pack(micro_batch.targets >= 0)).to(self.device)
        ids = torch.from_numpy(filler_routes(len(rows), self.replay.signature, self.replay.columns))
        return MicroRoutes(ids.to(self.device), rows, rows)

    @torch.no_grad()
    def score(
        self,
        micro_batches: list[RolloutBatch],
        routes: list[MicroRoutes] | None = None,
        record: bool = False,
        shift: LogitShift | None = None,
    ) -> Scores:
        """Compute log-probabilities and entropy under the current weights. Collective.

        Args:
            micro_batches: which the model is fed in one shape, as many on every data-parallel rank.
            routes: experts to force, one entry a micro-batch; None lets the routers choose.
            record: record the routers' own choices instead of forcing any.
            shift: with `record`, added to the logits that choose (`RoutingReplay.record`).
        """
        with self.replay.record(shift) if record else self.replay.force(routes) as recorded:
            compute = partial(
                _logprobs_and_entropy, temperature=self.temperature, exact=self.exact, held_back=self.held_back
            )
            outputs = self.forward_backward.forward(micro_batches, compute)
        fed = [
            self.place.rows(micro_batch.pack(micro_batch.routed | micro_batch.missing)).to(self.device)
            for micro_batch in micro_batches
        ]
        chosen = [replace(routes, checked=rows) for routes, rows in zip(recorded or (), fed, strict=False)]
        if not self.last_stage:
            return Scores(None, None, chosen)
        logprobs, entropy = map(torch.cat, zip(*outputs, strict=True))
        return Scores(logprobs, entropy, chosen)

    @torch.no_grad()
    def score_probe(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Compute log-probabilities of tokens at temperature 1, with live routing. Collective.

        Args:
            tokens: `[B, T]` int64.

        Returns:
            `[B, T]` float32 on ranks of the last stage, position t that of token t + 1; None elsewhere.
        """
        # An interleaved schedule needs a micro-batch a stage.
        stages = self.forward_backward.stages
        micro_batches = make_token_batch(tokens).split(
            -(-len(tokens) // stages) if len(self.actor.chunks) > 1 else len(tokens)
        )
        outputs = self.forward_backward.forward(micro_batches, partial(_logprobs_and_entropy, temperature=1.0))
        return torch.cat([logprobs for logprobs, _ in outputs]) if self.last_stage else None

    def update(
        self,
        micro_batches: list[TrainingBatch],
        routes: list[MicroRoutes] | None,
        objective: Objective,
        settings: config.Objective,
        mask_padding: bool = False,
    ) -> tuple[Stats, float]:
        """Make one optimizer step on a mini-batch. Collective.

        Args:
            micro_batches: of the mini-batch, as in `score`.
            routes: experts to force, one entry a micro-batch; None lets the routers choose.
            objective: gives the loss.
            settings: of the objective.
            mask_padding: as in `ForwardBackward.update`.

        Returns:
            The objective's statistics, with `loss`, on ranks of the last stage (empty elsewhere), and the gradient's
            norm before clipping.

        Raises:
            UserError: the gradient is not finite; the weights are of no use any more, checkpoints are intact.
        """
        local_count = aggregate.loss_denominator(micro_batches, objective.mean(settings))
        stats = Stats()
        if self.last_stage:
            stats.ratio("loss", 0.0, local_count)

        def loss(logits: torch.Tensor, micro_batch: TrainingBatch) -> torch.Tensor:
            logprobs, entropy = _logprobs_and_entropy(logits, micro_batch, self.temperature, self.exact, self.held_back)
            total, loss_stats = objectives.batch_loss(objective, settings, logprobs, micro_batch, entropy)
            loss_stats.ratio("loss", float(total.detach()), 0)
            stats.add(loss_stats)
            return total

        if routes is None and self.replay.moves_bias:
            routes = [self._live_routes(micro_batch) for micro_batch in micro_batches]
        norm = self.forward_backward.update(micro_batches, loss, local_count, self.replay.force(routes), mask_padding)
        return stats, norm


def _logprobs_and_entropy(
    logits: torch.Tensor,
    micro_batch: TokenBatch,
    temperature: float,
    exact: bool = False,
    held_back: HeldBack | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probabilities and entropy of a micro-batch, `[B, T]` each, 0 where no token follows.

    They are of the distribution that a server samples from: over the kept ids of a truncated draw, where other tokens
    than a response's have 0, and without ids that are held back.
    """
    targets = micro_batch.pack(micro_batch.targets, filling=-1)
    rollouts = micro_batch if isinstance(micro_batch, RolloutBatch) else None  # the probe's text was not sampled
    if rollouts and rollouts.kept_ids is not None:  # without ids that were held back
        kept_ids = rollouts.pack(rollouts.kept_ids, filling=NO_ID)
        scores = kept_logprobs_and_entropy(logits, targets, kept_ids, temperature)
    else:
        scores = logprobs_and_entropy(logits, targets, temperature, exact=exact)
        if rollouts and held_back:
            scores = held_back.rescore(scores, logits, targets, rollouts, temperature)
    logprobs, entropy = scores
    return micro_batch.unpack(logprobs), micro_batch.unpack(entropy)
