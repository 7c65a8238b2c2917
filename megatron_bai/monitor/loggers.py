"""Loggers of a run's metrics besides `metrics.jsonl`: TensorBoard, W&B and MLflow."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, Protocol

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.monitor.samples.show import format_sample
from megatron_bai.utils.flatten import flatten
from megatron_bai.utils.json_numbers import is_finite_number

_MAX_CHARACTERS = 4000  # of a sample's prompt, and of its response

_log = logging.getLogger(__name__)

# Credentials in an address, and the prefixes by which Hugging Face, OpenAI-like services, W&B and GitHub mark theirs.
_SECRET_PATTERN = re.compile(r"://[^/\s@]*:[^/\s@]+@|\b(hf_|sk-|wandb_v1_|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")


class Logger(Protocol):
    """Takes the numbers of each step, and some of its samples as text."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the finite numbers of a step.

        Args:
            step: global step.
            values: by the metric's name, without `step`.
        """

    def log_texts(self, step: int, texts: dict[str, str]) -> None:
        """Record texts of a step.

        Args:
            step: global step.
            texts: printable, by what they show.
        """

    def close(self) -> None:
        """End the record."""


class TensorBoard:
    """Event files in `directory/tensorboard`.

    A resumed run writes again the steps after its checkpoint: TensorBoard drops the older ones (`purge_step`).
    """

    def __init__(self, directory: Path, settings: config.Config):
        from torch.utils.tensorboard import SummaryWriter

        path = str(directory / "tensorboard")
        self._make_writer: Callable[[int], Any] = lambda step: SummaryWriter(path, purge_step=step)
        self._writer: Any = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers as scalars.

        Args:
            step: global step, the x axis; the first one logged is the `purge_step`.
            values: finite numbers by the metric's name, which becomes the tag.
        """
        self._writer = self._writer or self._make_writer(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_texts(self, step: int, texts: dict[str, str]) -> None:
        """Write the texts.

        Args:
            step: as in `log`, which was called before.
            texts: by tag. TensorBoard reads Markdown: indented, they are shown as they are.
        """
        for name, text in texts.items():
            self._writer.add_text(name, indent(text, "    ", lambda line: True), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file, if one was opened."""
        if self._writer:
            self._writer.close()


class Wandb:
    """A W&B run in the project `monitor.wandb`, with W&B's own key (`wandb login`); runs of one name share a group."""

    def __init__(self, directory: Path, settings: config.Config):
        import wandb

        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        try:
            self._run = wandb.init(
                project=settings.monitor.wandb, name=settings.run.name, group=settings.run.name, dir=str(directory),
                mode=settings.monitor.wandb_mode, config=flatten(asdict(settings)), settings=quiet,
            )  # fmt: skip
        except Exception as error:  # W&B has no narrower class for a missing key and an unreachable server
            setting = f"monitor.wandb={settings.monitor.wandb}"
            raise UserError(f"{setting}: {error}; or set monitor.wandb_mode=offline") from None
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers, with `step` as their axis.

        Args:
            step: global step; W&B's own count of calls is not set.
            values: finite numbers by the metric's name.
        """
        self._run.log(values | {"step": step})

    def log_texts(self, step: int, texts: dict[str, str]) -> None:
        """Send the texts as preformatted HTML.

        Args:
            step: as in `log`.
            texts: by name.
        """
        import wandb

        pages = {name: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False) for name, text in texts.items()}
        self._run.log(pages | {"step": step})

    def close(self) -> None:
        """Finish the run at W&B."""
        self._run.finish()


class Mlflow:
    """A run in the MLflow experiment `monitor.mlflow`."""

    def __init__(self, directory: Path, settings: config.Config):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = settings.monitor.mlflow_uri or f"sqlite:///{directory.resolve()}/mlflow.db"
        try:
            self._client = MlflowClient(uri)
            known = self._client.get_experiment_by_name(settings.monitor.mlflow)
            # Texts are artifacts: a local store would put them where the command was run.
            artifacts = None if settings.monitor.mlflow_uri else (directory.resolve() / "mlflow-artifacts").as_uri()
            name = settings.monitor.mlflow
            experiment = known.experiment_id if known else self._client.create_experiment(name, artifacts)
            self._id = self._client.create_run(experiment, run_name=settings.run.name).info.run_id
            params = [Param(name, value[:500]) for name, value in flatten(asdict(settings)).items()]
            for begin in range(0, len(params), 100):  # as many as MLflow takes at once
                self._client.log_batch(self._id, params=params[begin : begin + 100])
        except Exception as error:  # nor has MLflow
            raise UserError(f"monitor.mlflow={settings.monitor.mlflow}, server {uri}: {error}") from None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers in batches of what MLflow takes at once.

        Args:
            step: global step.
            values: finite numbers by the metric's name.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + 1000])

    def log_texts(self, step: int, texts: dict[str, str]) -> None:
        """Send the texts as artifacts.

        Args:
            step: global step, part of their paths.
            texts: by name, the rest of the path.
        """
        for name, text in texts.items():
            self._client.log_text(self._id, text, f"{name}/step-{step:05}.txt")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


_LOGGERS: dict[str, Callable[[Path, config.Config], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


class Loggers:
    """The loggers of `settings.monitor`. One that fails during the run is named in a warning and not used again."""

    def __init__(self, directory: Path, settings: config.Config):
        self._open: dict[str, Logger] = {}
        for name, make_logger in _LOGGERS.items():
            if not getattr(settings.monitor, name):
                continue
            if find_spec(name) is None:  # TensorBoard's only: `require` refuses the others
                _log.warning(
                    "tensorboard is not installed: the run writes no event files (metrics.jsonl has everything)"
                )
                continue
            self._open[name] = make_logger(directory, settings)

    def log(self, values: dict[str, Any], samples: Sequence[KeptSample] = ()) -> None:
        """Record the finite numbers of a step, and one sample of each kind as text; other values are left out.

        Args:
            values: of the step, with `step`.
            samples: that are kept of it.
        """
        numbers = {name: float(value) for name, value in values.items() if is_finite_number(value) and name != "step"}
        self._on_each(lambda logger: logger.log(values["step"], numbers))
        if texts := _sample_texts(samples):
            self._on_each(lambda logger: logger.log_texts(values["step"], texts))

    def close(self) -> None:
        """Close every logger."""
        self._on_each(lambda logger: logger.close())

    def _on_each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                act(logger)
            except Exception as error:  # of any class: a full disk, a server that does not answer
                _log.warning("%s failed and is not used any more in this run: %s", name, error)
                del self._open[name]


def _sample_texts(samples: Sequence[KeptSample]) -> dict[str, str]:
    """Return the first sample of each order and split, as printable text of bounded length."""
    texts: dict[str, str] = {}
    for sample in samples:
        for order in sample.kept_as:
            texts.setdefault(f"samples/{sample.split}/{order}", format_sample(sample, _MAX_CHARACTERS))
    return texts


def validate(settings: config.Config) -> None:
    """Refuse settings that contradict each other, or that hold a secret: they are written to `config.yaml` and logged.

    Raises:
        UserError: names the setting, never its value.
    """
    for name, value in flatten(asdict(settings)).items():
        if _SECRET_PATTERN.search(value):
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
