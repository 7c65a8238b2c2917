"""Releases of SGLang: which are taken, what each is told differently, and why others are not."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fake_sglang import serve

import megatron_bai
from megatron_bai.compat.releases import MEGATRON_CORE, SERVERS, SGLANG
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import releases, weight_sync

PACKAGE = Path(megatron_bai.__path__[0])
WEIGHTS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, r"SGLang \(none\) answers, which is no release: use one of 0.5.19, 0.5.20, 0.5.21"),
        ("dev", "SGLang dev answers, which is no release"),
        ("0.5.9", r"SGLang 0.5.9 answers, and its overlap schedule gives requests each other's routes"),
        ("0.5.15.post1", "its overlap schedule"),
        ("0.5.16", "its replies do not say which weights a token was sampled with"),
        ("0.5.18", "its replies do not say"),
        ("0.6.0", "SGLang 0.6.0 answers, and no one has tried it"),
    ],
)
def test_a_release_that_is_not_known_is_refused_with_the_reason(found: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        releases.release_of(found, "answers")


def test_servers_of_ours_are_the_pinned_release() -> None:
    releases.require_pinned(SGLANG, "is installed")
    with pytest.raises(UserError, match="SGLang 0.5.20 is installed; this package needs sglang==0.5.21"):
        releases.require_pinned("0.5.20", "is installed")


def test_the_pin_is_the_projects() -> None:
    from importlib.metadata import requires

    pins = {line.split(";")[0].strip() for line in requires("megatron-bai") or []}
    assert {f"sglang=={SGLANG}", f"megatron-core=={MEGATRON_CORE}"} <= pins


def test_one_table_names_releases() -> None:
    """A string that is one stands in no other module of the package; docstrings may tell of them."""
    named: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in {*SERVERS, SGLANG, MEGATRON_CORE}:
                named.setdefault(path.relative_to(PACKAGE).as_posix(), []).append(node.value)
    assert named.keys() == {"compat/releases.py"}


def answers(release: str, paths: list[str]) -> Callable[[web.Request, dict[str, Any]], Any]:
    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        paths.append(request.path)
        refused = release in ("0.5.19", "0.5.20") and request.path in ("/begin_weight_update", "/end_weight_update")
        return web.Response(status=404) if refused else {"version": release, "weight_version": "v1"}

    return answer


def test_each_server_of_a_fleet_is_told_what_its_release_understands() -> None:
    """One has sessions for weights, the other would not know the word."""
    new: list[str] = []
    old: list[str] = []
    with serve(answers("0.5.21", new)) as one, serve(answers("0.5.20", old)) as other:
        urls = [one, other]
        weight_sync.sync_from_tensors(
            urls, WEIGHTS.items(), "v1", SHAPES, weight_sync.HttpTransport(urls, [1, 1]), 1 << 20
        )
    shared = ["/server_info", "/pause_generation", "/flush_cache", "/update_weights_from_tensor",
              "/update_weight_version", "/flush_cache", "/continue_generation", "/model_info"]  # fmt: skip
    assert old == shared
    assert new == [*shared[:3], "/begin_weight_update", shared[3], "/end_weight_update", *shared[4:]]


def test_a_release_that_is_not_known_gets_no_weights() -> None:
    paths: list[str] = []
    with serve(answers("0.5.18", paths)) as url, pytest.raises(UserError, match="0.5.18 answers at http"):
        weight_sync.sync_from_tensors(
            [url], WEIGHTS.items(), "v1", SHAPES, weight_sync.HttpTransport([url], [1]), 1 << 20
        )
    assert paths == ["/server_info"]
