"""What training asks of the actor: log-probabilities of a batch, and updates with an objective."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from megatron_bai import config
from megatron_bai.model.build import Actor
from megatron_bai.rl import objectives
from megatron_bai.rl.batch import Batch, blank
from megatron_bai.rl.logprobs import entropy, token_logprobs
from megatron_bai.rl.objectives import Objective, aggregate
from megatron_bai.rl.passes import Passes
from megatron_bai.monitor.stats import Stats
from megatron_bai.routing.layout import Place
from megatron_bai.routing.queues import MicroRoutes
from megatron_bai.routing.replay import RoutingReplay


@dataclass
class Scores:
    """What a forward pass over a batch found.

    Attributes:
        logprobs: `[B, T]` float32 log π, or None on ranks without the pipeline's last stage.
        entropy: `[B, T]` float32 nats, likewise.
        recorded: routes of each micro-batch on this rank, when they were recorded.
    """

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    recorded: list[MicroRoutes]


class Engine:
    """The actor with what its passes need."""

    def __init__(self, actor: Actor, replay: RoutingReplay, device: torch.device, temperature: float):
        from megatron.core import parallel_state

        self.actor, self.replay, self.device, self.temperature = actor, replay, device, temperature
        self.passes = Passes(actor, device)
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.place = Place.here(actor.transformer_config)

    def routes_of(self, micro: Batch) -> MicroRoutes:
        """The inference engine's routes of a micro-batch, cut to this rank's tokens."""
        ids, routed, missing = (self.place.rows(t) for t in (micro.routes, micro.routed, micro.missing))
        live = missing.to(self.device) if missing.any() else None
        return MicroRoutes(ids.to(self.device), routed.to(self.device), live)

    @torch.no_grad()
    def score(self, micros: list[Batch], routes: list[MicroRoutes] | None = None, record: bool = False) -> Scores:
        """Log-probabilities and entropy under the current weights. Collective.

        Args:
            micros: equal-sized micro-batches, as many on every data-parallel rank.
            routes: experts to force, one entry a micro-batch; None lets the routers choose.
            record: keep the routers' own choices instead of forcing any.
        """

        def collect(logits: torch.Tensor, micro: Batch) -> dict[str, torch.Tensor]:
            nats = entropy(logits, self.temperature)
            return {"logprobs": token_logprobs(logits, micro.tokens, self.temperature), "entropy": nats}

        with self.replay.record() if record else self._forcing(routes) as found:
            outputs = self.passes.forward(micros, collect)
        fed = [self.place.rows(micro.routed | micro.missing).to(self.device) for micro in micros]
        recorded = [replace(own, counted=rows) for own, rows in zip(found or (), fed)]
        if not self.last_stage:
            return Scores(None, None, recorded)
        cat = {name: torch.cat([output[name] for output in outputs]) for name in ("logprobs", "entropy")}
        return Scores(cat["logprobs"], cat["entropy"], recorded)

    @torch.no_grad()
    def probe(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Log-probabilities of tokens at temperature 1, with live routing. Collective.

        Args:
            tokens: `[B, T]` int64.

        Returns:
            `[B, T]` float32 on ranks of the last stage, as `token_logprobs`; None elsewhere.
        """

        def collect(logits: torch.Tensor, micro: Batch) -> torch.Tensor:
            return token_logprobs(logits, micro.tokens, 1.0)

        # An interleaved schedule needs a micro-batch a stage.
        stages = self.passes.stages
        micros = blank(tokens).split(-(-len(tokens) // stages) if len(self.actor.chunks) > 1 else len(tokens))
        outputs = self.passes.forward(micros, collect)
        return torch.cat(outputs) if self.last_stage else None

    def update(
        self,
        micros: list[Batch],
        routes: list[MicroRoutes] | None,
        objective: Objective,
        settings: config.Objective,
    ) -> tuple[Stats, float]:
        """One optimizer step on a mini-batch. Collective.

        Returns:
            The objective's statistics, with `loss`, on ranks of the last stage (empty elsewhere), and the gradient's
            norm before clipping.

        Raises:
            UserError: the gradient is not finite; the weights are of no use any more, checkpoints are intact.
        """
        mine = aggregate.count(micros, objective.mean(settings))
        stats = Stats()
        if self.last_stage:
            stats.ratio("loss", 0.0, mine)
        bonus = isinstance(settings, config.Policy) and settings.entropy_bonus

        def loss(logits: torch.Tensor, micro: Batch) -> torch.Tensor:
            nats = entropy(logits, self.temperature) if bonus else None
            logprobs = token_logprobs(logits, micro.tokens, self.temperature)
            total, found = objectives.total(objective, settings, logprobs, micro, nats)
            found.ratio("loss", float(total.detach()), 0)
            stats.add(found)
            return total

        return stats, self.passes.update(micros, loss, mine, self._forcing(routes))

    def _forcing(self, routes: list[MicroRoutes] | None) -> AbstractContextManager:
        return nullcontext() if routes is None else self.replay.force(routes)
