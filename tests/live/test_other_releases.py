"""Other releases of SGLang, each from its lock in a directory of its own, before the one that is installed: the live
contract, and two steps of reinforcement learning with models whose fixes differ between releases.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from family_runs import make_checkpoint, reinforce, require_same_engines

from megatron_bai.compat.releases import SGLANG, sglang_releases

ROOT = Path(__file__).parents[2]
OTHERS = [release for release in sglang_releases() if release != SGLANG]

pytestmark = [pytest.mark.live, pytest.mark.long]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Installs a release, once; its dependencies are those of the one that is installed."""

    def install(release: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"sglang-{release}"
        if not directory.exists():
            lock = ROOT / "requirements" / f"sglang-{release}.lock"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            done = subprocess.run(
                [*command, "--target", directory, "-r", lock], capture_output=True, text=True, timeout=180
            )
            assert not done.returncode, done.stderr
        return directory

    return install


@pytest.mark.parametrize("release", OTHERS)
def test_contract_and_diffs(release: str, install: Callable[[str], Path]) -> None:
    """tests/live/test_contract.py asks a server of the release; its diffs apply to it."""
    path = os.pathsep.join(filter(None, [str(install(release)), os.environ.get("PYTHONPATH")]))
    chosen = ["tests/live/test_contract.py", "tests/patches/test_diffs.py", "-m", "not long and not distributed"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rN", *chosen]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("name, sync", [("qwen3_moe_mixed_tied_yarn", "tensors"), ("mixtral", "disk")])
def test_two_steps_with_the_newest_release(
    name: str, sync: str, install: Callable[[str], Path], tmp_path: Path
) -> None:
    """One has dense layers and tied embeddings, the other's routers are told their layer by upstream."""
    run = tmp_path / "run"
    steps = reinforce(make_checkpoint(name, tmp_path / "published"), run, sync, install(OTHERS[-1]))
    assert json.loads((run / "summary.json").read_text())["versions"]["sglang"] == OTHERS[-1]
    require_same_engines(steps)
