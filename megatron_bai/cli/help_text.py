"""What `megatron-bai --help` and `megatron-bai VERB --help` print."""

import dataclasses
import inspect
import re
from typing import Any, cast

from omegaconf import MISSING

from megatron_bai import config, project_files
from megatron_bai.cli.compose import config_subclasses
from megatron_bai.cli.verbs import VERBS, Verb
from megatron_bai.config.limits import describe_limits


def overview() -> str:
    """Return the text of `megatron-bai --help`: the verbs and where the presets are."""
    lines = [f"  {name:8} {verb.summary}" for name, verb in VERBS.items()]
    lines.append("  torchrun Start a verb in several processes: torchrun's own options, then the verb.")
    return "\n".join(
        [
            "usage: megatron-bai VERB [experiment=NAME] [group.key=value …]",
            "",
            *lines,
            "",
            f"Experiments: {project_files.conf_dir() / 'experiment'}",
            f"Scripts that start runs on many machines and under Slurm: {project_files.launch_dir()}",
            "",
            "`megatron-bai VERB --help` lists a verb's settings, `megatron-bai VERB --cfg job` prints the whole",
            "configuration, `--multirun` sweeps over comma-separated values.",
        ]
    )


def verb_help(name: str, verb: Verb) -> str:
    """Return the text of `megatron-bai NAME --help`: usage, an example and every setting that the verb reads.

    Args:
        name: of the verb, a key of `VERBS`.
        verb: its entry in `VERBS`.
    """
    usage = f"usage: megatron-bai {name} [experiment=NAME] [group.key=value …]"
    lines = [verb.summary, "", usage, f"e.g.   {verb.example}"]
    for group in verb.groups:
        lines += ["", *_group_settings(group)]
    return "\n".join(lines)


def _group_settings(group: str) -> list[str]:
    """List a group's settings, and those of each choice of it, as `config/` has them."""
    return [
        line
        for kind in config_subclasses(getattr(config, group.capitalize()))
        for line in _format_settings(group, kind)
    ]


def _format_settings(group: str, kind: type) -> list[str]:
    """List a class's own settings with type, default, what they may be, and the comment beside or above each."""
    about = inspect.getdoc(kind) or ""
    written = not about.startswith(f"{kind.__name__}(")  # dataclasses without one are given their signature
    lines = [f"{group}: {about.splitlines()[0]}" if written else f"{group}:"]
    comments = _read_comments(kind)
    for setting in dataclasses.fields(kind):
        if setting.name in comments:  # its own, and no base class's
            allowed = describe_limits(setting)
            plain = setting.type in (bool, int, float, str)
            typename = cast(type, setting.type).__name__ if plain else str(setting.type).replace("typing.", "")
            about = f"({typename}{', ' if allowed else ''}{allowed}) {comments[setting.name]}"
            lines.append(f"  {group}.{setting.name}={_format_default(setting)}  {about}".rstrip())
    return lines


def _format_default(setting: "dataclasses.Field[Any]") -> str:
    """Return a default as one would write it on the command line; ??? is Hydra's mark for one that must be given."""
    if setting.default_factory is not dataclasses.MISSING:
        return "{}" if setting.default_factory is dict else "[]"
    if setting.default is None:
        return "null"
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    quoted = isinstance(setting.default, str) and setting.default != MISSING
    return f'"{setting.default}"' if quoted else str(setting.default)


def _read_comments(kind: type) -> dict[str, str]:
    """Return the comment beside or above each field that a class declares, or an empty text, in their order."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if found := re.match(r"    # (.+)$", line):
            above.append(found[1])
        elif found := re.match(r"    (\w+): .+?(?:  # (.+))?$", line):
            comments[found[1]] = found[2] or " ".join(above)
            above = []
        else:
            above = []
    return comments
