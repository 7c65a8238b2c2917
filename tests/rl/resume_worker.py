"""Run as a script: runs of the trainer that are killed, and the same commands again. Argument: a directory.

Everything is the trainer's own but the inference engine, whose samples are functions of version, prompt and number.
Each run is a world of processes forked from this one, which has imported Megatron-Core. `found.json` has what each
of them said and what it left.
"""

import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from kills import die
from moe import MODEL, random_routes
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.run_monitor import DETECTORS
from megatron_bai.rollout.client import SampleRequest
from megatron_bai.rollout.sample import PARTIAL, Sample
from megatron_bai.routing.routes import VersionSpan
from megatron_bai.utils import terminal_logging

LAYOUTS = {
    "tp2_ep2": (2, config.Parallel(tensor=2, expert=2, sequence=True)),
    "one": (1, config.Parallel()),
    "dp2": (2, config.Parallel()),
    "pp2": (2, config.Parallel(pipeline=2)),
    "pp2_vpp2": (2, config.Parallel(pipeline=2, virtual_pipeline=2)),
}
STEPS = 3
# Before which change of a file (what happens, and the file's name) a step that saves is killed, and whether it saves in
# the background.
MOMENTS = {
    "routes are written, metrics are not": ("os.fsync", "*/metrics.jsonl", False),
    "the directory is made": ("open", "*/.step-00002.unfinished/.metadata.tmp", False),
    "the index is there": ("open", "*/.step-00002.unfinished/metadata.json", True),
    "the manifest is there, beside its place": ("os.rename", "*/.step-00002.unfinished", False),
    "it is in its place": ("os.fsync", "*/checkpoints", False),
    "the former one is being deleted": ("os.remove", "manifest.json", False),
}


class Rollouts:
    """In place of SGLang. Every second sample is right."""

    def __init__(self, session: Any, version: int):
        self.session, self.version, self.sync_gap, self.untested = session, version, 0.0, ()
        self.seen: Callable[[int], None] = lambda version: None

    def sample(self, prompts: list, group_size: int, seed: str, first: int) -> list[Sample]:
        self.seen(self.version)
        made = [self._sample(i, n, prompt, first + i) for i, prompt in enumerate(prompts) for n in range(group_size)]
        return [sample.select_layers(self.session.engine.replay.columns) for sample in made]

    def _sample(self, place: int, number: int, prompt: Any, seed: int) -> Sample:
        random, tokenizer = np.random.default_rng([seed, number, self.version]), self.session.task.tokenizer
        response = random.integers(0, MODEL.vocab_size, 2 + number)
        if number % 2:
            response = np.array([*tokenizer.encode(f"answer:{prompt.answer}"), tokenizer.eos_token_id])
        tokens = np.concatenate([prompt.ids, response])
        logprobs = random.normal(-4.2, 0.5, len(response)).astype(np.float32)
        spans = (VersionSpan(str(self.version), 0, len(response)),)
        routes, reward = random_routes(len(tokens) - 1, random), float(number % 2)
        return Sample(place, tokens, len(prompt.ids), logprobs, routes, spans, "stop", reward=reward)

    def sample_partial(self, wanted: list[SampleRequest], max_failures: int, prompts: Any = None) -> list[Sample]:
        """Parts of samples, of `rollout.partial_tokens` each."""
        self.seen(self.version)
        return [self._part(each) for each in wanted]

    def max_failures(self, samples: int) -> int:
        return 0

    def any_failed(self, failures: list) -> bool:
        return False

    def _part(self, wanted: SampleRequest) -> Sample:
        former, budget = wanted.partial, self.session.settings.rollout.partial_tokens
        ids = wanted.prompt_ids if former is None else former.tokens.tolist()
        random = np.random.default_rng([wanted.seed, len(ids), self.version])
        left = 2 + wanted.seed % 14 - (len(ids) - len(wanted.prompt_ids))
        response = random.integers(0, MODEL.vocab_size, min(left, budget))
        logprobs = random.normal(-4.2, 0.5, len(response)).astype(np.float32)
        tokens, spans = np.array([*ids, *response]), (VersionSpan(str(self.version), 0, len(response)),)
        routes, finish = random_routes(len(tokens) - 1, random), "stop" if left <= budget else PARTIAL
        part = Sample(wanted.prompt_index, tokens, len(ids), logprobs, routes, spans, finish)
        return former.append(part) if former else part

    def add_rewards(self, prompts: list, samples: list[Sample]) -> list[Sample]:
        return [replace(sample, reward=float(sample.tokens[-1] % 2)) for sample in samples]

    def sync(self) -> None:
        self.version += 1


def settings(run: Path, layout: str = "one", **trainer: Any) -> config.Config:
    sizes = {"prompts_per_step": 4, "group_size": 2, "mini_batches": 2, "micro_batch_size": 2, "weight_decay": 0.1}
    return config.Config(
        run=config.Run(dir=str(run)),
        backend=config.Backend(kind="cpu", timeout_s=300),
        model=MODEL,
        parallel=LAYOUTS[layout][1],
        data=config.Arithmetic(eval_prompts=4),
        replay=config.Replay(mode="r3", measure_live=False, store=str(run / "routes")),
        rollout=config.Rollout(max_new_tokens=16),
        objective=config.Minirl(entropy_bonus=0.01, kl_penalty=0.1),
        monitor=config.Monitor(tensorboard=False),
        trainer=config.Trainer(**{"steps": STEPS, "save_every": 2, "keep": 9} | sizes | trainer),
    )


def run(
    what: config.Config, layout: str = "one", seen: Callable[[int], None] = lambda version: None, limit: int = 0
) -> dict[str, Any]:
    """Train in a world of its own.

    Args:
        seen: called with the version of the weights whenever samples are asked for.
        limit: bytes that are left on the disk from the second checkpoint on, or what a file may have where `small_disk`
            made none; 0: no limit.
    """
    started = time.monotonic()
    processes, context = LAYOUTS[layout][0], multiprocessing.get_context("fork")
    port, words = free_port(), Path(what.run.dir).with_suffix(".words")
    words.mkdir(parents=True, exist_ok=True)
    children = [
        context.Process(target=_rank, args=(rank, processes, port, words, what, seen, limit))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(200)
    lines = (words / "0").read_text().splitlines(keepends=True)
    said = "".join(line for line in lines if "training kernels: " not in line)  # which every session says
    codes = [child.exitcode for child in children]
    return {"codes": codes, "said": said, "seconds": time.monotonic() - started}


def _rank(
    rank: int, processes: int, port: int, words: Path, what: config.Config, seen: Callable[[int], None], limit: int
) -> None:
    from megatron_bai.rl import trainer

    terminal_logging.setup()
    if processes > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}

    @contextmanager
    def serve(session: Any, version: int = 0) -> Iterator[Rollouts]:
        rollouts = Rollouts(session, version)
        rollouts.seen = seen
        yield rollouts

    class Limited(trainer.RunCheckpoints):
        def save(self, step: int, version: int) -> None:
            self.wait()
            if step == 2 and limit:
                fill(Path(what.run.dir) / "checkpoints", limit)
            super().save(step, version)

    trainer.start_inference, trainer.RunCheckpoints, trainer.write_report = serve, Limited, lambda *_: None
    with open(words / str(rank), "w", buffering=1) as out, redirect_stdout(out):
        try:
            trainer.train(what)
        except UserError as error:
            print(f"error: {error}")


def small_disk(path: Path) -> bool:
    """Give the path a disk of its own, which only this process and its children see. Needs root: false without."""
    new_namespace = 0x00020000  # CLONE_NEWNS, linux/sched.h
    path.mkdir(parents=True)
    words = [["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "disk", str(path)]]
    if ctypes.CDLL(None).unshare(new_namespace):
        return False
    return all(subprocess.run(each, capture_output=True).returncode == 0 for each in words)


def fill(path: Path, left: int) -> None:
    """Leave so many bytes on the path's own disk; where it has none, allow a file no more."""
    if not os.path.ismount(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        return
    disk = os.statvfs(path)
    size = (disk.f_blocks - disk.f_bfree) * disk.f_frsize + left
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)


def at_version(version: int, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda seen: act() if seen == version else None


def at_moment(what: str, pattern: str) -> Callable[[], None]:
    """From now on, die before a directory's change, a file's opening to write or its way to the disk, by its name."""

    def arm() -> None:
        pid, sync = os.getpid(), os.fsync  # a writer that dies is another fault

        def see(event: str, about: tuple) -> None:  # gets every event there is
            if event == what and os.getpid() == pid and fnmatch(str(about[0]), pattern):
                if event != "open" or about[2] & (os.O_WRONLY | os.O_RDWR):
                    die()

        os.fsync = lambda fd: (see("os.fsync", (os.readlink(f"/proc/self/fd/{fd}"),)), sync(fd))[1]
        sys.addaudithook(
            lambda event, about: see(event, about) if event in ("open", "os.rename", "os.remove") else None
        )

    return arm


def left(directory: Path) -> dict[str, Any]:
    """What a run's directory holds, and which of its checkpoints are what was written."""
    found = sorted((directory / "checkpoints").iterdir()) if (directory / "checkpoints").is_dir() else []
    lines = (directory / "metrics.jsonl").read_text().splitlines() if (directory / "metrics.jsonl").exists() else []
    named = [path for path in found if not path.name.startswith(".")]
    whole = [path.name for path in named if _whole(path)]
    return {
        "checkpoints": [path.name for path in found],
        "whole": whole,
        "metrics": [json.loads(line) for line in lines],
        "summary": json.loads((directory / "summary.json").read_text()),
    }


def _whole(path: Path) -> bool:
    try:
        return manifest.read_info(path) is not None and manifest.verify_weights(path) > 0
    except UserError:
        return False


def copy(source: Path, target: Path, *without: str) -> Path:
    shutil.copytree(source, target)
    for name in without:
        shutil.rmtree(target / "checkpoints" / name)
    return target


def broken(found: dict[str, Any], directory: Path) -> None:
    """Unbroken runs, and runs killed in a step and started again."""
    for name, layout, dtype in (("layout", "tp2_ep2", "float32"), ("half", "one", "bfloat16")):
        for how in ("unbroken", "killed", "background"):
            path = directory / f"{name}-{how}"
            background = how == "background"
            minis = 1 if name == "layout" else 2  # which samples are in one depends on the replicas
            what = settings(path, layout, save_async=background, save_every=1 if background else 2, mini_batches=minis)
            what.backend.dtype = dtype
            if name == "half":
                what.replay = replace(what.replay, mode="r2", predict=True, predict_every=1)
            killed = [] if how == "unbroken" else [run(what, layout, at_version(STEPS - 1, die))]
            found[path.name] = {"runs": [*killed, run(what, layout)], **left(path)}


def stale(found: dict[str, Any], directory: Path) -> None:
    """The same of a run whose rollouts are partial and a step ahead."""
    for how in ("unbroken", "killed"):
        path = directory / f"stale-{how}"
        what = settings(path, "tp2_ep2", steps=STEPS + 1, save_async=how == "unbroken")
        what.rollout = config.Rollout(max_new_tokens=16, partial_tokens=4, overlap=True)
        killed = [run(what, "tp2_ep2", at_version(STEPS - 1, die))] if how == "killed" else []
        found[path.name] = {"runs": [*killed, run(what, "tp2_ep2")], **left(path)}


def elsewhere(found: dict[str, Any], directory: Path) -> None:
    """The unbroken run's last step in other layouts."""
    for layout in LAYOUTS:
        path = copy(directory / "layout-unbroken", directory / f"on-{layout}", "step-00003")
        what = settings(path, layout, mini_batches=1)
        found[path.name] = {"runs": [run(what, layout)], **left(path)}


def killed_while_saving(found: dict[str, Any], directory: Path) -> None:
    source = directory / "first"
    run(settings(source, steps=1, save_every=1))
    found["plain"] = {"runs": [run(settings(copy(source, directory / "plain"), steps=2, save_every=1, keep=1))]}
    found["plain"] |= left(directory / "plain")
    for name, (event, pattern, background) in MOMENTS.items():
        path = copy(source, directory / name.replace(" ", "-"))
        what = settings(path, steps=2, save_every=1, keep=1, save_async=background)
        killed = run(what, seen=at_version(1, at_moment(event, pattern)))
        between = left(path)
        found[name] = {"runs": [killed, run(what)], "between": between, **left(path)}


def refused(found: dict[str, Any], directory: Path) -> None:
    """What a run that stands at its second step says to one thing or another."""
    source = directory / "source"
    run(settings(source, steps=2, save_every=1))

    def with_settings(name: str, **saved: str | None) -> None:
        """Go on from a checkpoint whose manifest has other settings: None takes one out, as if it had not existed."""
        path = directory / name / "checkpoints" / "step-00002"
        info = manifest.read_info(path)
        info["settings"] = {key: text for key, text in (info["settings"] | saved).items() if text is not None}
        shutil.copytree(path, atomic_dir.staging_path(path))
        manifest.finalize(atomic_dir.staging_path(path), path, info)

    def with_sources(name: str, change: Callable[[dict[str, str]], Any]) -> None:
        """Go on from a checkpoint that was made with other content, or does not say (None)."""
        path = directory / name / "checkpoints" / "step-00002"
        info = manifest.read_info(path)
        info["sources"] = change(info["sources"])
        if info["sources"] is None:
            del info["sources"]
        shutil.copytree(path, atomic_dir.staging_path(path))
        manifest.finalize(atomic_dir.staging_path(path), path, info)

    def attempt(name: str, change: Callable[[config.Config], Any] = lambda what: None, damage: str = "") -> None:
        path = copy(source, directory / name)
        what = settings(path, steps=3, save_every=1)
        change(what)
        if damage:
            file = max((path / "checkpoints" / "step-00002").glob(damage), key=lambda file: file.stat().st_size)
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        held = atomic_dir.lock(path) if name == "locked" else nullcontext()
        with held:
            found[name] = {"runs": [run(what)], **left(path)}

    attempt("rate", lambda what: setattr(what.trainer, "learning_rate", 0.5))
    attempt("objective", lambda what: setattr(what, "objective", config.Grpo(kl_penalty=0.1)))
    attempt("fewer", lambda what: setattr(what.trainer, "steps", 1))
    attempt("finished", lambda what: setattr(what.trainer, "steps", 2))
    attempt("damaged weights", damage="*.distcp")
    attempt("damaged index", damage=".metadata")
    attempt("locked")
    attempt("older", lambda what: with_settings("older", **{"trainer.adam_beta2": None, "objective.is_max": None}))
    attempt("newer", lambda what: with_settings("newer", **{"trainer.extra": "3", "objective.is_max": None}))
    attempt("other sources", lambda what: with_sources("other sources", lambda saved: {**saved, "the tokenizer": "0"}))
    attempt("no sources", lambda what: with_sources("no sources", lambda saved: None))
    attempt("goes on", lambda what: setattr(what.trainer, "micro_batch_size", 4))


def once(found: dict[str, Any], directory: Path) -> None:
    """A run without checkpoints, and one whose disk is full at the second."""
    path = directory / "none"
    first = run(settings(path, steps=1, save_every=0))
    again = [run(settings(path, steps=1, save_every=0)), run(settings(path, steps=2, save_every=0))]
    found["none"] = {"runs": [first, *again], **left(path)}
    for background in (False, True):
        path = directory / f"full-{background}"
        real = small_disk(path / "checkpoints")
        full = run(settings(path, save_every=1, save_async=background), limit=30_000)
        found[path.name] = {"runs": [full], "real": real, **left(path)}
        if real:
            fill(path / "checkpoints", 1 << 30)
        found[path.name]["runs"].append(run(settings(path, save_every=1)))
    path = directory / "asked"
    asked = run(settings(path, save_every=3), seen=at_version(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    found["asked"] = {"runs": [asked], "between": left(path)}
    found["asked"]["runs"].append(run(settings(path, save_every=3)))
    found["asked"] |= left(path)


def alarmed(found: dict[str, Any], directory: Path) -> None:
    """Runs whose detectors take the smallest change of a step for a collapse, and one of them again, with warnings."""
    for action in ("checkpoint", "stop"):
        path = directory / action
        what = settings(path, save_every=0)
        least = dict.fromkeys(("length_fall", "entropy_fall", "experts_fall", "reward_drop", "deviations"), 1e-9)
        what.monitor = config.Monitor(
            tensorboard=False, smooth=1, horizon=2, reward_smooth=1, reward_responses=1, discrepancy_rise=1 + 1e-9,
            router_rise=1 + 1e-9, actions=dict.fromkeys(DETECTORS, action), **least,
        )  # fmt: skip
        found[action] = {"runs": [run(what)], **left(path)}
    what.monitor.actions = {}
    found["stopped"] = {"runs": [run(what)], **left(path)}


def main() -> None:
    directory = Path(sys.argv[1])
    core = ("models.gpt", "distributed", "optimizer", "dist_checkpointing.strategies.torch")
    ours = ("transformers.tokenization_utils_tokenizers", "megatron_bai.rl.trainer")
    prepare(*(f"megatron.core.{module}" for module in core), *ours)
    found: dict[str, Any] = {}
    for part in (broken, stale, elsewhere, killed_while_saving, refused, once, alarmed):
        if not sys.argv[2:] or part.__name__ in sys.argv[2:]:
            part(found, directory)
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
