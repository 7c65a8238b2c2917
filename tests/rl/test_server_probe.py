"""Servers of a release that is not in the table: what their first rows must be."""

import pytest

from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.rl.experience.server_probe import verify_rows


def values(gap: float, mismatch: float) -> dict[str, float]:
    return {"kl_k3_live": gap**2 / 2, "route_mismatch": mismatch}


def settings(dtype: str = "float32", tolerance: float = 0.01) -> Config:
    found = Config()
    found.rollout.dtype, found.rollout.sync_tolerance = dtype, tolerance
    return found


def test_rows_that_are_equal_are_verified() -> None:
    line = verify_rows(["0.6.0"], values(2e-6, 0.0), settings())
    assert "SGLang 0.6.0, which no one has tried, is verified" in line and "2e-06 nats" in line and "0.00%" in line
    verify_rows(["0.6.0"], values(0.05, 0.1), settings("bfloat16", 0.1))


@pytest.mark.parametrize(
    ("found", "given"),
    [
        (values(0.02, 0.0), settings()),
        (values(2e-6, 0.02), settings()),
        (values(0.05, 0.3), settings("bfloat16", 0.1)),
        ({}, settings()),
        (values(float("nan"), 0.0), settings()),
        ({"kl_k3_live": 0.0}, settings()),
    ],
)
def test_rows_that_differ_or_that_nothing_is_known_of_are_refused(found: dict[str, float], given: Config) -> None:
    with pytest.raises(UserError, match="SGLang 0.6.0, which no one has tried, is refused: of the first rollout"):
        verify_rows(["0.6.0"], found, given)
