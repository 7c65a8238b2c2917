"""The losses of routers beside the objective's: load balancing and z loss, as Megatron-Core has them.

Megatron-Core computes them and adds their gradients in the backward pass (`MoEAuxLossAutoScaler`): the mean over
micro-batches and data-parallel ranks, summed over layers. Of one layer and the tokens of a micro-batch, with E experts
of which a token uses k, f_e the share of the (token, slot) pairs that expert e has, and P_e its mean probability:

- `aux_loss`: E Σ_e f_e P_e (arXiv 2101.03961), 1 where f or P is even;
- `seq_aux_loss`: the same of each row, and the mean over rows (arXiv 2412.19437, eq. 17);
- `global_aux_loss`: f and P over all data-parallel ranks, f over the step's micro-batches so far (arXiv 2501.11873);
- the z loss: the mean of (log Σ_e exp logit_e)² (arXiv 2202.08906).

f is of the router's k largest probabilities. Padding counts in none of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.compat import releases

Z_LOSS = "z_loss"
# Megatron-Core's names of what it records of each type
BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def set_router_losses(transformer_config: Any, supervised: config.Supervised) -> None:
    """Set the losses in Megatron's TransformerConfig, before the model is built.

    Args:
        transformer_config: changed in place.
        supervised: the settings, which reinforcement learning refuses (`validate_settings`).
    """
    transformer_config.moe_router_load_balancing_type = supervised.load_balancing
    transformer_config.moe_aux_loss_coeff = supervised.aux_loss_coeff
    transformer_config.moe_z_loss_coeff = supervised.z_loss_coeff or None


def mend_router(router: Any) -> None:
    """Make a router's losses exact in every layout and with a padding mask, by wrappers of the methods that it calls.

    What Megatron-Core 0.16 to 0.19 does otherwise:

    - `global_aux_loss` divides by the tokens of all data-parallel ranks, and so does the mean of their gradients again:
      the coefficient means less by the number of ranks (Megatron-LM #3672). And the mean load of micro-batches with
      unequal numbers of tokens does not add up to 1.
    - `seq_aux_loss` divides by the mean length of a micro-batch's rows, not by each row's.
    - The z loss is a mean of tensor ranks' means, of which the last have fewer tokens where rows end in padding.
    - Where there is an expert bias a padding mask is an error: it is not broadcast over the experts.

    Args:
        router: a `TopKRouter`.
    """
    apply_seq, apply_global = router._apply_seq_aux_loss, router._apply_global_aux_loss
    add_load = router._apply_expert_bias

    def seq_aux_loss(probs: Any, scores: Any, routing_map: Any, length: int, rows: int, **mask: Any) -> Any:
        if not router.get_aux_loss_coeff("seq_aux_loss"):
            return probs
        counts = sum_over(router.tp_cp_group, routing_map.view(length, rows, -1).sum(dim=(0, 2))).clamp(min=1)
        weights = (counts.float().mean() / counts).square()
        scores = (scores.view(length, rows, -1) * weights[:, None]).view_as(scores)
        return apply_seq(probs, scores, routing_map, length, rows, **mask)

    def global_aux_loss(probs: Any, scores: Any, routing_map: Any, **mask: Any) -> Any:
        if not router.get_aux_loss_coeff("global_aux_loss"):
            return probs
        count = sum_over(router.tp_dp_cp_group, routing_map.sum())
        mean = (router.global_tokens_per_expert.sum() + count) / (router.ga_steps + 1)
        ranks = router.tp_dp_cp_group.size() // router.tp_cp_group.size()
        return apply_global(probs, scores * (ranks * count / mean), routing_map, **mask)

    def z_loss(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        return _add_z_loss(router, logits, padding_mask)

    router._apply_seq_aux_loss, router._apply_global_aux_loss = seq_aux_loss, global_aux_loss
    router.apply_z_loss = z_loss
    # Without the mask: `RoutingReplay` leaves padding out of the load where that moves the bias
    router._apply_expert_bias = lambda routing_map, padding_mask=None: add_load(routing_map)


def _add_z_loss(router: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Return `[tokens, experts]` logits with the z loss in their gradient: a mean over the tokens of all tensor ranks.

    `padding_mask`: `[tokens]` bool, True is padding; None: there is none.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    coefficient = router.config.moe_z_loss_coeff
    if coefficient is None or not router.training or not torch.is_grad_enabled():
        return logits
    squares = logits.logsumexp(dim=-1).square()
    valid = torch.ones_like(squares, dtype=torch.bool) if padding_mask is None else ~padding_mask
    loss = (squares * valid).sum() / sum_over(router.tp_cp_group, valid.sum()).clamp(min=1)
    _record(Z_LOSS, loss, router.layer_number, router.config.num_layers)
    with_loss: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, loss * coefficient)
    return with_loss


def sum_over(group: dist.ProcessGroup, counts: torch.Tensor) -> torch.Tensor:
    """Sum counts over the ranks of a group, in place. *Collective* over it.

    Args:
        group: of ranks.
        counts: of any shape and dtype.
    """
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    return counts


def _record(name: str, value: torch.Tensor, layer_number: int, num_layers: int) -> None:
    """Add to what Megatron-Core records of a layer, counted from 1."""
    if releases.megatron_release().has_metrics_tracker:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(name, value, layer_number, num_layers)
    else:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, value, layer_number, num_layers)


def recorded_losses() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what Megatron-Core has recorded on this rank: a loss's name (`BALANCING`, `Z_LOSS`) and its values.

    They are `[layers of the model]` without the coefficients, summed over micro-batches; the parts of tensor ranks are
    to be added.
    """
    if releases.megatron_release().has_metrics_tracker:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        yield from ((name, entry.values) for name, entry in get_moe_metrics_tracker().metrics.items())
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        yield from ((name, entry["values"]) for name, entry in get_moe_layer_wise_logging_tracker().items())
