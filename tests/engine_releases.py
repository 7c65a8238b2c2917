"""Releases of the engines that are not the installed ones: each from its lock in a directory of its own, which stands
first on PYTHONPATH. Their dependencies are those of what is installed, unless their lock names others.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.version import Version

from megatron_bai.compat.releases import MEGATRON_CORE, SGLANG, TAKEN

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / ".venv" / "releases"  # `make clean` removes it
# Megatron-Core after the default has wheels for Python 3.12 and later alone. All of it that is used here is Python.
NEWER_PYTHON = ["--ignore-requires-python", "--python-version", "3.12", "--only-binary=:all:"]
NEWER_PYTHON += ["--platform", "manylinux_2_28_x86_64", "--platform", "any"]


def locked(distribution: str, lock: str = "cpu.lock") -> str:
    """The release of a distribution that a lock names."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    (release,) = (line.partition("==")[2] for line in lines if line.startswith(f"{distribution}=="))
    return release


TRANSFORMERS = locked("transformers")
# Every release of an engine that a run may have. torch is none: that of Python 3.12's lock is taken with its engines.
TABLE = {name: releases for name, releases in TAKEN.items() if name != "torch"}
TABLE["transformers"] = (TRANSFORMERS, *TABLE["transformers"])


@dataclass(frozen=True)
class Engines:
    """A release of each engine; the defaults are what the package installs."""

    megatron_core: str = MEGATRON_CORE
    sglang: str = SGLANG
    transformers: str = TRANSFORMERS

    @property
    def releases(self) -> dict[str, str]:
        """The release of each distribution."""
        return {name.replace("_", "-"): release for name, release in asdict(self).items()}

    @property
    def others(self) -> dict[str, str]:
        """Those that are not the installed ones."""
        return dict(self.releases.items() - DEFAULT.releases.items())


DEFAULT = Engines()


def install(distribution: str, release: str) -> Path:
    """Install a release from its lock, once.

    Returns:
        Its directory, for PYTHONPATH.

    Raises:
        RuntimeError: pip failed; its last words.
    """
    directory = DIRECTORY / f"{distribution}-{release}"
    if directory.exists():
        return directory
    lock = ROOT / "requirements" / f"{directory.name}.lock"
    newer = distribution == "megatron-core" and Version(release) > Version(MEGATRON_CORE)
    options = NEWER_PYTHON if newer and sys.version_info < (3, 12) else []
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=DIRECTORY) as unfinished:
        target = Path(unfinished) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", *options]
        done = subprocess.run([*command, "--target", target, "-r", lock], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{directory.name} cannot be installed: {done.stderr[-2000:]}")
        try:
            target.rename(directory)
        except OSError:  # another process was faster
            if not directory.exists():
                raise
    return directory


def environment(engines: Engines, notes: Path | None = None) -> dict[str, str]:
    """The environment of processes that take these releases, before all that is installed.

    Args:
        engines: the releases, which are installed where they are missing.
        notes: a file in which every process will note where it imported engines from, for `require_imported`.
    """
    path = [str(install(name, release)) for name, release in engines.others.items()]
    more = {"PYTHONDONTWRITEBYTECODE": ""}  # what one process compiled, the others need not
    if notes:
        notes.touch()
        path.append(str(ROOT / "tests" / "import_log"))
        more["ENGINE_IMPORTS"] = str(notes)
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


MODULES = {"megatron-core": "megatron.core", "sglang": "sglang", "transformers": "transformers"}


def require_imported(engines: Engines, notes: Path, needed: Iterable[str], copies: Path) -> dict[str, int]:
    """Compare where processes imported engines from with where the wanted releases are.

    Args:
        engines: the releases that were wanted.
        notes: what the processes noted.
        needed: distributions that at least one of them must have imported.
        copies: a directory in which tests put changed copies of what they found on their path.

    Returns:
        The number of imports, by distribution.

    Raises:
        RuntimeError: another release was imported, or a needed one was not.
    """
    imports = [line.split("\t") for line in notes.read_text().splitlines()]
    counts = {}
    for distribution, release in engines.releases.items():
        installed = DIRECTORY / f"{distribution}-{release}" if distribution in engines.others else _site_packages()
        if (found := _release_in(installed, distribution)) != release:
            raise RuntimeError(f"{distribution} {release} was wanted, and {installed} has {found}")
        files = [Path(file).resolve() for module, file in imports if module == MODULES[distribution]]
        wrong = {str(file) for file in files if not _is_below(file, installed) and not _is_below(file, copies)}
        if wrong:
            raise RuntimeError(f"{distribution} {release} was wanted, and {', '.join(sorted(wrong))} was imported")
        counts[distribution] = sum(_is_below(file, installed) for file in files)
        if not counts[distribution] and distribution in needed:
            raise RuntimeError(f"{distribution} {release} was wanted, and no process imported it")
    return counts


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _release_in(directory: Path, distribution: str) -> str:
    found = [each.version for each in metadata.distributions(name=distribution, path=[str(directory)])]
    return " and ".join(found) or "none"


def _is_below(file: Path, directory: Path) -> bool:
    return file.is_relative_to(directory.resolve())
