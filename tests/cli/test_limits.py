"""Every number has a range and every choice its list: what is outside is refused by name, before any work."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_bai import config
from megatron_bai.cli.compose import compose, config_subclasses, summarize_hydra_error
from megatron_bai.cli.help_text import verb_help
from megatron_bai.cli.verbs import VERBS
from megatron_bai.config.limits import choice, help_of, limits_of, number, validate_group
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.merge.methods import METHODS
from megatron_bai.model.build import RECOMPUTE
from megatron_bai.monitor.detectors import alarm, run_monitor
from megatron_bai.rollout.servers.quantize import FORMATS
from megatron_bai.routing.store.codec import ENCODINGS


def settings() -> Iterator[tuple[str, type, "dataclasses.Field[Any]"]]:
    """Yield every setting of every choice of every group: the group, the class that declares it, and the field."""
    for group in dataclasses.fields(config.Config):
        for kind in config_subclasses(getattr(config, group.name.capitalize())):
            for setting in dataclasses.fields(kind):
                yield group.name, kind, setting


NUMBERS = [found for found in settings() if "int" in str(found[2].type) or "float" in str(found[2].type)]
CHOICES = [found for found in settings() if limits_of(found[2]).choices]


def name(found: Any) -> str:
    return f"{found[0]}.{found[2].name}-{found[1].__name__}"


def wrapped(setting: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value as the setting's type has it: in a list, a mapping, or a mapping of lists."""
    kind = str(setting.type)
    if kind.startswith("dict"):
        return {"experts": [value] if "list" in kind else value}
    return [value] if kind.startswith("list") else value


def outside(setting: "dataclasses.Field[Any]") -> list[float]:
    """Values just outside a setting's limits, NaN among them."""
    limits, is_int = limits_of(setting), "int" in str(setting.type)
    values: list[float] = [2**64] if is_int else [math.nan]
    if limits.at_least is not None:
        values.append(limits.at_least - 1 if is_int else math.nextafter(limits.at_least, -math.inf))
    values += [limits.above] if limits.above is not None else []
    if limits.at_most is not None:
        values.append(limits.at_most + 1 if is_int else math.nextafter(limits.at_most, math.inf))
    values += [limits.below] if limits.below is not None else []
    return values + ([math.inf, -math.inf] if limits.finite and not is_int else [])


@pytest.mark.parametrize("found", NUMBERS, ids=name)
def test_every_number_has_limits_and_what_is_just_outside_is_refused_by_name(found: Any) -> None:
    group, kind, setting = found
    limits = limits_of(setting)
    assert limits.is_number, f"declare {group}.{setting.name} of {kind.__name__} with config.limits.number"
    for value in outside(setting):
        changed = kind()
        setattr(changed, setting.name, wrapped(setting, value))
        with pytest.raises(UserError, match=rf"^{group}\.{setting.name}\S* is \S+: it must be "):
            validate_group(group, changed)
    bounds = (limits.at_least, limits.at_most)
    for value in [bound for bound in bounds if bound is not None]:
        changed = kind()
        setattr(changed, setting.name, wrapped(setting, value))
        validate_group(group, changed)


@pytest.mark.parametrize("found", CHOICES, ids=name)
def test_another_choice_is_refused_with_the_list(found: Any) -> None:
    group, kind, setting = found

    def changed_to(value: str) -> Any:
        changed = kind()
        keys = limits_of(setting).keys
        setattr(changed, setting.name, value if setting.type is str else {keys[0]: value} if keys else [value])
        return changed

    for allowed in limits_of(setting).choices:
        validate_group(group, changed_to(allowed))
    changed = changed_to("zzz")
    with pytest.raises(
        UserError, match=rf"^{group}\.{setting.name}\S* is 'zzz': choose {limits_of(setting).choices[0]}"
    ):
        validate_group(group, changed)


@pytest.mark.parametrize(
    "kind", list(dict.fromkeys(kind for _, kind, _ in settings())), ids=lambda kind: kind.__name__
)  # a default that is refused could not be left out
def test_the_defaults_are_within_their_limits(kind: type) -> None:
    if all(getattr(kind(), setting.name) != "???" for setting in dataclasses.fields(kind)):
        validate_group("group", kind())


def test_the_lists_are_those_of_the_code_that_reads_them() -> None:
    def choices(kind: type, key: str) -> set[str]:
        return set(limits_of(next(f for f in dataclasses.fields(kind) if f.name == key)).choices) - {""}

    assert choices(config.Merge, "method") == set(METHODS)
    assert choices(config.Parallel, "recompute") == set(RECOMPUTE)
    assert choices(config.Rollout, "quantize") == set(FORMATS)
    assert choices(config.Replay, "store_encoding") == set(ENCODINGS)
    assert choices(config.Backend, "dtype") == set(backend.DTYPES)
    assert choices(config.Monitor, "actions") == set(alarm.ACTIONS)
    assert set(config.monitor.DETECTORS) == set(run_monitor.DETECTORS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if VERBS[verb].groups])
def test_help_says_what_a_setting_may_be(verb: str) -> None:
    text = verb_help(verb, VERBS[verb])
    for group, kind, setting in settings():
        if group in VERBS[verb].groups and setting.name in kind.__annotations__:
            assert f"{group}.{setting.name}=" in text
            assert limits_of(setting).describe() in text
            assert help_of(kind, setting.name) in text


@pytest.mark.parametrize("found", list(settings()), ids=name)
def test_every_setting_says_what_it_is(found: Any) -> None:
    group, kind, declared = found
    assert help_of(kind, declared.name), f"{group}.{declared.name} of {kind.__name__}: give its declaration a text"


def test_a_text_is_inherited_until_a_class_gives_another() -> None:
    @dataclasses.dataclass
    class Base:
        a: int = number(1, "of the base", at_least=1)
        b: str = config.limits.setting("", "anything")
        c: int = 0

    @dataclasses.dataclass
    class Child(Base):
        a: int = number(2, at_least=2)
        b: str = config.limits.setting("x", "one of two", choices=("x", "y"))

    @dataclasses.dataclass
    class Grandchild(Child):
        a: int = number(3, at_least=3)

    assert [help_of(Grandchild, key) for key in "abc"] == ["of the base", "one of two", ""]
    assert limits_of(dataclasses.fields(Grandchild)[0]).at_least == 3


def test_declarations_of_packages_from_outside_stay_as_they_were() -> None:
    @dataclasses.dataclass
    class Outside:
        size: int = number(1, at_least=1)
        way: str = choice("a", "a", "b")
        by: dict[str, str] = choice(dict, "a", "b", keys=("k",))

    validate_group("outside", Outside())
    for changed, line in (
        (Outside(size=0), "outside.size is 0: it must be at least 1"),
        (Outside(way="c"), "outside.way is 'c': choose a or b"),
        (Outside(by={"j": "a"}), "outside.by names 'j': choose k"),
    ):
        with pytest.raises(UserError, match=line):
            validate_group("outside", changed)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.temperature=nan", "rollout.temperature is nan: it must be above 0"),
        ("rollout.concurrency=0", "rollout.concurrency is 0: it must be at least 1"),
        ("rollout.port=70000", "rollout.port is 70000: it must be from 0 to 65535"),
        ("merge.weights=[.5,.inf]", r"merge.weights\[1\] is inf: it must be a finite number"),
        ("trainer.decay=cosin", "choose constant, linear, cosine or inverse-square-root; did you mean cosine"),
    ],
)
def test_the_command_line_is_checked_when_it_is_composed(override: str, line: str) -> None:
    """Whatever the verb, and for every job of a `--multirun`, which composes all before the first starts."""
    config.register_schema()
    with pytest.raises(UserError, match=line):
        compose([override.replace(".inf", "inf")])


def test_what_is_wrong_in_a_file_of_the_configuration_is_said() -> None:
    text = "In 'experiment/mine': ConfigKeyError raised while composing config:\nKey 'lr' not in 'Trainer'\n  x"
    said = summarize_hydra_error(RuntimeError(text))
    assert said == "In 'experiment/mine': Key 'lr' not in 'Trainer'; did you mean trainer.learning_rate?"
