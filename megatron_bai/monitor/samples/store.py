"""The files of kept samples: `run.dir/samples/step-00012.jsonl.gz`, a JSON object a line, read by `zcat` or pandas.

A step's file is replaced in one move. Once all files together exceed their bound, files between the first and the last
step are deleted, so that those that remain lie about equally far apart.
"""

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from megatron_bai.errors import UserError, from_os_error, os_errors_as_user_errors
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.utils import atomic_file

DIRECTORY = "samples"
_NAME = re.compile(r"step-(\d{5,})\.jsonl\.gz")
_MAX_BYTES = 1 << 30  # of a file's text: far more than a run writes, and what a reader's memory has


def step_path(run_dir: Path, step: int) -> Path:
    """Return the path of a step's file.

    Args:
        run_dir: of the run.
        step: global step, from 1.
    """
    return run_dir / DIRECTORY / f"step-{step:05}.jsonl.gz"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run whose samples are there, in order."""
    matches = (_NAME.fullmatch(path.name) for path in (run_dir / DIRECTORY).glob("step-*.jsonl.gz"))
    return sorted(int(match[1]) for match in matches if match)


def write_step(run_dir: Path, step: int, samples: Sequence[KeptSample], max_bytes: int) -> None:
    """Write a step's samples in place of earlier ones, then delete files until all are within their bound.

    Args:
        run_dir: of the run; it exists.
        step: global step, from 1.
        samples: of the step.
        max_bytes: bound of all files together; the step's own file is written whatever its size.

    Raises:
        UserError: the file cannot be written; an earlier one is unchanged.
    """
    path = step_path(run_dir, step)
    text = "".join(sample.to_json() + "\n" for sample in samples)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(exist_ok=True)
        # Without the time: the same samples are the same bytes.
        atomic_file.write_bytes(path, gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0))
        _delete_excess(run_dir, max_bytes)


def read_step(run_dir: Path, step: int) -> list[KeptSample]:
    """Read the samples of a step.

    Args:
        run_dir: of the run.
        step: global step, from 1.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else.
    """
    path = step_path(run_dir, step)
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UserError(f"{path} holds more than {_MAX_BYTES >> 20} MiB of text: it is no file of samples")
        samples = [KeptSample.from_json(line) for line in data.decode("utf-8").split("\n") if line.strip()]
        if any(sample.step != step for sample in samples):
            raise ValueError("its samples are of another step")
        return samples
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): restore or remove it") from None
    except OSError as error:
        raise from_os_error(error, path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold samples of step {step} ({error}): restore or remove it") from None


def remove_after(run_dir: Path, step: int) -> None:
    """Delete the files of later steps than `step`, which a resumed run writes again.

    Args:
        run_dir: of the run.
        step: the last one whose file is retained; 0 deletes all.

    Raises:
        UserError: one cannot be deleted.
    """
    with os_errors_as_user_errors(run_dir / DIRECTORY):
        for later in list_steps(run_dir):
            if later > step:
                step_path(run_dir, later).unlink(missing_ok=True)


def _delete_excess(run_dir: Path, max_bytes: int) -> None:
    """Delete files within their bound: each time the one whose neighbours are closest, the earliest of such."""
    sizes = {step: step_path(run_dir, step).stat().st_size for step in list_steps(run_dir)}
    while sum(sizes.values()) > max_bytes and len(sizes) > 1:
        steps = sorted(sizes)
        gaps = [(after - before, step) for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)]
        step = min(gaps)[1] if gaps else steps[0]
        step_path(run_dir, step).unlink(missing_ok=True)
        del sizes[step]
