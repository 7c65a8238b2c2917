"""Settings of objectives: `objective=NAME` chooses one (docs/objectives.md)."""

from dataclasses import dataclass

from omegaconf import MISSING

from megatron_bai.config.limits import checkpoint_path, number, path, setting

ADVANTAGES = ("centred", "normalised", "leave_one_out")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "token_kpop")


@dataclass
class Objective:
    """An objective that training maximises: `objective=NAME` chooses one with its own settings (docs/objectives.md)."""

    name: str = setting(MISSING, "set by the choice")


@dataclass
class Sft(Objective):
    """Cross-entropy of given text."""

    name: str = "sft"


@dataclass
class Policy(Objective):
    """Settings of every objective that learns from rollouts."""

    advantage: str = setting(
        "normalised",
        "R − group mean: centred; over the group's deviation: normalised; or leave_one_out",
        choices=ADVANTAGES,
    )
    entropy_bonus: float = number(0.0, "weight of the policy's entropy, in the loss of every token", at_least=0)
    kl_penalty: float = number(0.0, "weight of the KL divergence from the run's initial weights, likewise", at_least=0)
    kl_estimator: str = setting("k3", "k1, k2 or k3", choices=("k1", "k2", "k3"))
    drop_uniform_groups: bool = setting(False, "groups whose rewards are all equal count nowhere")
    refill_rounds: int = number(
        0, "rounds of new prompts in place of dropped groups, until none are missing (DAPO)", at_least=0
    )
    mask_overlong: bool = setting(
        False, "responses cut off at the token limit count nowhere but in their group's mean reward"
    )


@dataclass
class RouterShifted(Policy):
    """Settings of objectives with an importance ratio, which may be multiplied by γ of the routers (RSPO)."""

    router_shift: bool = setting(
        False,
        "γ = e^−Δ, Δ the mean change since the step's first update of the log-scores of the experts that a token used",
    )
    router_shift_min: float = number(0.8, "γ counts as at least this", at_least=0, at_most=1)


@dataclass
class Minirl(RouterShifted):
    """MiniRL (arXiv 2512.01374, eq. 7) and its ablations."""

    name: str = "minirl"
    advantage: str = setting("centred", choices=ADVANTAGES)
    clip_low: float = number(
        0.2, "M_t drops a token with A < 0 once its ratio is under 1 − clip_low", at_least=0, at_most=1
    )
    clip_high: float = number(0.27, "… with A > 0 once it is over 1 + clip_high", at_least=0, finite=False)
    is_max: float = number(5.0, "the token weight π_θ/μ_old is truncated here; inf: never", above=0, finite=False)
    clip: bool = setting(True, "false: M_t = 1")
    train_infer_is: bool = setting(True, "false: the token weight is π_θ/π_old")
    length_norm: bool = setting(False, "true: 1/|y|")


@dataclass
class Sequence(RouterShifted):
    """The sequence-level objective that MiniRL approximates (arXiv 2512.01374)."""

    name: str = "sequence"
    advantage: str = setting("centred", choices=ADVANTAGES)
    is_max: float = number(
        float("inf"), "the response's weight π_θ(y)/μ_old(y) is truncated here", above=0, finite=False
    )


@dataclass
class Dppo(RouterShifted):
    """DPPO (arXiv 2602.04879): MiniRL with a trust region in probabilities, around the policy that sampled."""

    name: str = "dppo"
    advantage: str = setting("centred", choices=ADVANTAGES)
    divergence: str = setting(
        "tv",
        "D of a token, the vocabulary taken as this token or any other: tv, |π_θ − μ_old|; kl, KL(μ_old ‖ π_θ)",
        choices=("tv", "kl"),
    )
    delta: float | None = number(
        None,
        "δ: a token that A pushes away has no gradient once D is over it; unset: the authors' 0.15 of tv, 0.05 of kl",
        at_least=0,
        finite=False,
    )
    anchor: str = setting(
        "inference", "the trust region's centre: μ_old; training: π_old", choices=("inference", "training")
    )
    is_max: float = number(
        float("inf"), "the token weight π_θ/μ_old is truncated here; inf: never", above=0, finite=False
    )
    length_norm: bool = setting(False, "true: 1/|y|")


@dataclass
class Drpo(RouterShifted):
    """DRPO (arXiv 2606.09821): DPPO with a smooth pull towards the policy that sampled in the mask's place."""

    name: str = "drpo"
    advantage: str = setting("centred", choices=ADVANTAGES)
    delta: float = number(
        12.5,
        "δ: the shift |π_θ − μ_old| at which a token that A pushes away has no gradient; the default is the authors'",
        above=0,
    )
    length_norm: bool = setting(False, "true: 1/|y|")


@dataclass
class Corrected(RouterShifted):
    """Settings of objectives with a ratio to π_old that may be corrected for training–inference discrepancy (TIS)."""

    correction: str = setting(
        "none",
        "weight π_old/μ_old: none, or token_ or sequence_ followed by truncate or mask (with correction_min: "
        "IcePop), or token_kpop",
        choices=CORRECTIONS,
    )
    correction_max: float = number(2.0, "C: a weight above it becomes C (truncate) or 0 (mask)", above=0, finite=False)
    correction_min: float = number(0.0, "a weight below it becomes 0 (mask)", at_least=0)
    correction_kl: float = number(
        0.1,
        "φ of token_kpop: a weight becomes 0 where KL(π_old ‖ μ_old) or its reverse, of this token or any other, "
        "is over it",
        above=0,
    )


@dataclass
class DualClipped(Corrected):
    """Settings of objectives whose loss PPO's limits clip token by token."""

    dual_clip: float = number(
        float("inf"),
        "c: with A < 0 a token's loss is at most c·|A| (arXiv 1912.09729: 3); inf: no limit",
        above=1,
        finite=False,
    )


@dataclass
class Grpo(DualClipped):
    """GRPO (arXiv 2402.03300); a clip_high above clip_low is clip-higher."""

    name: str = "grpo"
    clip_low: float = number(0.2, "the ratio is clipped at 1 − clip_low", at_least=0, at_most=1)
    clip_high: float = number(0.2, "… and at 1 + clip_high", at_least=0, finite=False)


@dataclass
class Dapo(DualClipped):
    """GRPO's loss as DAPO averages it, over tokens (arXiv 2503.14476)."""

    name: str = "dapo"
    clip_low: float = number(0.2, "the ratio is clipped at 1 − clip_low", at_least=0, at_most=1)
    clip_high: float = number(0.28, "… and at 1 + clip_high", at_least=0, finite=False)
    token_mean: str = setting(
        "batch",
        "over the mini-batch's tokens, or prompt: over each prompt's, then over prompts",
        choices=("batch", "prompt"),
    )


@dataclass
class Cispo(Corrected):
    """CISPO (arXiv 2506.13585): the ratio is clipped, no token is dropped."""

    name: str = "cispo"
    clip_low: float = number(1.0, "1: no lower limit, as in the paper", at_least=0, at_most=1)
    clip_high: float = number(0.27, "the paper gives no value; this is MiniRL's", at_least=0, finite=False)
    token_mean: str = setting("batch", "or prompt", choices=("batch", "prompt"))


@dataclass
class Gspo(Corrected):
    """GSPO (arXiv 2507.18071): the ratio is the response's, per token."""

    name: str = "gspo"
    clip_low: float = number(3e-4, "the response's ratio is clipped at 1 − clip_low", at_least=0, at_most=1)
    clip_high: float = number(4e-4, "… and at 1 + clip_high", at_least=0, finite=False)


@dataclass
class Sapo(Corrected):
    """SAPO (arXiv 2511.20347): a gate that closes smoothly as the ratio leaves 1, in place of clipping."""

    name: str = "sapo"
    tau_positive: float = number(1.0, "τ where A > 0: the larger, the sooner the gate closes", above=0)
    tau_negative: float = number(1.05, "τ elsewhere", above=0)


@dataclass
class Gmpo(Corrected):
    """GMPO (arXiv 2507.20673): the response's ratio is the geometric mean of its tokens' clipped ones."""

    name: str = "gmpo"
    clip_low: float = number(0.4, "limits of a token's log π_θ/π_old: not under −clip_low", at_least=0, finite=False)
    clip_high: float = number(0.4, "… and not over clip_high", at_least=0, finite=False)


@dataclass
class Ppo(DualClipped):
    """PPO with a critic (arXiv 1707.06347), as BAI's paper trains (arXiv 2509.00309)."""

    name: str = "ppo"
    advantage: str = setting(
        "gae", "of each token, from the critic's values (arXiv 1506.02438); nothing else", choices=("gae",)
    )
    clip_low: float = number(0.2, "the ratio is clipped at 1 − clip_low", at_least=0, at_most=1)
    clip_high: float = number(0.2, "… and at 1 + clip_high", at_least=0, finite=False)
    gamma: float = number(1.0, "discount of a reward per token", at_least=0, at_most=1)
    lam: float = number(0.95, "λ of GAE: 1 trusts the rewards alone, 0 the critic", at_least=0, at_most=1)
    whiten: bool = setting(False, "advantages less their mean and over their deviation, of all tokens of the step")
    value_clip: float = number(
        0.2, "a value gains nothing by moving further than this in a step; inf: no limit", above=0, finite=False
    )
    critic_learning_rate: float | None = number(None, "trainer.learning_rate unless given, as in BAI's paper", above=0)
    critic_warmup: int = number(0, "steps at the start that update the critic alone", at_least=0)
    critic_checkpoint: str = checkpoint_path(
        "", "a critic to start from, as critic_save wrote it; empty: the actor's weights, values 0"
    )
    critic_save: str = path("", "the directory of the final critic; empty: not saved")
