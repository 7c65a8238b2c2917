"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, W&B and MLflow."""

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.utils.flatten import flatten

_log = logging.getLogger(__name__)

# Credentials in an address, and the prefixes by which Hugging Face, OpenAI-like services, W&B and GitHub mark theirs.
_SECRET = re.compile(r"://[^/\s@]*:[^/\s@]+@|\b(hf_|sk-|wandb_v1_|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `directory/tensorboard`. Steps of a resumed run that were written before are written again: the
    reader (`purge_step`) drops the older ones."""

    def __init__(self, directory: Path, settings: config.Config):
        from torch.utils.tensorboard import SummaryWriter

        self._make: Callable[[int], Any] = lambda step: SummaryWriter(str(directory / "tensorboard"), purge_step=step)
        self._writer: Any = None

    def log(self, step: int, values: dict[str, float]) -> None:
        self._writer = self._writer or self._make(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class Wandb:
    """A W&B run in the project `monitor.wandb`. The key is W&B's own (`wandb login`); runs of one name share a group."""

    def __init__(self, directory: Path, settings: config.Config):
        import wandb

        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        try:
            self._run = wandb.init(
                project=settings.monitor.wandb, name=settings.run.name, group=settings.run.name, dir=str(directory),
                mode=settings.monitor.wandb_mode, config=flatten(asdict(settings)), settings=quiet,
            )  # fmt: skip
        except Exception as error:  # of W&B, which has no narrower class for a missing key and an unreachable server
            where = f"monitor.wandb={settings.monitor.wandb}"
            raise UserError(f"{where}: {error}; or set monitor.wandb_mode=offline") from None
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values | {"step": step})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run in the MLflow experiment `monitor.mlflow`."""

    def __init__(self, directory: Path, settings: config.Config):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = settings.monitor.mlflow_uri or f"sqlite:///{directory.resolve()}/mlflow.db"
        try:
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(settings.monitor.mlflow)
            experiment = found.experiment_id if found else self._client.create_experiment(settings.monitor.mlflow)
            self._id = self._client.create_run(experiment, run_name=settings.run.name).info.run_id
            params = [Param(name, value[:500]) for name, value in flatten(asdict(settings)).items()]
            for begin in range(0, len(params), 100):  # as many as MLflow takes at once
                self._client.log_batch(self._id, params=params[begin : begin + 100])
        except Exception as error:  # likewise
            raise UserError(f"monitor.mlflow={settings.monitor.mlflow}, server {uri}: {error}") from None

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)


_KINDS: dict[str, Callable[[Path, config.Config], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


class Loggers:
    """All that `settings.monitor` asks for. One that fails during the run is named and left out: the run goes on."""

    def __init__(self, directory: Path, settings: config.Config):
        self._open: dict[str, Logger] = {}
        for name, kind in _KINDS.items():
            if not getattr(settings.monitor, name):
                continue
            if find_spec(name) is None:  # TensorBoard's only: `require` refuses the others
                _log.warning(
                    "tensorboard is not installed: the run writes no event files (metrics.jsonl has everything)"
                )
                continue
            self._open[name] = kind(directory, settings)

    def log(self, values: dict[str, Any]) -> None:
        """The numbers of a step; what is not a finite number is left out."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value) and name != "step"}
        self._each(lambda logger: logger.log(values["step"], numbers))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, do: Any) -> None:
        for name, logger in list(self._open.items()):
            try:
                do(logger)
            except Exception as error:  # whatever it is: a full disk, a server that is gone
                _log.warning("%s failed and is not used any more in this run: %s", name, error)
                del self._open[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def validate(settings: config.Config) -> None:
    """Refuse settings that contradict each other, or that hold a secret: they are written to `config.yaml` and logged.

    Raises:
        UserError: names the setting, never its value.
    """
    monitor = settings.monitor
    if monitor.wandb_mode not in ("online", "offline"):
        raise UserError(f"monitor.wandb_mode is {monitor.wandb_mode!r}: choose online or offline")
    for name, value in flatten(asdict(settings)).items():
        if _SECRET.search(value):
            raise UserError(
                f"{name} holds a secret, and settings are written to the run's files: leave it to the environment "
                "(MLFLOW_TRACKING_PASSWORD, HF_TOKEN) or the tool's own login"
            )


def require(monitor: config.Monitor) -> None:
    """Refuse a logger that is not installed.

    Raises:
        UserError: names the setting.
    """
    for name in ("wandb", "mlflow"):
        if getattr(monitor, name) and find_spec(name) is None:
            raise UserError(
                f"monitor.{name} is set, but {name} is not installed: pip install {name}, or leave it empty"
            )
