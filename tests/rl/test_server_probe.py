"""Servers of a release that is not in the table: what their first rows must be."""

import pytest

from megatron_bai.compat.releases import MEGATRON, SERVERS
from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.rl.experience.server_probe import verify_rows

SERVER: dict[str, tuple] = {"SGLang": ("0.6.0",), "megatron-core": ()}
ENGINE: dict[str, tuple] = {"megatron-core": ("0.99.1",)}


def values(gap: float, mismatch: float) -> dict[str, float]:
    return {"kl_k3_live": gap**2 / 2, "route_mismatch": mismatch}


def settings(dtype: str = "float32", tolerance: float = 0.01) -> Config:
    found = Config()
    found.rollout.dtype, found.rollout.sync_tolerance = dtype, tolerance
    return found


def test_rows_that_are_equal_are_verified() -> None:
    line = verify_rows(SERVER, values(2e-6, 0.0), settings())
    assert "SGLang 0.6.0, which no one has tried, is verified" in line and "2e-06 nats" in line and "0.00%" in line
    verify_rows(SERVER, values(0.05, 0.1), settings("bfloat16", 0.1))


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
    with pytest.raises(UserError, match="SGLang 0.6.0, which no one has tried, is refused: of a first rollout"):
        verify_rows(SERVER, found, given)


@pytest.mark.parametrize(
    ("untested", "named", "remedy"),
    [
        (SERVER, "SGLang 0.6.0, which", f"Use one of SGLang {', '.join(SERVERS)}"),
        (ENGINE, "megatron-core 0.99.1, which", f"Use one of megatron-core {', '.join(MEGATRON)}"),
        (SERVER | ENGINE, "SGLang 0.6.0 and megatron-core 0.99.1, which", "0.5.23 and one of megatron-core 0.16.0, "),
    ],
)
def test_the_engine_that_no_one_has_tried_is_named(untested: dict[str, tuple], named: str, remedy: str) -> None:
    assert verify_rows(untested, values(0.0, 0.0), settings()).startswith(named)
    with pytest.raises(UserError) as caught:
        verify_rows(untested, values(1.0, 0.0), settings())
    assert str(caught.value).startswith(named) and remedy in str(caught.value)
