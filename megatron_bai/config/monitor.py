"""Settings of the monitor and its detectors (docs/monitoring.md)."""

from dataclasses import dataclass

from megatron_bai.config.limits import number, setting

DETECTORS = ("length_collapse", "discrepancy_divergence", "entropy_collapse", "router_drift", "reward_hockey_stick")


@dataclass
class Monitor:
    """Thresholds of the detectors, actions of alarms, and loggers (docs/monitoring.md)."""

    bucket: int = number(100, "tokens: width of a response-length bucket", at_least=1)
    smooth: int = number(5, "steps whose median is a metric's level", at_least=1)
    horizon: int = number(100, "steps that a baseline looks back", at_least=2)
    deviations: float = number(5.0, "standard errors that a change must have for an alarm", above=0, finite=False)
    length_fall: float = number(
        0.3, "of the mean response length within the horizon, as a share: length_collapse", above=0, below=1
    )
    discrepancy_rise: float = number(
        2.0, "of kl_k3 or F(2), as a factor: discrepancy_divergence", above=1, finite=False
    )
    entropy_fall: float = number(0.5, "of the policy's entropy, as a share: entropy_collapse", above=0, below=1)
    router_rise: float = number(2.0, "of route_mismatch, as a factor: router_drift", above=1, finite=False)
    experts_fall: float = number(0.3, "of the effective number of experts, as a share: router_drift", above=0, below=1)
    reward_drop: float = number(
        0.1, "in a length bucket, in units of reward: reward_hockey_stick", above=0, finite=False
    )
    reward_recovery: float = number(0.8, "the share of a drop that must be made up", above=0, at_most=1)
    reward_smooth: int = number(9, "pools whose median is a bucket's level", at_least=1)
    reward_responses: int = number(64, "responses that make a pool", at_least=1)
    actions: dict[str, str] = setting(
        dict,
        "by detector: warn (unless said), checkpoint or stop",
        choices=("warn", "checkpoint", "stop"),
        keys=DETECTORS,
    )
    samples: int = number(
        8, "kept of each step, and of each evaluation, to be read (run.dir/samples); 0 keeps none", at_least=0
    )
    samples_mib: int = number(
        256, "bound of their files together, in MiB; beyond it steps in between are deleted", at_least=1
    )
    tensorboard: bool = setting(True, "event files in run.dir/tensorboard")
    wandb: str = setting("", "a W&B project; its key is W&B's own (wandb login); empty: not used")
    wandb_mode: str = setting(
        "online", "or offline: files in run.dir/wandb, for wandb sync", choices=("online", "offline")
    )
    mlflow: str = setting("", "an MLflow experiment; empty: not used")
    mlflow_uri: str = setting("", "of its server, without credentials; empty: run.dir/mlflow.db")
