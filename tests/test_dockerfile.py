"""The Dockerfile without Docker: what it copies exists, and its steps do what docs/gpu.md and patches/README.md say."""

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "patches"))

import overlay  # noqa: E402, found by the line above

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    line.split(maxsplit=1)
    for line in TEXT.replace("\\\n", "").splitlines()
    if line.strip() and not line.startswith("#")
]
LOCK = dict(re.findall(r"^(megatron-core|sglang)==(\S+)$", (ROOT / "requirements/gpu.lock").read_text(), re.M))


def arguments(instruction: str) -> list[str]:
    """Those of each instruction of one kind, in order."""
    return [rest for name, rest in STEPS if name == instruction]


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignored, *taken = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    for sources in (rest.split()[:-1] for rest in arguments("COPY")):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source.split("/")[0], each[1:]) for each in taken if each[0] == "!"), source


def test_it_installs_as_the_documentation_says() -> None:
    documented = re.search(r"```sh\n(grep -v .+?)```", (ROOT / "docs/gpu.md").read_text(), re.S)[1].splitlines()
    ran = " && ".join(arguments("RUN")).replace("/tmp/rest.lock", "rest.lock")
    places = [re.sub(r"\s+", " ", ran).find(command) for command in documented]
    assert len(documented) == 4 and -1 not in places and places == sorted(places)


@pytest.mark.skipif(
    LOCK != {name: overlay.version(name) for name in LOCK}, reason="another release is installed than the image has"
)
def test_its_shell_applies_every_diff_of_what_the_lock_names(tmp_path: Path) -> None:
    """The step itself, in its own shell, in a directory like the image's, on copies of the files that diffs touch."""
    diffs = [diff for name in LOCK for diff in overlay.diffs(name)]
    site = tmp_path / "site"
    for name in LOCK:
        for path in {path for diff in overlay.diffs(name) for path in overlay.touched(diff)}:
            installed, copy = overlay.site_packages(name) / path, site / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            if installed.exists():
                copy.write_bytes(installed.read_bytes())
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    (tmp_path / "patches").symlink_to(ROOT / "patches")
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    stubs = {"pip": "", "python3.12": "", "python": f"echo {site}"}
    for name, text in stubs.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/sh\n{text}\n")
        stub.chmod(0o755)
    (step,) = [rest for rest in arguments("RUN") if "patch -p1" in rest]
    step = step.replace("/tmp/rest.lock", str(tmp_path / "rest.lock"))
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VIRTUAL_ENV": "/nowhere"}
    shell = json.loads(arguments("SHELL")[0])
    done = subprocess.run([*shell, step], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = {str(path.relative_to(site)) for path in site.rglob("*.py") if before.get(path) != path.read_bytes()}
    assert changed == {path for diff in diffs for path in overlay.touched(diff)}
