"""Settings of the monitor and its detectors (docs/monitoring.md)."""

from dataclasses import dataclass

from megatron_bai.config.limits import choice, number

DETECTORS = ("length_collapse", "discrepancy_divergence", "entropy_collapse", "router_drift", "reward_hockey_stick")


@dataclass
class Monitor:
    """Thresholds of the detectors, actions of alarms, and loggers (docs/monitoring.md)."""

    bucket: int = number(100, at_least=1)  # tokens: width of a response-length bucket
    smooth: int = number(5, at_least=1)  # steps whose median is a metric's level
    horizon: int = number(100, at_least=2)  # steps that a baseline looks back
    deviations: float = number(5.0, above=0, finite=False)  # standard errors that a change must have for an alarm
    # of the mean response length within the horizon, as a share: length_collapse
    length_fall: float = number(0.3, above=0, below=1)
    # of kl_k3 or F(2), as a factor: discrepancy_divergence
    discrepancy_rise: float = number(2.0, above=1, finite=False)
    entropy_fall: float = number(0.5, above=0, below=1)  # of the policy's entropy, as a share: entropy_collapse
    router_rise: float = number(2.0, above=1, finite=False)  # of route_mismatch, as a factor: router_drift
    experts_fall: float = number(0.3, above=0, below=1)  # of the effective number of experts, as a share: router_drift
    # in a length bucket, in units of reward: reward_hockey_stick
    reward_drop: float = number(0.1, above=0, finite=False)
    reward_recovery: float = number(0.8, above=0, at_most=1)  # the share of a drop that must be made up
    reward_smooth: int = number(9, at_least=1)  # pools whose median is a bucket's level
    reward_responses: int = number(64, at_least=1)  # responses that make a pool
    # by detector: warn (unless said), checkpoint or stop
    actions: dict[str, str] = choice(dict, "warn", "checkpoint", "stop", keys=DETECTORS)
    # kept of each step, and of each evaluation, to be read (run.dir/samples); 0 keeps none
    samples: int = number(8, at_least=0)
    # bound of their files together, in MiB; beyond it steps in between are deleted
    samples_mib: int = number(256, at_least=1)
    tensorboard: bool = True  # event files in run.dir/tensorboard
    wandb: str = ""  # a W&B project; its key is W&B's own (wandb login); empty: not used
    wandb_mode: str = choice("online", "online", "offline")  # or offline: files in run.dir/wandb, for wandb sync
    mlflow: str = ""  # an MLflow experiment; empty: not used
    mlflow_uri: str = ""  # of its server, without credentials; empty: run.dir/mlflow.db
