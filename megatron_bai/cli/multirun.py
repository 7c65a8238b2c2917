"""`--multirun`: a verb once for every combination of the values that overrides list, one job after the other.

    megatron-bai train --multirun experiment=demo replay.mode=none,r2,r3 run.seed=0,1

Each job is a process of its own (or as many as `cluster.processes` says, under torchrun), since Megatron-Core's state
is a process's; and has a directory of its own below `run.dir`, named after what it varies. All are composed before the
first one starts. One that fails costs the others nothing.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_bai.cli.overrides import setting_choices, setting_types, sweep_values
from megatron_bai.config import Config
from megatron_bai.errors import UserError

# Settings that say where a verb writes, beside `run.dir`. (Training with init=merge shares a merge that is there.)
_OUTPUT_SETTINGS = {
    "merge": ("merge.output",),
    "train": ("trainer.save", "objective.critic_save", "replay.store"),
    "convert": ("convert.target",),
    "report": ("report.output",),
}


@dataclass(frozen=True)
class Job:
    """One combination.

    Attributes:
        name: what it varies, fit for a directory's name.
        overrides: all of its command line behind the verb.
        processes: that share it.
    """

    name: str
    overrides: list[str]
    processes: int


def run_multirun(verb: str, arguments: Sequence[str], compose: Callable[[list[str]], Config]) -> None:
    """Run every job of a command line, one after the other.

    Args:
        verb: name of the verb.
        arguments: overrides of the command line, without `--multirun`.
        compose: makes settings of overrides; raises a UserError for those that contradict each other.

    Raises:
        UserError: a combination that cannot be composed, or two that write to one place, before any is started; or,
            once all have ended, names those that failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--multirun starts a job's processes itself: leave out torchrun and set cluster.processes")
    jobs = [_make_job(verb, name, overrides, compose) for name, overrides in combinations(arguments)]
    _refuse_shared_outputs(verb, jobs, compose)
    for word in arguments:
        key, paths = word.partition("=")[0].lstrip("+"), sweep_values(word) or []
        if len(paths) > 1 and setting_types().get(key) in ("str", "list[str]") and key not in setting_choices():
            print(f"{key}: {len(paths)} values; one that has a comma is quoted, as in \"{key}='a,b'\"", flush=True)
    failed = []
    for index, job in enumerate(jobs, start=1):
        print(f"[{index}/{len(jobs)}] {job.name}", flush=True)
        if code := _run_job(_command(verb, job)):
            failed.append(f"{job.name} (exit code {code})")
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs succeeded", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}")


def combinations(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """List all combinations of the listed values, the last one varying fastest: name and overrides of each.

    Raises:
        UserError: nothing is listed.
        HydraException: one is no override.
    """
    choices = [_list_values(word) for word in arguments]
    varied = [position for position, values in enumerate(choices) if len(values) > 1]
    if not varied:
        raise UserError("--multirun has nothing to vary: list values, as in replay.mode=r2,r3")
    found = [list(overrides) for overrides in product(*choices)]
    return [(",".join(_path_safe(overrides[position]) for position in varied), overrides) for overrides in found]


def _list_values(word: str) -> list[str]:
    """Return the overrides that a word stands for: one for each value that it lists."""
    if (values := sweep_values(word)) is not None:
        return values
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return [word]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _make_job(verb: str, name: str, overrides: list[str], compose: Callable[[list[str]], Config]) -> Job:
    settings = compose(overrides)
    directory = f"{settings.run.dir}/{name}".replace("\\", "\\\\").replace("'", "\\'")
    # Only training has several processes: what else the experiment is for runs in one.
    processes = settings.cluster.processes if verb == "train" else 1
    return Job(name, [*overrides, f"run.dir='{directory}'"], max(1, processes))


def _refuse_shared_outputs(verb: str, jobs: list[Job], compose: Callable[[list[str]], Config]) -> None:
    """Refuse jobs that would overwrite each other's output."""
    owners: dict[tuple[str, str], Job] = {}
    for job in jobs:
        settings = compose(job.overrides)
        for setting in ("run.dir", *_OUTPUT_SETTINGS.get(verb, ())):
            group, _, key = setting.partition(".")
            path = getattr(getattr(settings, group), key, "")
            if path and (other := owners.setdefault((setting, path), job)) is not job:
                raise UserError(
                    f"{setting} is {path} in the jobs {other.name} and {job.name}: tell them apart, as in "
                    f"'{setting}=${{run.dir}}/result'"
                )


def _command(verb: str, job: Job) -> list[str]:
    start = [sys.executable, "-m"]
    if job.processes > 1:
        start += ["megatron_bai", "torchrun", "--standalone", f"--nproc-per-node={job.processes}"]
    else:
        start.append("megatron_bai")
    return [*start, verb, *job.overrides]


def _run_job(command: list[str]) -> int:
    """Run a job and return its exit code; terminate it if this process is interrupted."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _path_safe(override: str) -> str:
    """Return an override without its `+` and without characters that are special in a path or to Hydra."""
    return re.sub(r"[^\w.=+-]+", "_", override.lstrip("+~")).strip("_")
