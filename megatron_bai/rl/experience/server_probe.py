"""Verification of servers of a release that is not in the table, before a run trains on what they sample."""

from collections.abc import Mapping, Sequence

from megatron_bai.config import Config
from megatron_bai.errors import UserError

# Share of routes that may differ between two engines: float32 breaks ties another way; bfloat16 changes a tenth of the
# routes of a large model (arXiv 2510.11370). Rows of another token or layer would nearly all differ.
_ROUTES_FLOAT32, _ROUTES_BFLOAT16 = 0.01, 0.25


def verify_rows(releases: Sequence[str], values: Mapping[str, float], settings: Config) -> str:
    """Refuse servers whose log-probabilities and routes are not those of the training engine with its live router.

    Args:
        releases: of the servers.
        values: metrics of the first rollout, `kl_k3_live` and `route_mismatch` among them.
        settings: whose `rollout.sync_tolerance` bounds the difference, in nats.

    Returns:
        What was verified, in one line.

    Raises:
        UserError: they differ by more, or there is nothing to compare.
    """
    rounded = "bfloat16" in (settings.rollout.dtype, settings.backend.dtype) or bool(settings.rollout.quantize)
    tolerance, routes = settings.rollout.sync_tolerance, _ROUTES_BFLOAT16 if rounded else _ROUTES_FLOAT32
    gap = abs(2 * values.get("kl_k3_live", float("nan"))) ** 0.5  # r − 1 − log r is half the square of a small log r
    differ = values.get("route_mismatch", float("nan"))
    found = (
        f"of the first rollout, the server's log-probabilities are {gap:.2g} nats (root mean square) from the training "
        f"engine's, and {differ:.2%} of its routes differ"
    )
    name = f"SGLang {', '.join(releases)}, which no one has tried"
    if not (gap <= tolerance and differ <= routes):
        raise UserError(
            f"{name}, is refused: {found}; allowed are rollout.sync_tolerance={tolerance:g} nats and {routes:.0%}. Use "
            "a release of docs/sglang.md"
        )
    return f"{name}, is verified: {found}"
