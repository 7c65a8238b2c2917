"""The diffs in `patches/`: each applies to the installed release, does what it is for without a fix at run time, and is
missed where it is not applied; and the table in `patches/README.md` has them all."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import overlay
import pytest
import torch

from megatron_bai.compat import PATCHES
from megatron_bai.compat.releases import sglang_releases

HERE = Path(__file__).parent
TESTS = HERE.parent
DIFFS = [diff for name in overlay.MODULES for diff in overlay.diffs(name)]
MISSED = {  # what the checks of a diff find without it
    "sgl-kernel-imports": "No module named 'sgl_kernel'",
    "torchvision": "[Tt]orchvision",
    "host-memory": "Torch not compiled with CUDA enabled",
    "routed-scaling": "experts are not scaled",
    "worker-start-method": "workers start by spawn",
    "seeded-sampling": "explicitly specified 'torch_native'|No supported accelerator|the sampler is compiled",
    "batched-attention": "10 calls of SDPA for 10 sequences",
    "attention-sinks": "unexpected keyword argument 'sinks'",
    "grouped-experts": "products of one expert",
    "model-kernels": "0 active drivers|AssertionError",
    "dense-layers": r"dense layers are \[\]",
    "tied-embeddings": "the output layer is not the embedding",
    "topk-layer-id": "21 without a layer: .*mixtral",
    "cpu-training": "Torch not compiled with CUDA enabled",
    "mla-local-spec": "unexpected keyword argument 'k_channels'|taken for present",
    "expert-gradients": "weights of experts differ between tensor ranks",
}


def run(script: str, root: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a script with a copy of a package before all others."""
    path = os.pathsep.join(filter(None, [str(root), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def ran(script: str, root: Path, *arguments: object) -> dict[str, Any]:
    """What such a script prints."""
    done = run(script, root, *arguments)
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "distribution, script", [("sglang", "sglang_worker.py"), ("megatron-core", "megatron_worker.py")]
)
def test_a_patched_package_needs_no_fix_at_run_time(distribution: str, script: str, tmp_path: Path) -> None:
    diffs = overlay.diffs(distribution)
    found = ran(script, overlay.patched(tmp_path, distribution, diffs))
    assert {name.split()[0] for name in found} >= {diff.stem for diff in diffs}
    assert not {name: error for name, error in found.items() if error}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "distribution, script", [("sglang", "sglang_worker.py"), ("megatron-core", "megatron_worker.py")]
)
def test_every_diff_and_no_other_is_missed_where_it_is_not_applied(
    distribution: str, script: str, tmp_path: Path
) -> None:
    diffs = overlay.diffs(distribution)
    found = ran(script, overlay.unpatched(tmp_path, distribution, diffs), "upstream")
    missing = {diff.stem for diff in diffs}
    assert {name.split()[0] for name in found} >= missing
    for name, error in found.items():
        if name.split()[0] in missing:
            assert re.search(MISSED[name.split()[0]], error), f"{name}: {error or 'nothing is missed'}"
        else:  # another release needs it
            assert not error, f"{name}: {error}"


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_each_applies_alone_and_to_a_copy_only(diff: Path, tmp_path: Path) -> None:
    distribution = diff.parent.name.rpartition("-")[0]
    installed = overlay.site_packages(distribution)
    before = {path: (installed / path).read_bytes() for path in overlay.touched(diff) if (installed / path).exists()}
    overlay.patched(tmp_path, distribution, [diff])
    assert all((tmp_path / path).read_bytes() != content for path, content in before.items())
    assert all((installed / path).read_bytes() == content for path, content in before.items())


@pytest.mark.distributed
@pytest.mark.long
def test_layouts_agree_on_a_patched_megatron(tmp_path: Path) -> None:
    """The work of tests/distributed with no fix of this package: one gradient in every layout, and one model."""
    root, out = tmp_path / "patched", tmp_path / "out"
    out.mkdir()
    overlay.patched(root, "megatron-core", overlay.diffs("megatron-core"))
    cases = ("one", "dp2", "tp2", "ep2", "pp2", "tp2_ep2")
    done = run("unfixed_worker.py", root, TESTS / "distributed" / "worker.py", out, *cases)
    assert not done.returncode, done.stderr[-4000:]
    found = {name: torch.load(out / f"{name}.pt", weights_only=False)["r3"] for name in cases}
    known = found["one"]["gradient"]
    for name, case in found.items():
        assert not case["diverged"], name
        assert max(float((case["gradient"][key] - known[key]).abs().max()) for key in known) < 1e-5, name


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "qwen3-mixed", "mixtral", "gpt-oss"])
def test_a_patched_sglang_serves(family: str, tmp_path: Path) -> None:
    """With routes, and Qwen3-MoE with seeds, as transformers computes them; with no fix of this package. The mixed one
    has a dense layer and tied embeddings."""
    root = overlay.patched(tmp_path / "patched", "sglang", overlay.diffs("sglang"))
    found = ran("engine_worker.py", root, family, tmp_path / "model")
    assert found["logprobs"] < 1e-4 and found["rows"] > 100
    assert found["wrong"] <= found["rows"] // 100  # a tie may break another way


@pytest.mark.distributed
@pytest.mark.long
def test_mixtral_is_not_served_with_routes_without_diff_and_fix(tmp_path: Path) -> None:
    (diff,) = (diff for diff in DIFFS if diff.stem == "topk-layer-id")
    root = overlay.unpatched(tmp_path / "unpatched", "sglang", [diff])
    ran("engine_worker.py", root, "mixtral", tmp_path / "fixed", "fixed")
    done = run("engine_worker.py", root, "mixtral", tmp_path / "model", "fixed-but=sglang_topk_layers")
    assert done.returncode and "state_capturer/base.py" in done.stdout + done.stderr, done.stderr[-4000:]


def test_a_diff_for_other_lines_is_refused_by_name(tmp_path: Path) -> None:
    (diff,) = (diff for diff in DIFFS if diff.stem == "host-memory")
    overlay.unpatched(tmp_path, "sglang", [diff])
    (path,) = (tmp_path / path for path in overlay.touched(diff))
    path.write_text(path.read_text().replace('"npu": alloc_with_pin_memory', '"npu": another'))
    with pytest.raises(AssertionError, match=rf"sglang-{version('sglang')}/host-memory\.patch does not apply"):
        overlay.apply(tmp_path, diff)


def test_another_release_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "version", lambda distribution: "9.9")
    with pytest.raises(AssertionError, match=r"sglang 9\.9 is installed, but patches/ has sglang-0\.5\.21"):
        overlay.diffs("sglang")


def rows() -> list[list[str]]:
    """Those of the README's tables: the first cell is a diff's name, or a link to it of that name."""
    lines = (overlay.PATCHES / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| \[?`", line)]
    assert cells
    return cells


def test_the_table_has_every_diff_and_no_other() -> None:
    files = {path.relative_to(overlay.PATCHES).as_posix() for path in overlay.PATCHES.rglob("*.patch")}
    named: set[str] = set()
    for row in rows():
        links = set(re.findall(r"\]\(([\w./-]+\.patch)\)", " ".join(row)))
        assert {Path(link).stem for link in links} == {re.search("`(.+?)`", row[0])[1]}
        named |= links
    assert named == files
    assert all(len(row) == 6 and all(row) for row in rows())  # symptom, upstream, releases, its fix, when it can go


def test_diffs_of_a_release_are_those_of_its_fixes() -> None:
    """A fix that a release does without has no diff for it, and the others have one."""
    fixes = {name: re.findall(r"`(\w+)`", row[4]) for row in rows() for name in re.findall("^.*?`(.+?)`", row[0])}
    known = {patch.name: patch for patch in PATCHES}
    for release in sglang_releases():
        wanted = {
            diff
            for diff, names in fixes.items()
            if any(
                name in known and known[name].distribution == "sglang" and release in known[name].versions
                for name in names
            )
        }
        assert {path.stem for path in (overlay.PATCHES / f"sglang-{release}").glob("*.patch")} == wanted, release


def test_every_fix_at_run_time_has_a_diff_or_a_reason_for_none() -> None:
    text = (overlay.PATCHES / "README.md").read_text()
    fixes = {name for row in rows() for name in re.findall(r"`(\w+)`", row[4])}
    reasons = dict(re.findall(r"^- `(\w+)`: (.+)$", text, re.MULTILINE))
    names = {patch.name for patch in PATCHES}
    assert fixes <= names | {"_mark_experts"} and reasons.keys() <= names
    assert not names - fixes - reasons.keys() and not fixes & reasons.keys()
