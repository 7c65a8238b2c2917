"""Patches state what they fix, and refuse a release that they were not written for."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bai import compat
from megatron_bai.compat.patch import Patch, after_import, apply_scope
from megatron_bai.errors import UserError


@pytest.fixture
def patch(request: pytest.FixtureRequest) -> Patch:
    """A patch of the installed pytest that counts its installations in `calls`."""
    calls: list[int] = []
    made = Patch(request.node.name, "pytest", (pytest.__version__,), "test", "none", lambda: calls.append(1))
    object.__setattr__(made, "calls", calls)
    return made


def test_applies_once(patch: Any) -> None:
    assert patch.state == "ready"
    patch.apply()
    patch.apply()
    assert patch.state == "applied" and patch.calls == [1]


def test_refuses_another_release_by_name(patch: Patch) -> None:
    moved = replace(patch, versions=("0.0.1", "0.0.2"))
    assert moved.state == "moved"
    with pytest.raises(
        UserError, match=rf"{patch.name}.*pytest 0\.0\.1, 0\.0\.2, but {pytest.__version__} is installed"
    ):
        moved.apply()
    assert moved.state == "moved"


def test_is_not_applied_to_a_release_that_does_without(patch: Any) -> None:
    mended = replace(patch, versions=("0.0.1",), mended_in=(pytest.__version__,))
    assert mended.state == "not needed"
    apply_scope([mended], "test")
    assert patch.calls == [] and mended.state == "not needed"


def test_every_release_of_the_table_is_named_by_every_fix() -> None:
    """As one that needs it or as one that does without: none is left to chance."""
    for fix in compat.PATCHES:
        if fix.distribution == "sglang":
            assert sorted(fix.versions + fix.mended_in) == ["0.5.21", "0.5.22", "0.5.23"], fix.name
    fixes = {fix.name: fix for fix in compat.PATCHES}
    assert fixes["sglang_topk_layers"].mended_in == ("0.5.22", "0.5.23")
    assert fixes["sglang_dense_layers"].versions == fixes["sglang_dense_stages"].mended_in == ("0.5.21",)


def test_refuses_an_absent_package(patch: Patch) -> None:
    absent = replace(patch, distribution="no-such-distribution")
    assert absent.state == "not installed"
    with pytest.raises(UserError, match="but none is installed"):
        absent.apply()


def test_local_suffix_of_a_build_is_no_other_release(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bai.compat.patch.version", lambda name: f"{pytest.__version__}+cpu")
    assert patch.state == "ready"


def test_applies_the_asked_scope_only(patch: Any) -> None:
    other = replace(patch, name=patch.name + "-other", scope="elsewhere", install=lambda: pytest.fail("other scope"))
    apply_scope([other, patch], "test")
    assert patch.calls == [1]


def test_patches_are_named_after_their_modules_and_explain_themselves() -> None:
    names = [patch.name for patch in compat.PATCHES]
    assert len(set(names)) == len(names)
    for patch in compat.PATCHES:
        assert "Can go" in (sys.modules[f"megatron_bai.compat.{patch.name}"].__doc__ or "")


def test_what_no_device_computes_right_is_fixed_on_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bai.rollout.servers import server_main

    scopes: list[str] = []
    monkeypatch.setattr(server_main.compat, "apply", scopes.append)
    monkeypatch.setattr(server_main, "_restrict_tcp_store", lambda: None)
    monkeypatch.setattr(server_main.config_types, "register", lambda: None)
    server_main.prepare(cpu=False)
    applied = {patch.name for patch in compat.PATCHES if patch.scope in scopes}
    assert applied >= {"sglang_dense_layers", "sglang_tied_embeddings", "sglang_topk_layers"}


def test_listing_imports_nothing_patched() -> None:
    code = (
        "import sys; from megatron_bai.compat import PATCHES; [p.state for p in PATCHES]; "
        "print({'torch', 'sglang', 'megatron', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_patch_waits_until_its_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patched_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    after_import("patched_later", lambda module: seen.append(module.value))
    assert not seen and "patched_later" not in sys.modules
    import patched_later

    assert seen == [1] and sys.meta_path == finders
    after_import("patched_later", lambda module: setattr(module, "value", 2))
    assert patched_later.value == 2
