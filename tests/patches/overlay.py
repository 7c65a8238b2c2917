"""A copy of an installed package with some diffs applied, to put before site-packages on a path.

Only files that a diff touches are copied; everything else is a link. A diff is applied without fuzz: where the lines
around it have changed, it was written for another release.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "patches"
MODULES = {"sglang": "sglang", "megatron-core": "megatron.core"}  # of a distribution


def diffs(distribution: str) -> list[Path]:
    """Those for the installed release.

    Raises:
        AssertionError: there are none, but some for another.
    """
    found = PATCHES / f"{distribution}-{version(distribution)}"
    others = sorted(each.name for each in PATCHES.glob(f"{distribution}-*"))
    assert found.is_dir(), f"{distribution} {version(distribution)} is installed, but patches/ has {', '.join(others)}"
    return sorted(found.glob("*.patch"))


def touched(diff: Path) -> list[str]:
    """The files that a diff changes or makes, relative to site-packages."""
    return re.findall(r"^\+\+\+ b/(\S+)", diff.read_text(), re.MULTILINE)


def site_packages(distribution: str) -> Path:
    """Where it is installed."""
    module = MODULES[distribution]
    spec = find_spec(module)
    assert spec and spec.origin, f"{module} is not installed"
    return Path(spec.origin).parents[len(module.split("."))]


def unpatched(root: Path, distribution: str, changing: Iterable[Path]) -> Path:
    """Mirror an installed package in the empty directory `root`, with copies in place of links for what `changing`
    touches.

    Returns:
        `root`, for PYTHONPATH.
    """
    installed = site_packages(distribution)
    paths = {Path(path) for diff in changing for path in touched(diff)}
    folders = {folder for path in paths for folder in path.parents if folder != Path(".")}
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):  # from above, each in a directory of its own
        _unlink(root / folder)
        (root / folder / "__pycache__").mkdir(parents=True)
        for each in (installed / folder).iterdir():
            if each.name != "__pycache__":
                (root / folder / each.name).symlink_to(each)
        for each in (installed / folder / "__pycache__").glob("*.pyc"):
            (root / folder / "__pycache__" / each.name).symlink_to(each)
    for path in paths:
        # What is compiled from the copy must not be written where what is compiled from the installed file is.
        for compiled in (root / path.parent / "__pycache__").glob(f"{path.stem}.*"):
            _unlink(compiled)
        if (installed / path).exists():
            _unlink(root / path)
            shutil.copy2(installed / path, root / path)
    return root


def _unlink(path: Path) -> None:
    """Remove a link, and never what it links to, nor anything in a directory that is itself one."""
    assert path.parent.resolve() == path.parent.absolute(), f"{path.parent} is reached through a link"
    if path.is_symlink():
        path.unlink()


def apply(root: Path, diff: Path) -> None:
    """Apply one to the copy at `root`.

    Raises:
        AssertionError: it does not apply as it is; names it and shows why.
    """
    command = ["patch", "-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "-i", str(diff)]
    if not shutil.which("patch"):
        command = ["git", "apply", "-p1", str(diff)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert not done.returncode, f"{diff.parent.name}/{diff.name} does not apply: {done.stdout}{done.stderr}"


def patched(root: Path, distribution: str, applied: Iterable[Path]) -> Path:
    """`unpatched`, with the diffs applied in order."""
    applied = list(applied)
    unpatched(root, distribution, applied)
    for diff in applied:
        apply(root, diff)
    return root
