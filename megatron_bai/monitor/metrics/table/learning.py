"""Rows of rewards, responses, held-out problems and the loss."""

from megatron_bai.monitor.metrics.metric_names import COUNT_PREFIX, PART_PREFIX, REWARD_PREFIX, TOKENS_METRIC
from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection

_RESPONSES = ("monitor/metrics/response_metrics.py",)
_EVALUATION = ("rl/experience/evaluation.py",)
_COLLECTOR = ("rl/experience/collector.py",)
_ENGINE = ("rl/policy/training_engine.py",)

_HELD_OUT = MetricChart("Mean reward on held-out problems, and its 95 % interval")
_HELD_OUT_SHARES = MetricChart("Held-out responses, fraction")
_LENGTHS = MetricChart("Response length, tokens")
_QUANTILES = MetricChart("Response length, quantiles")
_REFILL = MetricChart("Prompts asked until every group counts")
_FAILED = MetricChart("Samples that failed, fraction")

_QUANTILE = "the smallest length with this share of the responses at or below it"
_INTERVAL = "avg@n ± t · s/√P over P prompts (docs/data.md)"

LEARNING = MetricSection(
    "Learning",
    "Is the policy getting better, and does it keep its length?",
    (
        Metric("reward_mean", "reward", "mean over responses with a reward", _RESPONSES,
            "What the step's responses earned on average.",
            MetricChart("Reward, mean over the batch"), "mean", short="reward", form=".3f"),
        Metric(f"{PART_PREFIX}NAME", "reward", "mean over responses with a reward of the part NAME, without its weight",
            _RESPONSES,
            "What each part of `reward=several` gave on average.",
            MetricChart("Parts of the reward, mean over the batch"), "NAME"),
        Metric("eval_accuracy", "reward", "mean over prompts of the mean reward of a prompt's n samples", _EVALUATION,
            "The average reward on held-out prompts, avg@n; an accuracy where rewards are 0 and 1.",
            _HELD_OUT, "mean", detectors=("entropy_collapse",), short="held-out reward", form=".3f"),
        Metric("eval_accuracy_low", "reward", _INTERVAL, _EVALUATION,
            "The low end of the 95 % interval of `eval_accuracy`, a band in its chart.",
            _HELD_OUT, detectors=("entropy_collapse",)),
        Metric("eval_accuracy_high", "reward", _INTERVAL, _EVALUATION,
            "The high end of the 95 % interval of `eval_accuracy`, a band in its chart.",
            _HELD_OUT, detectors=("entropy_collapse",)),
        Metric("eval_exact", "fraction", "of samples to prompts whose answer the data's own check can compare",
            _EVALUATION,
            "Held-out responses that the data's own check finds right, where training pays another reward.",
            MetricChart("Held-out responses that the data's own check finds right, fraction"), "fraction"),
        Metric("eval_best", "reward", "mean over prompts of the best of a prompt's n rewards", _EVALUATION,
            "What the policy can do at its best on held-out prompts: pass@n where rewards are 0 and 1.",
            MetricChart("Best reward of n on held-out problems, mean"), "mean", detectors=("entropy_collapse",)),
        Metric("eval_length", "tokens", "mean over held-out samples that are not lost", _EVALUATION,
            "How long the responses to held-out prompts are.",
            MetricChart("Response length on held-out problems, tokens"), "mean"),
        Metric("eval_truncated", "fraction", "of held-out samples that are not lost", _EVALUATION,
            "Held-out responses that ended without an end token.", _HELD_OUT_SHARES, "cut off"),
        Metric("eval_failed", "fraction", "of held-out samples, lost ones among them", _EVALUATION,
            "Held-out responses without a reward.", _HELD_OUT_SHARES, "without a reward"),
        Metric("response_length_mean", "tokens", "mean over responses that are not lost", _RESPONSES,
            "How long the responses are on average.",
            _LENGTHS, "mean", detectors=("length_collapse",), short="response length in tokens", form=".1f"),
        Metric("response_length_max", "tokens", "largest of the step", _RESPONSES,
            "The length of the longest response.", _LENGTHS, "longest"),
        Metric(TOKENS_METRIC, "tokens", "sum of the lengths of the step's responses", _RESPONSES,
            "How many tokens the step's shares are shares of.",
            MetricChart("Response tokens of the step"), "tokens", detectors=("discrepancy_divergence", "router_drift")),
        Metric("response_length_p10", "tokens", _QUANTILE, _RESPONSES,
            "A tenth of the responses is at most this long.", _QUANTILES, "10 %"),
        Metric("response_length_p50", "tokens", _QUANTILE, _RESPONSES,
            "Half of the responses are at most this long.", _QUANTILES, "50 %"),
        Metric("response_length_p90", "tokens", _QUANTILE, _RESPONSES,
            "Nine tenths of the responses are at most this long.", _QUANTILES, "90 %"),
        Metric("truncated_fraction", "fraction", "of responses that are not lost", _RESPONSES,
            "Responses that a limit of tokens or turns ended.",
            MetricChart("Responses cut off at the limit, fraction"), "fraction"),
        Metric("turns_mean", "turns", "mean over conversations that are not lost", _RESPONSES,
            "How many turns of the model a conversation has, with an environment.",
            MetricChart("Turns of a conversation"), "mean", short="turns", form=".2f"),
        Metric("env_tokens_fraction", "fraction", "of the response tokens of conversations that are not lost",
            _RESPONSES,
            "Tokens that the environment gave, which have routes and no loss.",
            MetricChart("Response tokens that the environment gave, fraction"), "fraction"),
        Metric("env_failed_fraction", "fraction", "of conversations that are not lost", _RESPONSES,
            "Conversations that a failure of the environment ended; they have no reward and are left out.",
            _FAILED, "environment"),
        Metric("reward_std", "reward", "mean over groups of the standard deviation of a group's rewards", _RESPONSES,
            "How much the responses to one prompt differ in reward; where they do not, nothing is learned.",
            MetricChart("Reward, mean standard deviation within a group"), "std"),
        Metric("group_variance", "reward²", "mean over groups of the variance of a group's rewards", _RESPONSES,
            "How much the responses to one prompt differ in reward, as a variance.",
            MetricChart("Reward, mean variance within a group"), "variance"),
        Metric("uniform_groups", "fraction", "of groups with a reward", _RESPONSES,
            "Groups whose rewards are all equal: they have no gradient.",
            MetricChart("Groups whose rewards are all equal, fraction"), "fraction"),
        Metric("prompts_tried", "prompts", "prompts taken from the stream in the step", _COLLECTOR,
            "How many prompts were asked, with `objective.refill_rounds`.", _REFILL, "prompts"),
        Metric("refill_rounds", "rounds", "rounds of new prompts in the step", _COLLECTOR,
            "How often groups from which there is nothing to learn were replaced.", _REFILL, "rounds"),
        Metric("rollout_failed_fraction", "fraction", "of samples", ("rl/experience/failed_samples.py",),
            "Samples that were lost: their request failed for good (docs/faults.md).", _FAILED, "not sampled"),
        Metric("reward_failed_fraction", "fraction", "of samples that are not lost", _COLLECTOR,
            "Samples whose reward failed (docs/faults.md).", _FAILED, "without a reward"),
        Metric("loss", "", "the objective's mean over the step's updates, with penalty and bonus", _ENGINE,
            "What the optimizer minimises; of a policy it says nothing by itself.",
            MetricChart("Loss"), "loss", short="loss"),
        Metric("cross_entropy", "nats", "mean of −log π_θ over target tokens", ("rl/objectives/sft.py",),
            "How surprised the model is by the text of supervised training.",
            MetricChart("Cross-entropy of the text, nats per token"), "cross-entropy"),
        Metric("learning_rate", "", "of the step's last update", ("rl/trainer.py", "rl/sft_trainer.py"),
            "The learning rate.", MetricChart("Learning rate"), "rate"),
        Metric(f"{REWARD_PREFIX}LOW", "reward", "mean over responses of LOW to LOW + `monitor.bucket` − 1 tokens",
            _RESPONSES,
            "What responses of about one length earn (arXiv 2509.00309).",
            MetricChart("Reward by response length", "buckets"), "from LOW tokens", detectors=("reward_hockey_stick",)),
        Metric(f"{COUNT_PREFIX}LOW", "responses", "number of responses of that length", _RESPONSES,
            "How many responses of about one length there are.", detectors=("reward_hockey_stick",)),
    ),
)  # fmt: skip
