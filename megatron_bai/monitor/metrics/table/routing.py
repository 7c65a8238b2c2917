"""Rows of what routers choose, of replay, and of what a merge does to routing."""

from megatron_bai.monitor.metrics.metric_names import MERGE_ROUTING
from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection

_ROUTERS = ("monitor/metrics/router_metrics.py",)
_LOSSES = ("rl/policy/router_measurement.py",)
_SHIFT = ("rl/objectives/terms.py",)
_PREDICTION = ("rl/policy/route_prediction.py",)
_COLLECTOR = ("rl/experience/collector.py",)
_MERGE = ("rl/merge_routing.py",)
_MERGE_TABLE = "table of the merge"

_WEIGHTS = MetricChart("Weights of the server's experts less the trainer's of them, absolute", log=True)
_PREDICTED = MetricChart("Routes that are the live router's in later updates, fraction")
_MISSING = MetricChart("Tokens without a route, fraction")

ROUTING = MetricSection(
    "Routing",
    "What the routers choose: against the inference engine, and how evenly experts are used.",
    (
        Metric("route_mismatch", "fraction", "of (token, layer) routes whose sets of experts differ", _ROUTERS,
            "Routes for which the training engine's live router would have chosen other experts.",
            MetricChart("Routes the live router would have chosen differently, fraction"), "fraction",
            detectors=("router_drift",)),
        Metric("tokens_route_mismatch", "fraction", "of tokens", _ROUTERS,
            "Tokens whose routes differ in one layer at least.",
            MetricChart("Tokens with such a route in any layer, fraction"), "fraction"),
        Metric("route_weight_gap", "", "mean over (token, layer, expert) of |the server's weight − the trainer's|",
            _ROUTERS,
            "How the engines weigh the same experts, with the server's weights in the layers before "
            "(`replay.weights=server`, docs/replay.md).", _WEIGHTS, "mean"),
        Metric("route_weight_gap_max", "", "largest |the server's weight − the trainer's|", _ROUTERS,
            "The largest difference of a weight.", _WEIGHTS, "largest"),
        Metric("route_coverage", "fraction", "(token, layer) rows that were replayed over those that should be",
            ("rl/trainer.py",),
            "Whether every route that should be replayed was; 1, or the run is wrong.",
            MetricChart("Route coverage: rows replayed of rows that should be"), "fraction"),
        Metric("experts_effective", "experts", "mean over layers of exp(−Σ p log p)", _ROUTERS,
            "How many experts of a layer are in use, as if those were used alike.",
            MetricChart("Effective number of experts, mean over layers"), "experts", detectors=("router_drift",)),
        Metric("expert_entropy", "nats", "mean over layers of −Σ p log p, p the experts' shares of a layer's (token, "
            "slot) pairs in the routes that the step trains with", _ROUTERS,
            "How evenly the experts are used.",
            MetricChart("Entropy of the expert load, nats, mean over layers"), "entropy"),
        Metric("expert_load_max", "", "largest p · experts of a layer", _ROUTERS,
            "The load of the busiest expert; 1 if all are alike.",
            MetricChart("Largest load of an expert, 1 if all are alike"), "load"),
        Metric("load_balancing_loss", "", "mean over layers and micro-batches, without its coefficient", _LOSSES,
            "Supervised training's loss of uneven experts; 1 if they are even (docs/training.md).",
            MetricChart("Load-balancing loss of the routers, 1 if even, mean over layers"), "loss"),
        Metric("z_loss", "", "mean over layers and micro-batches, without its coefficient",
            (*_LOSSES, "model/router_losses.py"),
            "Supervised training's loss of large router logits (docs/training.md).",
            MetricChart("z loss of the routers, mean over layers"), "loss"),
        Metric("experts_unused", "fraction", "of (layer, expert) pairs", _ROUTERS,
            "Experts that no token of the step used.",
            MetricChart("Experts without a token, fraction of (layer, expert)"), "fraction"),
        Metric("router_shift_mean", "", "mean over response tokens and updates of γ = exp(−Δ)", _SHIFT,
            "How much the routers moved since the step's first update; 1 if not at all (docs/objectives.md).",
            MetricChart("γ of the routers: exp(−shift since the first update), mean"), "mean"),
        Metric("router_shift_floor_fraction", "fraction", "of response tokens with γ under `router_shift_min`", _SHIFT,
            "Tokens whose routers moved further than the objective follows.",
            MetricChart("Tokens with γ below its floor, fraction"), "fraction"),
        Metric("predict_loss", "nats", "mean over (token, layer) pairs learned from of the KL of the live router from "
            "the prediction", _PREDICTION,
            "How well routes of later updates are predicted (`replay.predict`, docs/objectives.md).",
            MetricChart("KL of the routers from their prediction, nats"), "KL"),
        Metric("predict_changed_fraction", "fraction", "of these routes", _PREDICTION,
            "Routes that the prediction changed.",
            MetricChart("Routes that the prediction changed, fraction"), "fraction"),
        Metric("predict_correct_fraction", "fraction", "of these routes, in updates after a step's first", _PREDICTION,
            "Predicted routes that are the live router's.", _PREDICTED, "predicted"),
        Metric("predict_correct_fraction_r2", "fraction", "of these routes, in updates after a step's first",
            _PREDICTION,
            "R2's routes that are the live router's, for comparison.", _PREDICTED, "R2's"),
        Metric("route_missing", "fraction", "of the tokens that the model is fed", _COLLECTOR,
            "Tokens for which the server returned no route (`replay.missing`).", _MISSING, "missing"),
        Metric("route_masked", "fraction", "of the tokens in the loss", _COLLECTOR,
            "Tokens that are left out of the loss because a route is missing.", _MISSING, "left out"),
        Metric("route_mismatch/LAYER", "fraction", "`route_mismatch` of one MoE layer, from 0", _ROUTERS,
            "In which layers routes differ.", MetricChart("Routes that differ, by MoE layer", "layers"), "LAYER"),
        Metric("expert_entropy/LAYER", "nats", "`expert_entropy` of one MoE layer, from 0", _ROUTERS,
            "In which layers experts are used unevenly.",
            MetricChart("Entropy of the expert load, nats, by MoE layer", "layers"), "LAYER"),
        Metric(f"{MERGE_ROUTING[0]}/SOURCE", "fraction", "of (token, layer) routes, mean over layers", _MERGE,
            "Routes of a merge's source that the merge keeps; in a run's first step alone, as are the next three "
            "(docs/merge.md).", place=_MERGE_TABLE),
        Metric(f"{MERGE_ROUTING[1]}/SOURCE", "fraction", "of a route's experts, mean over layers", _MERGE,
            "Experts of a source's routes that the merge keeps.", place=_MERGE_TABLE),
        Metric("merge_experts_effective", "experts", "`experts_effective` of the merge on training prompts", _MERGE,
            "How many experts of a layer the merge uses.", place=_MERGE_TABLE),
        Metric("merge_route_margin", "", "mean over tokens and layers of the least chosen expert's logit less the best "
            "other's", _MERGE,
            "How decided the merge's routers are.", place=_MERGE_TABLE),
    ),
)  # fmt: skip
