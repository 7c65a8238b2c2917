"""Locate the files of the project that are not Python: `conf/` and `launch/`.

In a checkout they are at its root, beside the package. A wheel carries them inside the package (`setup.py`).
"""

import tomllib
from functools import cache
from pathlib import Path

from megatron_bai.errors import UserError

_PROJECT = "megatron-bai"
_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """Return the directory of the Hydra configuration.

    Raises:
        UserError: there is none.
    """
    return _directory("conf")


def launch_dir() -> Path:
    """Return the directory of `torchrun.sh` and of the scripts for Slurm.

    Raises:
        UserError: there is none.
    """
    return _directory("launch")


@cache
def checkout() -> Path | None:
    """Return the root of the checkout that the package is imported from; None where the package is installed.

    Only the name in `pyproject.toml` tells: a `site-packages` may well have a `conf/` or a `pyproject.toml` of another.
    """
    root = _PACKAGE.parent
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError):  # ValueError: neither TOML nor UTF-8
        return None
    return root if project == _PROJECT else None


def _directory(name: str) -> Path:
    found = (checkout() or _PACKAGE) / name
    if not found.is_dir():
        raise UserError(f"{found} is missing: the installation is incomplete, install {_PROJECT} again")
    return found
