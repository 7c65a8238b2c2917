"""The record of a run: `metrics.jsonl`, `config.yaml`, loggers, and one line a step on the terminal."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.loggers import Loggers
from megatron_bai.utils import atomic_file

_log = logging.getLogger(__name__)


class RunLog:
    """Writes the metrics of steps as they end. On a rank that is not `active` it does nothing.

    Attributes:
        records: of the steps before, in a resumed run.
    """

    def __init__(self, directory: str | Path, settings: config.Config, steps: int, active: bool, after: int = 0):
        """Begin the record, or continue it.

        Args:
            directory: of the run.
            settings: of the run, written to `config.yaml`.
            steps: number of global steps of the run.
            active: whether this rank writes.
            after: number of steps that are done: their records are retained, later ones removed.

        Raises:
            UserError: the record of those steps cannot be read.
        """
        self.directory, self.active, self.total = Path(directory), active, steps
        self.records: list[dict[str, Any]] = []
        if not active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(settings), self.directory / "config.yaml", resolve=True)
        path = self.directory / "metrics.jsonl"
        self.records = _read_records(path, after)
        atomic_file.write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = open(path, "a", encoding="utf-8")
        self._loggers = Loggers(self.directory, settings)
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)  # lines as they are logged
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # else warnings would leave the file that they are sent to
        )
        self._task = self._bar.add_task("steps", total=steps, completed=after)

    def __enter__(self) -> "RunLog":
        if self.active:
            self._bar.start()
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()
            self._loggers.close()

    def log_step(self, values: dict[str, Any], shown: tuple[str, ...]) -> None:
        """Record one step's metrics, and log some of them.

        Args:
            values: metrics by name, with `step` and perhaps `alarms`.
            shown: names of the metrics to log.
        """
        if not self.active:
            return
        clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint of this step may follow: it must not be there without its record
        self._loggers.log(values)
        texts = [f"{name} {values[name]:.4g}" for name in shown if values.get(name) is not None]
        _log.info("step %4d/%d  %s", values["step"], self.total, "  ".join(texts))
        for alarm in values.get("alarms", ()):
            _log.warning("alarm: %s", Alarm(**alarm))
        self._bar.advance(self._task)


def _read_records(path: Path, after: int) -> list[dict[str, Any]]:
    """Read the records of the first `after` steps."""
    if not after:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:after]
        records = [json.loads(line) for line in lines]
        steps = [record["step"] for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}, to go on with after step {after}, cannot be read ({error!r}): restore it") from None
    if steps != list(range(1, after + 1)):
        raise UserError(f"{path} does not hold the steps 1 to {after}, which the run goes on after: restore it")
    return records
