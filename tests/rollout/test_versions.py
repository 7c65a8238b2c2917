"""Releases of SGLang: which are taken, what each is told differently, and why others are not."""

import ast
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fake_sglang import serve
from packaging.requirements import Requirement

import megatron_bai
from megatron_bai.compat.releases import (
    MEGATRON,
    MEGATRON_CORE,
    SERVERS,
    SGLANG,
    installed_megatron,
    megatron_release,
)
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import releases, weight_sync

ROOT = Path(__file__).parents[2]
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


def test_a_release_without_a_row_needs_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest release before it stands for it; faults that are known stay faults, and a CPU needs fixes."""
    with pytest.raises(UserError, match=r"no one has tried it \(backend.untested=true takes it, and verifies it\)"):
        releases.release_of("0.6.0", "answers")
    with pytest.raises(
        UserError, match=r"0.6.0 is installed, and no one has tried it \(backend.untested=true takes it"
    ):
        releases.require_startable("0.6.0", "is installed", "cuda")
    monkeypatch.setattr("megatron_bai.compat.releases._admits_untested", True)
    assert releases.release_of("0.6.0", "answers") is SERVERS["0.5.23"] and releases.is_untested("0.6.0")
    releases.require_startable("0.6.0", "is installed", "cuda")
    for device, known in (("cpu", "0.6.0"), ("cuda", "0.5.20")):
        with pytest.raises(UserError, match=f"SGLang {known} is installed; a run starts servers of"):
            releases.require_startable(known, "is installed", device)
    for fault in ("0.5.15", "0.5.18", "dev", None):
        with pytest.raises(UserError):
            releases.release_of(fault, "answers")


def test_servers_of_ours_are_of_releases_that_were_tried() -> None:
    for release in ("0.5.21", "0.5.22", "0.5.23"):
        releases.require_startable(release, "is installed")
    for other in (None, "0.5.20", "0.5.24"):  # the first would be taken at rollout.urls
        with pytest.raises(
            UserError, match=rf"SGLang {re.escape(other or '(none)')} is installed; .*0.5.21, 0.5.22, 0.5.23 alone"
        ):
            releases.require_startable(other, "is installed")


def test_the_pin_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"sglang=={SGLANG}" in project["optional-dependencies"]["gpu"]
    assert {f"sglang=={SGLANG}", f"megatron-core=={MEGATRON_CORE}"} <= set(
        (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    )
    (megatron,) = (Requirement(line) for line in project["dependencies"] if line.startswith("megatron-core"))
    assert all(megatron.specifier.contains(release) for release in MEGATRON)


def test_one_table_names_releases() -> None:
    """A string that is one stands in no other module of the package; docstrings may tell of them."""
    named: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in {*SERVERS, *MEGATRON, SGLANG}:
                named.setdefault(path.relative_to(PACKAGE).as_posix(), []).append(node.value)
    assert named.keys() == {"compat/releases.py"}


@pytest.mark.parametrize(
    ("release", "row"),
    [("0.16.1", "0.16.1"), ("0.18.3", "0.18.2"), ("0.20.0rc1", "0.19.2"), ("0.17.0rc0", "0.17.0"), ("mine", "0.16.1")],
)
def test_a_release_without_a_row_has_that_of_the_nearest_earlier_one(release: str, row: str) -> None:
    assert megatron_release(release) is MEGATRON[row]


def test_the_release_is_that_of_the_sources_which_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the path stands before what pip knows."""
    here = installed_megatron()
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text('MAJOR = 0\nMINOR = 21\nPATCH = 3\nPRE_RELEASE = "rc1"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_megatron.__wrapped__() == "0.21.3rc1" != here
    (core / "package_info.py").write_text("MAJOR =")
    assert installed_megatron.__wrapped__() == here, "one that cannot be read is none"


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
