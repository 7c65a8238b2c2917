"""Which routes a model chooses on given texts, beside another's: shares that agree, load of the experts, margins.

Each model in turn is filled into one actor, runs forward, and its routes are recorded by `RoutingReplay.record`. Every
rank compares what its own routers chose, so that any layout does.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_bai.model.build import MegatronModel
from megatron_bai.monitor.metrics.router_metrics import add_expert_load, compute_load_metrics
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.token_batch import make_token_batch, padded_length
from megatron_bai.rl.policy.forward_backward import ForwardBackward
from megatron_bai.routing.layout import Place
from megatron_bai.routing.replay.replay_pass import MicroRoutes, sets_differ
from megatron_bai.routing.replay.routing_replay import RoutingReplay

_TOKENS = 2048  # of a micro-batch of short sequences


@dataclass(frozen=True)
class Recording:
    """What this rank's routers chose.

    Attributes:
        routes: by micro-batch; `checked` are the rows that are no padding.
        margins: `[rows, layers]` float32, of the rows that are no padding: the least logit of the chosen experts less
            the largest of the others, which is below 0 where a bias or groups decide otherwise.
    """

    routes: list[MicroRoutes]
    margins: torch.Tensor


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one MoE layer over all tokens; `kept` and `overlap` beside another model's, NaN without one.

    Attributes:
        layer: decoder layer, counted from 0.
        kept: share of tokens for which both models choose the same set of experts.
        overlap: mean over tokens of |A ∩ B| / k.
        entropy: −Σ p log p in nats, p the experts' shares of the (token, slot) pairs.
        margin: mean over tokens of the margin (`Recording`), in logits.
    """

    layer: int
    kept: float
    overlap: float
    entropy: float
    margin: float

    @property
    def experts(self) -> float:
        """The effective number of experts, exp(entropy)."""
        return math.exp(self.entropy)


class RouteProbe:
    """Texts on which models of one architecture are compared."""

    def __init__(self, actor: MegatronModel, replay: RoutingReplay, sequences: Sequence[Sequence[int]]):
        """Divide the texts among data-parallel ranks.

        Args:
            actor: is filled with the weights of each model in turn.
            replay: of its routers.
            sequences: token ids of each text, the same on every rank; one at least, none empty.
        """
        from megatron.core import parallel_state

        self.actor, self.replay = actor, replay
        self.device = next(actor.modules[0].parameters()).device
        self.place = Place.here(actor.transformer_config)
        dp_rank = parallel_state.get_data_parallel_rank()
        dp_size = parallel_state.get_data_parallel_world_size()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        length = padded_length(max(map(len, sequences)), self.place.multiple)
        rows = max(1, min(_TOKENS // length, -(-len(sequences) // dp_size)))
        count = -(-len(sequences) // (rows * dp_size * stages)) * stages  # of micro-batches, as many on every rank
        own = sequences[dp_rank::dp_size]
        tokens = torch.zeros(count * rows, length, dtype=torch.int64)
        lengths = torch.zeros(count * rows, dtype=torch.int64)
        for i, sequence in enumerate(own):
            tokens[i, : len(sequence)] = torch.tensor(sequence)
            lengths[i] = len(sequence)
        self.micro_batches = make_token_batch(tokens).split(rows)
        positions = torch.arange(length)
        self._fed = [self.place.rows(positions < part[:, None]).to(self.device) for part in lengths.split(rows)]

    @torch.no_grad()
    def record(self) -> Recording:
        """Run the actor on the texts with its routers' own choices. *Collective*."""
        margins: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.replay.layers}
        hooks = [
            router.register_forward_hook(functools.partial(_add_margin, margins[layer]))
            for layer, router in self.replay.routers.items()
        ]
        try:
            with self.replay.record() as recorded:
                ForwardBackward(self.actor, self.device).forward(self.micro_batches, lambda logits, micro_batch: None)
        finally:
            for hook in hooks:
                hook.remove()
        routes = [replace(micro, checked=fed) for micro, fed in zip(recorded, self._fed, strict=False)]
        valid = torch.cat(self._fed)
        columns = [torch.cat(parts)[valid] for parts in margins.values()]
        return Recording(routes, torch.stack(columns, 1) if columns else torch.zeros(int(valid.sum()), 0))

    @torch.no_grad()
    def read_inputs(self, layer: int) -> torch.Tensor:
        """Run the actor on the texts, and return what the router of a layer reads. *Collective*.

        Args:
            layer: decoder layer, counted from 0, with experts.

        Returns:
            `[rows, H]` of this rank's tokens, no padding among them, in the model's dtype.
        """
        seen: list[torch.Tensor] = []
        router = self.replay.routers[layer]
        hook = router.register_forward_hook(lambda router, inputs, output: seen.append(inputs[0].flatten(0, -2)))
        try:
            ForwardBackward(self.actor, self.device).forward(self.micro_batches, lambda logits, micro_batch: None)
        finally:
            hook.remove()
        return torch.cat(seen)[torch.cat(self._fed)]

    def describe(self, recording: Recording, other: Recording | None = None) -> list[LayerRouting]:
        """Compute the routing of every MoE layer of the model, the same on every rank. *Collective*.

        Args:
            recording: of a model.
            other: of another model, whose routes it is compared with.
        """
        stats, columns = Stats(), self.replay.columns
        add_expert_load(stats, recording.routes, columns)
        for position, column in enumerate(columns):
            stats.mean(f"margin/{column}", recording.margins[:, position])
        if other is not None:
            _add_agreement(stats, recording.routes, other.routes, columns, self.replay.signature.topk)
        stats = stats.gather_sum(True)
        values = stats.values() | compute_load_metrics(stats, self.replay.signature.num_experts)
        layers = self.actor.architecture.moe_layers
        return [
            LayerRouting(layer, *(values.get(f"{name}/{column}", math.nan) for name in _NAMES))
            for column, layer in enumerate(layers)
        ]


_NAMES = ("kept", "overlap", "expert_entropy", "margin")  # in the order of the fields of `LayerRouting`


def _add_margin(margins: list[torch.Tensor], router: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Add the margins of one call of a router, `[rows]`."""
    chosen = output[1].bool()
    logits = router.gating(inputs[0]).float().reshape(chosen.shape)
    least = logits.masked_fill(~chosen, math.inf).amin(1)
    margins.append(least - logits.masked_fill(chosen, -math.inf).amax(1))


def _add_agreement(
    stats: Stats, one: Sequence[MicroRoutes], other: Sequence[MicroRoutes], columns: Sequence[int], topk: int
) -> None:
    """Add the share of equal sets and the mean overlap of each layer."""
    for a, b in zip(one, other, strict=True):
        assert a.checked is not None, "the probe knows which rows are padding"
        x, y = a.ids[a.checked].long(), b.ids[a.checked].long()
        same = ~sets_differ(x, y)
        common = (x[..., :, None] == y[..., None, :]).any(-1).sum(-1)
        for position, column in enumerate(columns):
            stats.ratio(f"kept/{column}", int(same[:, position].sum()), len(x))
            stats.ratio(f"overlap/{column}", int(common[:, position].sum()), len(x) * topk)


def average_layers(layers: Sequence[LayerRouting]) -> dict[str, float]:
    """Return the means over layers of all but the layer's number, by name; `experts` among them."""
    count = max(len(layers), 1)
    names = ("kept", "overlap", "entropy", "experts", "margin")
    return {name: sum(getattr(layer, name) for layer in layers) / count for name in names}
