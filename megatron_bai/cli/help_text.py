"""What `megatron-bai --help` and `megatron-bai VERB --help` print."""

import dataclasses
import inspect
from typing import Any, cast

from omegaconf import MISSING

from megatron_bai import config, project_files
from megatron_bai.cli.compose import config_subclasses
from megatron_bai.cli.verbs import VERBS, Verb
from megatron_bai.config.limits import describe_limits, help_of


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


@dataclasses.dataclass(frozen=True)
class SettingText:
    """What is said of a setting.

    Attributes:
        name: with its group.
        default: as one would write it on the command line.
        typename: of its values.
        allowed: its range or its choices, in words; empty: all of the type.
        about: what it means.
    """

    name: str
    default: str
    typename: str
    allowed: str
    about: str


def describe_group(group: str) -> list[tuple[type, str, list[SettingText]]]:
    """Return the dataclasses of a group's settings, one for each choice of it, base classes first.

    Args:
        group: a field of `config.Config`.

    Returns:
        Each class, its docstring (empty without one), and the settings that it declares itself.
    """
    found = []
    for kind in config_subclasses(getattr(config, group.capitalize())):
        about = inspect.getdoc(kind) or ""
        written = not about.startswith(f"{kind.__name__}(")  # dataclasses without one are given their signature
        found.append((kind, about if written else "", _own_settings(group, kind)))
    return found


def _group_settings(group: str) -> list[str]:
    """List a group's settings, and those of each choice of it, as `config/` has them."""
    lines = []
    for _, about, settings in describe_group(group):
        lines.append(f"{group}: {about.splitlines()[0]}" if about else f"{group}:")
        for each in settings:
            said = f"({each.typename}{', ' if each.allowed else ''}{each.allowed}) {each.about}"
            lines.append(f"  {each.name}={each.default}  {said}".rstrip())
    return lines


def _own_settings(group: str, kind: type) -> list[SettingText]:
    """Describe the settings that a class declares, and no base class of it."""
    declared = inspect.get_annotations(kind)
    settings = []
    for setting in dataclasses.fields(kind):
        if setting.name in declared:
            plain = setting.type in (bool, int, float, str)
            typename = cast(type, setting.type).__name__ if plain else str(setting.type).replace("typing.", "")
            name, default = f"{group}.{setting.name}", _format_default(setting)
            allowed = describe_limits(setting)
            settings.append(SettingText(name, default, typename, allowed, help_of(kind, setting.name)))
    return settings


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
