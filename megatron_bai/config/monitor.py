"""Settings of the monitor and its detectors (docs/monitoring.md)."""

from dataclasses import dataclass, field


@dataclass
class Monitor:
    """Thresholds of the detectors, actions of alarms, and loggers (docs/monitoring.md)."""

    bucket: int = 100  # tokens: width of a response-length bucket
    smooth: int = 5  # steps whose median is a metric's level
    horizon: int = 100  # steps that a baseline looks back
    deviations: float = 5.0  # standard errors that a change must have for an alarm
    length_fall: float = 0.3  # of the mean response length within the horizon, as a share: length_collapse
    discrepancy_rise: float = 2.0  # of kl_k3 or F(2), as a factor: discrepancy_divergence
    entropy_fall: float = 0.5  # of the policy's entropy, as a share: entropy_collapse
    router_rise: float = 2.0  # of route_mismatch, as a factor: router_drift
    experts_fall: float = 0.3  # of the effective number of experts, as a share: router_drift
    reward_drop: float = 0.1  # in a length bucket, in units of reward: reward_hockey_stick
    reward_recovery: float = 0.8  # the share of a drop that must be made up
    reward_smooth: int = 9  # pools whose median is a bucket's level
    reward_responses: int = 64  # responses that make a pool
    actions: dict[str, str] = field(default_factory=dict)  # by detector: warn (unless said), checkpoint or stop
    tensorboard: bool = True  # event files in run.dir/tensorboard
    wandb: str = ""  # a W&B project; its key is W&B's own (wandb login); empty: not used
    wandb_mode: str = "online"  # or offline: files in run.dir/wandb, for wandb sync
    mlflow: str = ""  # an MLflow experiment; empty: not used
    mlflow_uri: str = ""  # of its server, without credentials; empty: run.dir/mlflow.db
