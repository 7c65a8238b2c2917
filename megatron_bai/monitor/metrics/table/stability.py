"""Rows of the discrepancy between the engines, of staleness, of the objectives' weights and of the updates' size."""

from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection

_DISCREPANCY = ("monitor/metrics/discrepancy.py",)
_STALENESS = ("rl/experience/staleness.py",)
_TERMS = ("rl/objectives/terms.py",)
_SEQUENCE = ("rl/objectives/sequence.py",)
_REGULARISE = ("rl/objectives/regularise.py",)

_K3 = MetricChart("Training–inference KL (k3)", log=True)
_K1 = MetricChart("Training–inference KL (k1)")
_GAP = MetricChart("Training–inference mean |log r|, nats")
_SHARES = {
    "": MetricChart("F(τ): tokens with max(r, 1/r) > τ, fraction"),
    "_live": MetricChart("F(τ) without replay, same batch, fraction"),
    "_weights": MetricChart("F(τ) with the server's weights of experts, fraction"),
    "_stale": MetricChart("F(τ) of older tokens, fraction"),
}
_PERPLEXITY = {
    "": MetricChart("Perplexity ratio π/μ of a response"),
    "_live": MetricChart("Perplexity ratio without replay, same batch"),
    "_weights": MetricChart("Perplexity ratio with the server's weights of experts"),
    "_stale": MetricChart("Perplexity ratio of older tokens"),
}
_SAMPLE_SIZES = MetricChart("Effective sample size, fraction")
_ENTROPY = MetricChart("Entropy, nats per token")
_CLIPPED = MetricChart("Tokens dropped by the clip mask, fraction")
_WEIGHTS = MetricChart("Importance weight π_θ/μ_old")
_RESPONSE_WEIGHTS = MetricChart("Importance weight π_θ/μ_old of a response")
_MEAN_FACTORS = MetricChart("Its mean's factors: π_old/μ_old and π_θ/π_old")
_LARGEST_FACTORS = MetricChart("Its largest factors: π_old/μ_old and π_θ/π_old")
_LOGARITHMS = MetricChart("Logarithms of its factors, mean, nats")
_OLDER_SHARES = MetricChart("Tokens of older weights, fraction")
_AGES = MetricChart("Version age of the response tokens, weight syncs")
_OLDER = MetricChart("π_old against what sampled older tokens, nats")
_OLDER_SAMPLE_SIZE = MetricChart("Effective sample size of older tokens, fraction")

_BATCH = {"_live": "without, same batch", "_weights": "with replay and the server's weights"}
_ENGINES = {"_live": "π_old/μ_old, live", "_weights": "π_old/μ_old, the server's weights"}


def _measured_again(metric: Metric, labels: dict[str, str]) -> tuple[Metric, ...]:
    """Return a metric of the discrepancy, and the rows of its other measurements in the same chart, by suffix."""
    assert metric.chart
    return metric, *(metric.in_other_way(suffix, metric.chart, label) for suffix, label in labels.items())


def _in_charts(metric: Metric, charts: dict[str, MetricChart]) -> tuple[Metric, ...]:
    """Return the rows of a metric's measurements, which have a chart each, by suffix; the first is its own."""
    return metric, *(metric.in_other_way(suffix, charts[suffix], metric.label) for suffix in charts if suffix)


def _share_above(tau: str, detectors: tuple[str, ...] = ()) -> Metric:
    return Metric(
        f"f_{tau}", "fraction", f"F(τ): of response tokens with max(r, 1/r) > {tau} (arXiv 2510.11370)", _DISCREPANCY,
        f"Tokens whose probability differs between the engines by more than a factor of {tau}.",
        _SHARES[""], f"τ = {tau}", detectors=detectors,
    )  # fmt: skip


_KL_K3 = Metric("kl_k3", "nats", "mean of r − 1 − log r over response tokens (arXiv 2510.11370)", _DISCREPANCY,
    "How far the training engine's policy is from the one that sampled; never negative.",
    _K3, "with replay", detectors=("discrepancy_divergence",), short="KL between the engines (k3)", form=".1e",
)  # fmt: skip
_KL_K1 = Metric("kl_k1", "nats", "mean of −log r over response tokens (arXiv 2512.01374)", _DISCREPANCY,
    "The same distance as `kl_k3` by another estimate, which may be negative on a batch.", _K1, "with replay",
)  # fmt: skip
_LOGPROB_GAP = Metric("logprob_gap", "nats", "mean of |log r| over response tokens", _DISCREPANCY,
    "By how much a token's log-probability differs between the engines, either way.", _GAP, "with replay",
)  # fmt: skip
_ESS_DISCREPANCY = Metric("ess_discrepancy", "fraction", "(Σ r)²/(n Σ r²) over the n response tokens", _DISCREPANCY,
    "How many equally weighted tokens the tokens weighted by r are worth, as a share.", _SAMPLE_SIZES, "π_old/μ_old",
)  # fmt: skip

STABILITY = MetricSection(
    "Stability",
    "How far the training engine is from the inference engine that sampled the batch, and how big the updates are.",
    (
        *_measured_again(_KL_K3, _BATCH),
        *_measured_again(_KL_K1, _BATCH),
        *_measured_again(_LOGPROB_GAP, _BATCH),
        *_in_charts(_share_above("1.5"), _SHARES),
        *_in_charts(_share_above("2", ("discrepancy_divergence",)), _SHARES),
        *_in_charts(_share_above("5"), _SHARES),
        *_in_charts(Metric("perplexity_ratio", "", "exp of a response's mean −log r: mean over responses", _DISCREPANCY,
            "A response's perplexity in the training engine over that in the inference engine.",
            _PERPLEXITY[""], "mean"), _PERPLEXITY),
        *_in_charts(Metric("perplexity_ratio_max", "", "exp of a response's mean −log r: largest", _DISCREPANCY,
            "The largest ratio of a response's perplexities in the two engines.",
            _PERPLEXITY[""], "largest"), _PERPLEXITY),
        Metric("ess", "fraction", "(Σ w)²/(n Σ w²) over the n response tokens, w = π_θ/μ_old", _TERMS,
            "How many equally weighted tokens the tokens of the updates are worth, as a share.",
            _SAMPLE_SIZES, "π_θ/μ_old"),
        *_measured_again(_ESS_DISCREPANCY, _ENGINES),
        Metric("sync_gap", "nats", "|mean log-probability of the probe under a server − under the trainer|, largest",
            ("rl/experience/inference_engine.py", "rl/trainer.py"),
            "Whether the servers have the weights that they were sent, by four held-out prompts.",
            MetricChart("Weight sync: log-probability of the probe, nats off"), "gap"),
        Metric("entropy", "nats", "mean over response tokens of the entropy of π_old", ("rl/trainer.py",),
            "How undecided the policy is about its next token.",
            _ENTROPY, "entropy", detectors=("entropy_collapse",)),
        Metric("entropy_update", "nats", "mean over response tokens of the entropy of π_θ", _REGULARISE,
            "How undecided the policy is in the updates, with `objective.entropy_bonus`.", _ENTROPY, "in the updates"),
        Metric("clip_fraction", "fraction", "of response tokens", _TERMS,
            "Tokens that the limit of the objective clips (docs/objectives.md).", _CLIPPED, "all"),
        Metric("clip_fraction_positive", "fraction", "of response tokens: clipped, with A > 0", _TERMS,
            "Clipped tokens of responses with a positive advantage.", _CLIPPED, "A > 0"),
        Metric("clip_fraction_negative", "fraction", "of response tokens: clipped, with A < 0", _TERMS,
            "Clipped tokens of responses with a negative advantage.", _CLIPPED, "A < 0"),
        Metric("is_weight_mean", "", "mean of π_θ/μ_old over response tokens", _TERMS,
            "The importance weight of a token, its two factors in one.", _WEIGHTS, "mean"),
        Metric("is_weight_max", "", "largest π_θ/μ_old of a response token", _TERMS,
            "The largest importance weight of a token.", _WEIGHTS, "largest"),
        Metric("sequence_weight_mean", "", "mean of Π_t π_θ/μ_old over the tokens of the responses", _SEQUENCE,
            "The importance weight of a whole response, before it is truncated (`sequence`).",
            _RESPONSE_WEIGHTS, "mean"),
        Metric("sequence_weight_max", "", "largest Π_t π_θ/μ_old of a response", _SEQUENCE,
            "The largest importance weight of a whole response (`sequence`).", _RESPONSE_WEIGHTS, "largest"),
        Metric("discrepancy_ratio_mean", "", "mean of π_old/μ_old over response tokens", _TERMS,
            "The factor of the weight that lies between the engines.", _MEAN_FACTORS, "discrepancy"),
        Metric("staleness_ratio_mean", "", "mean of π_θ/π_old over response tokens", _TERMS,
            "The factor of the weight that the updates made.", _MEAN_FACTORS, "staleness"),
        Metric("discrepancy_ratio_max", "", "largest π_old/μ_old of a response token", _TERMS,
            "The largest factor between the engines of a token's weight.", _LARGEST_FACTORS, "discrepancy"),
        Metric("staleness_ratio_max", "", "largest π_θ/π_old of a response token", _TERMS,
            "The largest factor of the updates of a token's weight.", _LARGEST_FACTORS, "staleness"),
        Metric("discrepancy", "nats", "mean of log π_old/μ_old over response tokens", _TERMS,
            "The factor between the engines as a logarithm.", _LOGARITHMS, "discrepancy"),
        Metric("staleness", "nats", "mean of log π_θ/π_old over response tokens", _TERMS,
            "The factor of the updates as a logarithm.", _LOGARITHMS, "staleness"),
        Metric("corrected_fraction", "fraction", "of response tokens", ("rl/objectives/correction.py",),
            "Tokens whose correction a limit holds, or masks (`objective.correction`).",
            MetricChart("Tokens whose correction is limited, fraction"), "fraction"),
        Metric("divergence_mean", "", "`dppo`: mean of |π_θ − μ_old| over response tokens, or of the binary KL in nats",
            ("rl/objectives/dppo.py",),
            "How far the policy has left what sampled, as `dppo` measures its trust region.",
            MetricChart("Binary divergence of π_θ from its anchor, mean"), "divergence"),
        Metric("gate_mean", "", "`sapo`, `drpo`: mean over response tokens of what the gradient −r·A·∇log π_θ of a "
            "token is multiplied by", ("rl/objectives/sapo.py", "rl/objectives/drpo.py"),
            "How much of the tokens' gradients is let through; 1 at a ratio of 1.",
            MetricChart("Gate: weight of a token's gradient, mean"), "gate"),
        Metric("corrective_fraction", "fraction", "`drpo`: of response tokens beyond δ", ("rl/objectives/drpo.py",),
            "Tokens that have left the trust region, which the gradient pulls back.",
            MetricChart("Tokens pulled back into the trust region, fraction"), "fraction"),
        Metric("kl_reference", "nats", "mean over response tokens of `objective.kl_estimator`", _REGULARISE,
            "How far the policy is from the weights that the run started from (`objective.kl_penalty`).",
            MetricChart("KL to the initial weights, nats per token"), "KL"),
        Metric("left_out_fraction", "fraction", "of samples", ("rl/experience/collector.py",),
            "Samples that the loss does not count: without a reward or a peer, of a uniform group, overlong.",
            MetricChart("Samples left out of the loss, fraction"), "fraction"),
        Metric("grad_norm", "", "mean over the step's updates of the norm before clipping",
            ("rl/trainer.py", "rl/sft_trainer.py"),
            "How large the gradient is.", MetricChart("Gradient norm", log=True), "norm"),
        Metric("stale_fraction", "fraction", "of response tokens of a version age over 0", _STALENESS,
            "Tokens that older weights than the step's sampled (docs/rollout.md).", _OLDER_SHARES, "older"),
        Metric("stale_masked", "fraction", "of response tokens of an age over `rollout.max_staleness`", _STALENESS,
            "Tokens that are too old for the loss.", _OLDER_SHARES, "left out"),
        Metric("version_age_mean", "syncs", "mean over response tokens", _STALENESS,
            "How many weight syncs lie between what sampled a token and the step.", _AGES, "mean"),
        Metric("version_age_max", "syncs", "largest of a response token", _STALENESS,
            "The age of the oldest token.", _AGES, "largest"),
        _KL_K3.in_other_way("_stale", _OLDER, "KL (k3)"),
        _KL_K1.in_other_way("_stale", _OLDER, "KL (k1)"),
        _LOGPROB_GAP.in_other_way("_stale", _OLDER, "mean |log r|"),
        _ESS_DISCREPANCY.in_other_way("_stale", _OLDER_SAMPLE_SIZE, "π_old/μ"),
    ),
)  # fmt: skip
