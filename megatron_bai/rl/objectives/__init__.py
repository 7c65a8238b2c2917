"""Training objectives: pure functions from log-probabilities to a loss, one file each.

An objective gives one loss a token and says how tokens are averaged. What all have in common is done here, once: the
factors of π_θ/μ_old are measured, a penalty and a bonus are added, and the mean is taken with denominators of the
whole mini-batch over all data-parallel ranks (`aggregate.py`), so that it does not depend on how the batch was split.
"""

from hydra.core.config_store import ConfigStore

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives import (
    cispo,
    dapo,
    dppo,
    drpo,
    gmpo,
    grpo,
    gspo,
    minirl,
    ppo,
    sapo,
    sequence,
    sft,
)
from megatron_bai.rl.objectives.aggregate import loss_numerator
from megatron_bai.rl.objectives.checks import validate_policy
from megatron_bai.rl.objectives.objective import Objective, PerToken, Scalar
from megatron_bai.rl.objectives.regularise import add_regularisation
from megatron_bai.rl.objectives.terms import add_router_shift, ratio_metrics

__all__ = ["Objective", "batch_loss", "check", "get", "register", "total"]

_BUILT_IN = (sft, minirl, sequence, dppo, drpo, grpo, dapo, cispo, gspo, gmpo, sapo, ppo)
_REGISTRY: dict[str, Objective] = {module.OBJECTIVE.settings.name: module.OBJECTIVE for module in _BUILT_IN}


def register(objective: Objective) -> None:
    """Register an objective of another package as `objective=NAME`, NAME the default `name` of its settings.

    Raises:
        UserError: the name is taken, or the settings lack those that every objective on rollouts has.
    """
    name = objective.settings.name
    if objective.rollouts and not issubclass(objective.settings, config.Policy):
        raise UserError(f"objective {name!r} has rollouts: derive its {objective.settings.__qualname__} from Policy")
    if _REGISTRY.setdefault(name, objective) is not objective:
        raise UserError(f"there is an objective {name!r} already: give {objective.settings.__qualname__} another name")
    ConfigStore.instance().store(group="objective", name=name, node=objective.settings)


def get(name: str) -> Objective:
    """Look an objective up.

    Raises:
        UserError: no such objective.
    """
    if name not in _REGISTRY:
        raise UserError(f"objective.name is {name!r}: choose one of {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def check(settings: config.Objective) -> Objective:
    """Return the objective that the settings choose; refuse settings that contradict each other or are never read.

    Raises:
        UserError: names the settings.
    """
    objective = get(settings.name)
    if type(settings) is not objective.settings:
        raise UserError(
            f"objective.name is {settings.name!r}, but the settings are those of {type(settings).name!r}: choose with "
            f"objective={settings.name}"
        )
    validate_group("objective", settings)
    if isinstance(settings, config.Policy):
        validate_policy(settings)
    objective.check(settings)
    return objective


def batch_loss(
    objective: Objective,
    settings: config.Objective,
    logprobs: PerToken,
    batch: TrainingBatch,
    entropy: PerToken | None = None,
) -> tuple[Scalar, Stats]:
    """Compute the batch's part of the loss: a sum, to be divided by the whole mini-batch's `loss_denominator`.

    Args:
        objective: gives the losses.
        settings: of the objective.
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: B samples.
        entropy: `[B, T]` of the policy in nats, with gradient; needed if `objective.entropy_bonus` is not 0.

    Returns:
        The sum over the batch, and its metrics: the objective's own and, learning from rollouts, those of
        `terms.ratio_metrics`, `terms.add_router_shift` and `regularise.add_regularisation`.

    Raises:
        UserError: the objective gave losses of another shape, or wrote into the batch.
    """
    before = _tensor_versions(batch)
    losses, stats = objective.loss(logprobs, batch, settings)
    if written := [name for name, version in _tensor_versions(batch).items() if version != before[name]]:
        raise UserError(
            f"objective {settings.name!r} wrote into batch.{written[0]}, which later parts of the loss and of the step "
            "read: take a copy, and leave out tokens by a loss of 0"
        )
    if losses.shape != batch.tokens.shape:
        raise UserError(
            f"objective {settings.name!r} gave losses of shape {list(losses.shape)}: one a token is needed, "
            f"{list(batch.tokens.shape)}, the shape of batch.advantages"
        )
    if objective.rollouts:
        stats.add(ratio_metrics(logprobs, batch))
    if isinstance(settings, config.RouterShifted) and settings.router_shift:
        add_router_shift(stats, batch, settings)
    if isinstance(settings, config.Policy):
        losses = add_regularisation(losses, settings, logprobs, batch, entropy, stats)
    return loss_numerator(losses.masked_fill(~batch.loss_mask, 0.0), batch, objective.mean(settings)), stats


def _tensor_versions(batch: TrainingBatch) -> dict[str, int]:
    """Return how often each tensor of a batch was written into."""
    return {name: tensor._version for name, tensor in (*batch.tensors(), ("loss_mask", batch.loss_mask))}


total = batch_loss  # its documented name
