"""Cases for objectives, and what ours makes of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_bai import config
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.stages import (
    TrainingBatch,
    make_rollout_batch,
    make_scored_batch,
    make_training_batch,
)
from megatron_bai.rl.objectives import aggregate
from megatron_bai.rl.objectives.correction import CORRECTIONS

# Every objective, with each of its variants.
SETTINGS = [
    config.Minirl(),
    config.Minirl(clip=False),
    config.Minirl(train_infer_is=False),
    config.Minirl(length_norm=True),
    config.Minirl(is_max=0.5, clip_low=0.0, clip_high=0.0),
    config.Sequence(),
    config.Sequence(is_max=1.5),
    config.Grpo(),
    config.Grpo(clip_high=0.28),
    *(config.Grpo(correction=kind, correction_max=1.1) for kind in CORRECTIONS[1:-1]),
    config.Grpo(correction="token_kpop", correction_kl=0.02),
    config.Grpo(dual_clip=1.5),
    config.Grpo(correction="token_mask", correction_min=0.9, correction_max=1.2),  # IcePop
    config.Grpo(correction="sequence_mask", correction_min=0.5),
    config.Dppo(),
    config.Dppo(delta=0.02, length_norm=True),
    config.Dppo(divergence="kl"),
    config.Dppo(divergence="kl", delta=0.001, anchor="training", is_max=1.1),
    config.Drpo(),
    config.Drpo(delta=0.1, length_norm=True),
    config.Dapo(),
    config.Dapo(token_mean="prompt"),
    config.Dapo(token_mean="prompt", correction="token_truncate"),
    config.Dapo(dual_clip=3.0, correction="sequence_truncate"),
    config.Cispo(),
    config.Cispo(clip_low=0.1, token_mean="prompt"),
    config.Cispo(correction="sequence_mask"),
    config.Gspo(),
    config.Gspo(clip_low=0.2, clip_high=0.3),
    config.Gspo(clip_low=0.2, clip_high=0.3, correction="token_truncate", correction_max=1.1),
    config.Gmpo(),
    config.Gmpo(clip_low=0.05, clip_high=0.1),
    config.Gmpo(clip_low=0.1, clip_high=0.05, correction="token_kpop", correction_kl=0.01),
    config.Sapo(),
    config.Sapo(tau_positive=3.0, tau_negative=0.5),
    config.Sapo(tau_positive=0.2, correction="token_truncate", correction_max=1.1),
    *(kind(router_shift=True) for kind in (config.Minirl, config.Dppo, config.Grpo, config.Cispo, config.Ppo)),
    config.Minirl(router_shift=True, router_shift_min=0.6, train_infer_is=False),
    config.Sequence(router_shift=True, router_shift_min=0.9, is_max=1.5),
    config.Drpo(router_shift=True, delta=0.1),
    config.Gspo(router_shift=True, router_shift_min=0.0, clip_low=0.2, clip_high=0.3),
    config.Gmpo(router_shift=True, router_shift_min=0.5, clip_low=0.1, clip_high=0.1),
    config.Sapo(router_shift=True, router_shift_min=0.5),
    config.Ppo(),
    config.Ppo(dual_clip=1.5, correction="token_mask"),
]


def name(settings: config.Objective) -> str:
    """Of a test: the objective and the settings that are not its defaults."""
    changed = {k: v for k, v in vars(settings).items() if v != getattr(type(settings), k)}
    return " ".join([settings.name, *(f"{k}={v}" for k, v in changed.items())])


@dataclass(frozen=True)
class Case:
    """Log-probabilities of four policies, the routers' shift (None: 0) and the mask `[B, T]`; the rest is `[B]`."""

    new: np.ndarray
    old: np.ndarray
    infer: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    prompt_index: np.ndarray
    in_loss: np.ndarray
    shift: np.ndarray | None = None

    def batch(self) -> TrainingBatch:
        """With what objectives read, in the precision of the arrays; samples that do not count are out of the mask."""
        b, length = self.mask.shape
        advantages = torch.from_numpy(self.advantages)
        text = make_rollout_batch(
            torch.zeros(b, length, dtype=torch.int64),
            torch.full((b,), length),
            torch.from_numpy(self.mask),
            torch.from_numpy(self.infer),
        )
        rollouts = replace(
            text,
            sample_advantages=advantages if advantages.dim() == 1 else advantages[:, 0],
            prompt_index=torch.from_numpy(self.prompt_index),
            in_loss=torch.from_numpy(self.in_loss),
        )
        scored = make_scored_batch(rollouts, torch.from_numpy(self.old), None, torch.from_numpy(self.reference))
        training = make_training_batch(scored, None if advantages.dim() == 1 else advantages)
        return training if self.shift is None else replace(training, router_shift=torch.from_numpy(self.shift))


def drawn(b: int, length: int, seed: int, spread: float, group: int = 3) -> Case:
    """Random policies `spread` apart and responses of 0 to `length` tokens, the first empty, the second of one."""
    random = np.random.default_rng(seed)
    new = -random.exponential(2.0, (b, length))
    old, infer, reference = (new + random.normal(0, spread, (b, length)) for _ in range(3))
    lengths = random.integers(0, length + 1, b)
    lengths[:2] = 0, 1
    mask = np.arange(length) < lengths[:, None]
    prompts, counted = np.arange(b) // group, np.ones(b, dtype=bool)
    advantages, shift = random.normal(0, 1, b), np.abs(random.normal(0, spread, (b, length)))
    return Case(new, old, infer, reference, advantages, mask, prompts, counted, shift)


def one_token(ratio: float, advantage: float, weight: float = 1.0) -> Case:
    """A response of one token with the given π_θ/π_old, A and π_θ/μ_old."""
    new, yes = np.array([[-1.5]]), np.array([True])
    old, infer = new - np.log(ratio), new - np.log(weight)
    return Case(new, old, infer, new, np.array([advantage]), yes[:, None], np.array([0]), yes)


def dirty(case: Case, garbage: float) -> Case:
    """The case with something else where nothing counts."""
    names = ("new", "old", "infer", "reference", *(() if case.shift is None else ("shift",)))
    return replace(case, **{name: np.where(case.mask, getattr(case, name), garbage) for name in names})


def loss(
    settings: config.Objective, case: Case, entropy: torch.Tensor | None = None, micro: int | None = None
) -> tuple[float, np.ndarray, dict[str, float]]:
    """The mini-batch's loss, its gradient in `new`, and the metrics. `micro`: samples of a micro-batch."""
    objective = objectives.check(settings)
    logprobs = torch.from_numpy(case.new.copy()).requires_grad_()
    size = micro or len(case.new)
    micros = case.batch().split(size)
    nats = [None] * len(micros) if entropy is None else entropy.split(size)
    parts = [
        objectives.batch_loss(objective, settings, *part)
        for part in zip(logprobs.split(size), micros, nats, strict=True)
    ]
    value = sum(part for part, _ in parts) / max(aggregate.loss_denominator(micros, objective.mean(settings)), 1)
    value.backward()
    stats = parts[0][1]
    for _, found in parts[1:]:
        stats.add(found)
    return float(value.detach()), logprobs.grad.numpy(), stats.values()
