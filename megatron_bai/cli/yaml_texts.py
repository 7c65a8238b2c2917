"""Texts in YAML files that YAML reads as something else: `output: 20251128_0931` is a number there, and is refused."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from megatron_bai.cli.overrides import setting_types
from megatron_bai.errors import UserError


def validate_yaml_texts(overrides: Sequence[str]) -> None:
    """Refuse a text in a file of the configuration that reaches the settings otherwise than it was written.

    Args:
        overrides: as Hydra reads them; they choose the files. Hydra must be initialised.

    Raises:
        UserError: names the file and the setting.
    """
    loader = GlobalHydra.instance().config_loader()
    roots = [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]
    chosen = loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults
    for entry in chosen:
        files = [root / f"{entry.config_path}.yaml" for root in roots]
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            continue
        prefix = [part for part in (entry.package or "").split(".") if part]
        for setting, typed in _texts(file):
            _validate_text(file, ".".join([*prefix, *setting]), typed)


def _texts(file: Path) -> Iterator[tuple[list[str], str]]:
    """Yield every plain scalar of a file with its keys, as it was typed; those in quotes are texts."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if root is not None:
        yield from _walk(root, [])


def _walk(node: Any, keys: list[str]) -> Iterator[tuple[list[str], str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _walk(value, [*keys, str(key.value)])
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _walk(value, keys)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        yield keys, node.value


def _validate_text(file: Path, setting: str, typed: str) -> None:
    if setting_types().get(setting) not in ("str", "list[str]"):
        return
    value = OmegaConf.create(f"value: {typed}").value if typed and "${" not in typed else typed
    if not isinstance(value, str) and str(value) != typed:
        raise UserError(f"{file}: YAML reads {setting}: {typed} as {value!r}: write it in quotes, '{typed}'")
