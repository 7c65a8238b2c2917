"""Makes what a study needs, then its runs, one after the other, each by the verb `train` in a directory of its own.

What is complete, here or in the store (`stored_runs`), is not done again; a run that was interrupted goes on from its
last checkpoint, as the verb does by itself. Each run that ends is stored.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import preferences
import servers
import stored_runs
from studies import Study

from megatron_bai.checkpoint import manifest
from megatron_bai.monitor.report.run_data import load_run
from megatron_bai.monitor.summary import read_summary


def run_dir(directory: Path, study: str, variant: str, seed: int) -> Path:
    return directory / study / variant / f"seed-{seed}"


def run_study(
    directory: Path, study: Study, seeds: Iterable[int], updates: int, only: Collection[str], store: Path
) -> int:
    """Run what is missing; returns how many runs failed. Seed by seed, so that a table is whole early."""
    if wrong := [n for n in study.variants.values() if updates % n.updates_per_step]:
        raise SystemExit(f"--updates {updates} is not a multiple of {wrong[0].updates_per_step}, the updates of a step")
    if unknown := set(only) - set(study.variants):
        raise SystemExit(f"{study.name} has no variant {min(unknown)!r}: choose from {', '.join(study.variants)}")
    chosen = [*dict.fromkeys(only or study.variants)]  # in the order in which they are named
    wanted = [(variant, seed) for seed in seeds for variant in chosen]
    missing = [each for each in wanted if not _is_there(directory, study, *each, updates, store)]
    print(
        f"{study.name}: {len(wanted) - len(missing)} of {len(wanted)} runs are there, {updates} updates each",
        flush=True,
    )
    if not missing:
        return 0
    make_checkpoints(directory / "checkpoints", study.needed_checkpoints({variant for variant, _ in missing}))
    failed = 0
    with ExitStack() as stack:
        shared = _shared_servers(study, directory, stack)
        for number, (variant, seed) in enumerate(missing, start=1):
            target = run_dir(directory, study.name, variant, seed)
            began = time.monotonic(), _processor_seconds()
            code = train([*study.overrides(variant, seed, updates, target), *shared], target / "output.log")
            seconds, processor = time.monotonic() - began[0], _processor_seconds() - began[1]
            stored_runs.write_origin(target, study.name, variant, seed, updates, seconds, processor)
            if code == 0:
                stored_runs.write_run(target, store, study.name, variant, seed)
            failed += code != 0
            took = f"{seconds:.0f} s, {processor:.0f} s of a core"
            print(f"[{number}/{len(missing)}] {variant}, seed {seed}: {took}, {_outcome(target, code)}", flush=True)
    return failed


def _is_there(directory: Path, study: Study, variant: str, seed: int, updates: int, store: Path) -> bool:
    """Return whether a run is complete, here or stored; store it where it is not yet."""
    steps, target = study.steps(variant, updates), run_dir(directory, study.name, variant, seed)
    if is_done(target, steps):
        if stored_runs.find_run(directory, None, study.name, variant, seed) is None:
            raise SystemExit(f"{target} has a run with other settings: remove it to have one with today's")
        stored_runs.write_run(target, store, study.name, variant, seed)
        return True
    stored = stored_runs.find_run(None, store, study.name, variant, seed)
    return stored is not None and len(stored.data.records) == steps


def _processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def is_done(target: Path, steps: int) -> bool:
    found = read_summary(target)
    return found.get("complete") is True and len(found["steps"]) == steps


def make_checkpoints(directory: Path, checkpoints: Mapping[str, Sequence[str]]) -> None:
    """Those that runs start from, in this order."""
    for name, settings in checkpoints.items():
        if manifest.read_info(directory / name) is None:
            log = directory / f"{name}.log"
            code = train([*settings, f"run.dir={directory}", f"trainer.save={directory / name}"], log)
            if code:
                raise SystemExit(f"{name} was not made: {last_line(log)} [{log}]")
            print(f"made {directory / name}", flush=True)


def train(overrides: list[str], log: Path) -> int:
    """The verb `train`, whose words are added to `log`; returns its exit code. It ends before this process does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        command = [sys.executable, "-m", "megatron_bai", "train", *overrides]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # it ends its step, saves and stops its server
            process.wait()
            raise


def _shared_servers(study: Study, directory: Path, stack: ExitStack) -> list[str]:
    """Start those that all runs of the study use, and say where they are."""
    words, logs = [], directory / study.name / "servers"
    if study.served:
        checkpoint = directory / "checkpoints" / study.served
        url = stack.enter_context(servers.policy(checkpoint, list(study.settings), logs))
        words.append(f"rollout.urls=[{url}]")
    if study.judged:
        model = directory / "reward-model"
        if not model.is_dir():
            preferences.train(model)
        words.append(f"reward.url={stack.enter_context(servers.rewards(model, logs))}")
    return words


def _outcome(target: Path, code: int) -> str:
    if code:
        return f"failed ({code}): {last_line(target / 'output.log')}"
    run = load_run(target, "", "")
    rewards = run.series("reward_mean")[1]
    alarms = ", ".join(f"{alarm.detector} at {alarm.step}" for alarm in run.alarms())
    return f"reward {_shown(rewards[0])} → {_shown(rewards[-1])}, alarms: {alarms or 'none'}"


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
