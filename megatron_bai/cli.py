"""`megatron-bai VERB [group.key=value …]`: every verb takes the same Hydra configuration."""

import importlib
import inspect
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bai import config, project_files, sweep
from megatron_bai.errors import UserError, of_peer
from megatron_bai.utils.imports import without_collections


@dataclass(frozen=True)
class Verb:
    """What a verb does, where its code is, and which setting groups it reads."""

    summary: str
    function: str  # module:function taking the Config; imported when the verb runs
    groups: tuple[str, ...]
    example: str


_TRAINING = ("run", "backend", "model", "parallel", "data", "reward", "init", "merge")
VERBS = {
    "merge": Verb(
        "Merge checkpoints into the one that RL starts from, by BAI or another method.",
        "megatron_bai.merge.pipeline:run",
        ("merge",),
        "megatron-bai merge merge.pretrained=a 'merge.members=[b,c]' 'merge.weights=[.5,.5]' merge.output=d",
    ),
    "train": Verb(
        "Train: reinforcement learning, or supervised with objective=sft. Start several processes with torchrun.",
        "megatron_bai.train:run",
        _TRAINING + ("cluster", "rollout", "replay", "objective", "supervised", "trainer", "monitor"),
        "torchrun --nproc-per-node 2 -m megatron_bai train experiment=demo",
    ),
    "plan": Verb(
        "Say what a training run will do and need of each GPU, without starting it.",
        "megatron_bai.memory_plan.run_plan:run",
        _TRAINING + ("cluster", "rollout", "replay", "objective", "trainer", "monitor"),
        "megatron-bai plan experiment=qwen3_30b_minirl cluster=gpus_16 updates=n4",
    ),
    "serve": Verb(
        "Serve a checkpoint with SGLang until interrupted.",
        "megatron_bai.serve:run",
        ("run", "backend", "serve", "rollout"),
        "megatron-bai serve serve.checkpoint=runs/demo/actor",
    ),
    "convert": Verb(
        "Convert a checkpoint between Megatron torch_dist and Hugging Face safetensors.",
        "megatron_bai.model.convert:run",
        ("backend", "convert"),
        "megatron-bai convert convert.source=runs/demo/actor convert.target=actor-hf convert.to=hf",
    ),
    "inspect": Verb(
        "Describe a checkpoint or a store of routes, or compare two.",
        "megatron_bai.inspect:run",
        ("inspect",),
        "megatron-bai inspect inspect.path=runs/demo/actor",
    ),
    "report": Verb(
        "Write one HTML page about runs, finished or in progress.",
        "megatron_bai.monitor.report.report:run",
        ("run", "report"),
        "megatron-bai report 'report.runs=[runs/demo,runs/other]' report.output=both.html",
    ),
    "doctor": Verb(
        "Say what this machine has, and what each missing piece disables.",
        "megatron_bai.doctor:run",
        (),
        "megatron-bai doctor",
    ),
}
# Defaults as one would write them on the command line; ??? is Hydra's mark for a value that must be given.
_AS_TYPED = {
    "field(default_factory=list)": "[]",
    "field(default_factory=dict)": "{}",
    "MISSING": "???",
    "None": "null",
    'float("inf")': "inf",
}
_PATIENCE_S = 5.0  # of a rank, while another says what went wrong
_SWEEP = ("--multirun", "-m")
_HYDRA_FLAGS = re.compile(r"^(--cfg|-c|--info|-i|--resolve|--package|-p|--hydra-help|--shell-completion)")
_OVERRIDE = re.compile(r"~|[^-=][^=]*=")


def main() -> None:
    """Entry point. Exits with 0, 1 (`doctor` found the main job cannot run), 2 (a user's mistake) or 130 (Ctrl-C)."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|hydra)\b")
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
    try:
        _run(sys.argv[1:])
    except UserError as error:
        _complain(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("megatron-bai: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (lost := of_peer(error)):
            _let_rank_0_speak()
            raise
        if _complain(lost) == 0:
            time.sleep(_PATIENCE_S + 1)  # torchrun ends the others with this one: let the one that failed say why
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_overview())
        return
    name, *rest = arguments
    if name not in VERBS:
        raise UserError(f"there is no verb {name!r}: choose one of {', '.join(VERBS)}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(_help(name, verb))
        return
    config.register()
    words = [word for word in rest if word not in _SWEEP]
    if words != rest:
        with _one_line():
            sweep.run(name, words, _composed)
        return
    if any(_HYDRA_FLAGS.match(word) for word in rest):  # Hydra's own: printing the configuration
        _composed([word for word in rest if _OVERRIDE.match(word)])
        sys.argv = [f"megatron-bai {name}", *rest]
        start = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
        start(lambda settings: None)()
        return
    settings = _composed(rest)
    module, _, function = verb.function.partition(":")
    with without_collections():
        run: Callable[[config.Config], None] = getattr(importlib.import_module(module), function)
    run(settings)


def _composed(overrides: list[str]) -> config.Config:
    """The settings that overrides of a command line make of the defaults.

    Raises:
        UserError: they make none.
    """
    with _one_line(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        return cast(config.Config, OmegaConf.to_object(hydra.compose("config", overrides=overrides)))


@contextmanager
def _one_line() -> Iterator[None]:
    """Hydra's and OmegaConf's complaints as ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """What Hydra and OmegaConf say over several lines and causes, without their advice about full tracebacks."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause and str(cause) else ""
    if isinstance(error, OverrideParseException):
        first = f"cannot read the override {error.override!r}: {first}"
    reason = f"{first} ({detail})" if detail and detail not in first else first
    return reason + _other_choice(reason)


def _other_choice(reason: str) -> str:
    """Which choices of a group have the setting that the one chosen lacks, if that is what is wrong."""
    key, kind = (re.findall(r"Key '(\w+)' not in '(\w+)'", reason) or [("", "")])[0]
    for group, field in config.Config.__dataclass_fields__.items():
        family = _family(cast(type, field.type))
        if kind in [each.__name__ for each in family]:
            known = [each.name for each in family if key in each.__dataclass_fields__ and each.name != MISSING]
            return f"; add {' or '.join(f'{group}={name}' for name in known)}, which has it" if known else ""
    return ""


def _complain(error: UserError) -> int:
    """One line on the terminal. Returns this process's rank."""
    rank = _let_rank_0_speak()
    where = f" [rank {rank}]" if rank else ""
    print(f"megatron-bai: error{where}: {error}", file=sys.stderr, flush=True)
    return rank


def _let_rank_0_speak() -> int:
    """Wait on other ranks than 0. One that fails like rank 0, or because rank 0 left, is ended by torchrun meanwhile."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(_PATIENCE_S)
    return rank


def _terminate(number: int, frame: Any) -> None:
    """SIGTERM unwinds like an exception, so that the server is stopped and files are closed."""
    raise SystemExit(128 + number)


def _overview() -> str:
    lines = [f"  {name:8} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        ["usage: megatron-bai VERB [experiment=NAME] [group.key=value …]", "", *lines, "",
         f"Experiments: {project_files.conf_dir() / 'experiment'}",
         f"Scripts that start runs on many machines and under Slurm: {project_files.launch_dir()}", "",
         "`megatron-bai VERB --help` lists a verb's settings, `megatron-bai VERB --cfg job` prints the whole configuration,",
         "`--multirun` sweeps over comma-separated values."]
    )


def _help(name: str, verb: Verb) -> str:
    usage = f"usage: megatron-bai {name} [experiment=NAME] [group.key=value …]"
    lines = [verb.summary, "", usage, f"e.g.   {verb.example}"]
    for group in verb.groups:
        lines += ["", *_settings(group)]
    return "\n".join(lines)


def _settings(group: str) -> list[str]:
    """A group's settings, and those of each choice of it, as `config.py` has them."""
    return [line for kind in _family(getattr(config, group.capitalize())) for line in _described(group, kind)]


def _family(kind: type[Any]) -> list[type[Any]]:
    """A class of `config.py` and its descendants there."""
    children = [child for child in kind.__subclasses__() if child.__module__ == config.__name__]
    return [kind, *(each for child in children for each in _family(child))]


def _described(group: str, kind: type) -> list[str]:
    """A class's own settings with type, default and the comment beside each."""
    about = inspect.getdoc(kind) or ""
    written = not about.startswith(f"{kind.__name__}(")  # dataclasses without one are given their signature
    lines = [f"{group}: {about.splitlines()[0]}" if written else f"{group}:"]
    for line in inspect.getsource(kind).splitlines():
        if found := re.match(r"    (\w+): ([\w\[\], |]+) = (.+?)(?:  # (.+))?$", line):
            key, typename, default, comment = found.groups()
            lines.append(f"  {group}.{key}={_AS_TYPED.get(default, default)}  ({typename}) {comment or ''}".rstrip())
    return lines
