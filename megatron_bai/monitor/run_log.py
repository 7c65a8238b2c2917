"""The record of a run: `metrics.jsonl`, `config.yaml`, loggers, and one line a step on the terminal."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_bai import config
from megatron_bai.errors import UserError, os_errors_as_user_errors
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.loggers import Loggers
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.utils import atomic_file
from megatron_bai.utils.terminal_text import make_console

PROGRESS = "progress.json"  # the phase of a step in work: `step`, `phase`, `since` (seconds of the epoch)
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
            UserError: the record of those steps cannot be read, or the files cannot be written.
        """
        self.directory, self.active, self.total = Path(directory), active, steps
        self.records: list[dict[str, Any]] = []
        self._max_sample_bytes = settings.monitor.samples_mib << 20
        self._first_step = after + 1
        if not active:
            return
        text = OmegaConf.to_yaml(OmegaConf.structured(settings), resolve=True)
        self._path = self.directory / "metrics.jsonl"
        with os_errors_as_user_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_file.write_text(self.directory / "config.yaml", text)
            self.records = _read_records(self._path, after)
            atomic_file.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
            store.remove_after(self.directory, after)
            self._file = open(self._path, "a", encoding="utf-8")
        self._loggers = Loggers(self.directory, settings)
        self._console = make_console(file=sys.stdout, highlight=False, soft_wrap=True)  # lines as they are logged
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
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
            with suppress(OSError):  # a record that could not be written, which was said
                self._file.close()
            self._loggers.close()
            (self.directory / PROGRESS).unlink(missing_ok=True)

    def show_phase(self, step: int, phase: str) -> None:
        """Show the phase that begins: beside the bar, in `progress.json`, and in the log of the first step.

        Args:
            step: global step, from 1.
            phase: its name.
        """
        if not self.active:
            return
        name = phase.replace("_", " ")
        self._bar.update(self._task, description=f"step {step}: {name}")
        with suppress(OSError):  # a full disk is said by what the run needs
            atomic_file.write_json(self.directory / PROGRESS, {"step": step, "phase": phase, "since": time.time()})
        if step == self._first_step:
            _log.info("step %d, the first of this start: %s", step, name)

    def log_step(self, values: dict[str, Any], shown: tuple[str, ...], samples: Sequence[KeptSample] = ()) -> None:
        """Record one step's metrics, and log some of them.

        Args:
            values: metrics by name, with `step` and perhaps `alarms`.
            shown: names of the metrics to log.
            samples: of the step, to be kept.

        Raises:
            UserError: the record or the samples cannot be written.
        """
        if not self.active:
            return
        if samples:  # before the record: a step that is there has its samples
            store.write_step(self.directory, values["step"], samples, self._max_sample_bytes)
        clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with os_errors_as_user_errors(self._path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint of this step may follow: it must not be without its record
        self._loggers.log(values, samples)
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
