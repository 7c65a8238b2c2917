"""The families there are: modules of this package, and those of other packages' entry points."""

import functools
import pkgutil
from importlib import import_module
from importlib.metadata import entry_points

from megatron_bai.errors import UserError
from megatron_bai.model import families
from megatron_bai.model.families.family import Family

ENTRY_POINTS = "megatron_bai.families"
# What these need beyond what a family can say today.
NOT_BUILT = {
    "qwen3_next": "gated delta-net layers, whose kernels Megatron-Core has in Triton alone, and zero-centred norms",
}
DEFAULT = "qwen3_moe"  # of a model that settings alone describe


@functools.cache
def all_families() -> dict[str, Family]:
    """Return the families by name: each module of this package, or entry point, that has a `FAMILY`.

    Raises:
        UserError: a package's family cannot be loaded, or takes the name or a model type of another.
    """
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        family = getattr(import_module(module.name), "FAMILY", None)
        if family is not None:
            _add(found, family, module.name)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            family = point.load()
        except Exception as error:  # whatever it is, it is the plugin's
            raise UserError(f"the family plugin {point.name} = {point.value} cannot be loaded: {error!r}") from error
        _add(found, family, f"the family plugin {point.name} = {point.value}")
    return found


def _add(found: dict[str, Family], family: Family, origin: str) -> None:
    """Add a family whose names are new."""
    if not isinstance(family, Family):
        raise UserError(f"{origin} is {family!r}: an instance of Family is needed")
    for other in found.values():
        if other.name == family.name or set(other.model_types) & set(family.model_types):
            raise UserError(f"{origin}: there is a family {other.name!r} for {', '.join(other.model_types)} already")
    found[family.name] = family


def find_family(model_type: str, where: str) -> Family:
    """Return the family of a model type.

    Args:
        model_type: of `config.json`.
        where: put before the message, such as the file's name.

    Raises:
        UserError: there is none.
    """
    for family in all_families().values():
        if model_type in family.model_types:
            return family
    if model_type in NOT_BUILT:
        raise UserError(f"{where}: model_type is {model_type!r}, which is not built: it has {NOT_BUILT[model_type]}")
    known = sorted(name for family in all_families().values() for name in family.model_types)
    raise UserError(
        f"{where}: model_type is {model_type!r}, supported are {', '.join(known)}: docs/families.md says how to add one"
    )
