"""Compare the settings with which an older run, or an older release, made something with the present ones.

A setting that did not exist then counts as its present default. One that no longer exists is a change, unless `RENAMED`
has its present name.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields

from omegaconf import MISSING

from megatron_bai import config
from megatron_bai.utils.dataclass_defaults import read_defaults
from megatron_bai.utils.flatten import flatten

RENAMED: dict[
    str, str
] = {}  # the present name of each setting that had another, both dotted: "trainer.old": "trainer.new"


def complete_settings(saved: Mapping[str, str], settings: config.Config) -> dict[str, str]:
    """Return saved settings under their present names, with the defaults of those that did not exist.

    Args:
        saved: by dotted names, as `flatten` gives them.
        settings: the present ones, whose kinds of data, reward, environment, initial weights and objective have the
            defaults. Of a choice that did not exist the kind was what it is unless it is chosen.
    """
    completed = {_present_name(name): text for name, text in saved.items()}
    known, unchosen = {_setting_of(name) for name in completed}, config.Config()
    for group in fields(settings):
        for name, value in read_defaults(type(getattr(settings, group.name))).items():
            if value != MISSING and f"{group.name}.{name}" not in known:
                value = getattr(getattr(unchosen, group.name), name) if name == "name" else value
                completed |= flatten({f"{group.name}.{name}": value})
    return completed


def list_changes(
    saved: Mapping[str, str], settings: config.Config, may_change: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Return in words what differs between saved settings and the present ones.

    Args:
        saved: by dotted names, as `flatten` gives them.
        settings: the present ones.
        may_change: whether a setting is not compared, by its dotted name.
    """
    before, now = complete_settings(saved, settings), flatten(asdict(settings))
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return [_describe_change(name, before, now, settings) for name in differing if not may_change(name)]


def _describe_change(name: str, before: Mapping[str, str], now: Mapping[str, str], settings: config.Config) -> str:
    group, _, setting = _setting_of(name).partition(".")
    same_kind = before.get(f"{group}.name") == now.get(f"{group}.name")
    present = {field.name for field in fields(getattr(settings, group))} if hasattr(settings, group) else set()
    if same_kind and setting not in present:
        return f"{name} was {before[name]}, and this release has no such setting"
    return f"{name} was {before.get(name, 'unknown')}, is {now.get(name, 'unknown')}"


def _setting_of(name: str) -> str:
    """Return the setting that a name belongs to: a setting with entries of its own has further dots."""
    return ".".join(name.split(".")[:2])


def _present_name(name: str) -> str:
    setting = _setting_of(name)
    return RENAMED.get(setting, setting) + name[len(setting) :]
