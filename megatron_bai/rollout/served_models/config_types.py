"""Model types that transformers lacks: a server reads their `config.json` without running a checkpoint's code.

SGLang has these models, and asks transformers' `AutoConfig`, which knows such a type from `auto_map` alone.
"""

from collections.abc import Mapping
from typing import Any

from megatron_bai.model.families.registry import all_families


def register() -> None:
    """Make the model types of families that have `defaults` known to this process, unless transformers has them."""
    from transformers import CONFIG_MAPPING, AutoConfig

    for family in all_families().values():
        for model_type in family.model_types if family.defaults is not None else ():
            if model_type not in CONFIG_MAPPING:
                AutoConfig.register(model_type, make_config_type(model_type, family.defaults or {}))


def make_config_type(name: str, defaults: Mapping[str, Any]) -> type[Any]:
    """Make a class of configurations.

    Args:
        name: its model type.
        defaults: what missing keys mean.
    """
    from transformers import PretrainedConfig

    class ServedConfig(PretrainedConfig):
        """A `config.json` as it stands, with defaults."""

        model_type = name

        def __init__(self, **given: Any) -> None:
            values = {**defaults, **given}
            scaling = values.pop("rope_scaling", None) or {}  # transformers takes it for another name of the next
            rope = {"rope_type": scaling.get("type", "default"), "rope_theta": values["rope_theta"], **scaling}
            super().__init__(**{"rope_parameters": rope, **values})

    return ServedConfig
