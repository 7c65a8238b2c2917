"""Rows of the critic of PPO."""

from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection

_CRITIC = ("rl/policy/critic.py",)
_LOSS = ("rl/objectives/ppo.py",)
_TRAINER = ("rl/trainer.py",)

_VALUES = MetricChart("Values and returns, mean")

CRITIC = MetricSection(
    "Critic",
    "What the critic makes of each token, and of what it is worth in the end.",
    (
        Metric("value_mean", "reward", "mean of V_old over tokens in the loss", _CRITIC,
            "What the critic expects.", _VALUES, "values"),
        Metric("return_mean", "reward", "mean of the targets over tokens in the loss", _CRITIC,
            "What the critic should have expected.", _VALUES, "returns"),
        Metric("explained_variance", "", "1 − Var(target − V_old)/Var(target) over tokens in the loss", _CRITIC,
            "How much of the targets' variance the critic explains: 1 is perfect, 0 no better than a constant "
            "(docs/objectives.md).",
            MetricChart("Variance of the returns that the values explain"), "share"),
        Metric("value_error", "reward²", "mean of (V − target)² over response tokens and updates", _LOSS,
            "How far off the critic is.", MetricChart("Squared error of the values"), "error"),
        Metric("value_clip_fraction", "fraction", "of response tokens", _LOSS,
            "Tokens whose value the limit holds (`objective.value_clip`).",
            MetricChart("Values that the limit holds, fraction"), "fraction"),
        Metric("critic_grad_norm", "", "mean over the step's updates of the norm before clipping", _TRAINER,
            "How large the critic's gradient is.", MetricChart("Gradient norm of the critic", log=True), "norm"),
        Metric("critic_learning_rate", "", "of the step's last update", _TRAINER,
            "The critic's learning rate.", MetricChart("Learning rate of the critic"), "rate"),
    ),
)  # fmt: skip
