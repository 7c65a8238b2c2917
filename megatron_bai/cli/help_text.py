"""What `megatron-bai --help` and `megatron-bai VERB --help` print."""

import inspect
import re

from megatron_bai import config, project_files
from megatron_bai.cli.compose import config_subclasses
from megatron_bai.cli.verbs import VERBS, Verb

# Defaults as one would write them on the command line; ??? is Hydra's mark for a value that must be given.
_DEFAULT_TEXT = {
    "field(default_factory=list)": "[]",
    "field(default_factory=dict)": "{}",
    "MISSING": "???",
    "None": "null",
    'float("inf")': "inf",
}


def overview() -> str:
    """Return the text of `megatron-bai --help`: the verbs and where the presets are."""
    lines = [f"  {name:8} {verb.summary}" for name, verb in VERBS.items()]
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
    """List a class's own settings with type, default and the comment beside each."""
    about = inspect.getdoc(kind) or ""
    written = not about.startswith(f"{kind.__name__}(")  # dataclasses without one are given their signature
    lines = [f"{group}: {about.splitlines()[0]}" if written else f"{group}:"]
    for line in inspect.getsource(kind).splitlines():
        if found := re.match(r"    (\w+): ([\w\[\], |]+) = (.+?)(?:  # (.+))?$", line):
            key, typename, default, comment = found.groups()
            lines.append(
                f"  {group}.{key}={_DEFAULT_TEXT.get(default, default)}  ({typename}) {comment or ''}".rstrip()
            )
    return lines
