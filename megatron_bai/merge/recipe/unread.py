"""Settings of a merge that no tensor would read, because patterns before them fit all: refused before any is read."""

from itertools import chain

from megatron_bai.config import Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.regions import Fate
from megatron_bai.merge.tensor_names.param_groups import matches


def refuse_unread_settings(settings: Merge, plan: Plan) -> None:
    """Refuse `merge.alpha` beside a `merge.alpha_for` that fits every tensor, and patterns behind such; t, weights too.

    Args:
        settings: as given.
        plan: of the merge.

    Raises:
        UserError: names the setting or the pattern.
    """
    merged = [region for region in chain(*plan.regions.values()) if region.fate is Fate.MERGED]
    for name in ("weights", "alpha", "t"):
        patterns = list(getattr(settings, f"{name}_for"))
        if not patterns:
            continue
        first = {next((p for p in patterns if matches(p, r.key, r.layer)), None) for r in merged}
        if None not in first and settings.sweep and plan.recipes[0].sweep_setting == name:
            raise UserError(f"merge.sweep changes nothing: merge.{name}_for gives every tensor its own merge.{name}")
        if None not in first and getattr(settings, name) not in (None, []):
            raise UserError(
                f"merge.{name} is given and never read, since merge.{name}_for fits every tensor: leave the former out"
            )
        if unread := [pattern for pattern in patterns if pattern not in first]:
            raise UserError(
                f"the pattern {unread[0]!r} of merge.{name}_for is never read, since those before it fit all its "
                "tensors: give it before them, or leave it out"
            )
