"""Where `conf/` and `launch/` are found: beside a checkout's own pyproject.toml, or inside an installed package."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bai import project_files
from megatron_bai.errors import UserError

OURS = '[project]\nname = "megatron-bai"\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package's directory with `conf/` in it and another `conf/` beside it."""
    place = tmp_path / "megatron_bai"
    (place / "conf").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    monkeypatch.setattr(project_files, "_PACKAGE", place)
    project_files.checkout.cache_clear()
    yield place
    project_files.checkout.cache_clear()


@pytest.mark.parametrize(
    "beside",
    [
        None,
        b'[project]\nname = "other"\n',
        b'[tool.poetry]\nname = "megatron-bai"\n',
        b'project = "megatron-bai"\n',
        b"[project\n",
        b"\xff",
    ],
)
def test_a_conf_that_is_not_ours_is_never_taken(package: Path, beside: bytes | None) -> None:
    if beside is not None:
        (package.parent / "pyproject.toml").write_bytes(beside)
    assert project_files.checkout() is None and project_files.conf_dir() == package / "conf"


def test_a_checkouts_own_is_taken(package: Path) -> None:
    (package.parent / "pyproject.toml").write_text(OURS)
    assert project_files.checkout() == package.parent and project_files.conf_dir() == package.parent / "conf"


@pytest.mark.parametrize("beside", ["", OURS])
def test_a_directory_that_is_missing_is_named(package: Path, beside: str) -> None:
    (package.parent / "pyproject.toml").write_text(beside)
    with pytest.raises(UserError, match=r"launch is missing: .* install megatron-bai again"):
        project_files.launch_dir()


def test_this_checkout_has_both() -> None:
    assert (project_files.conf_dir() / "config.yaml").is_file() and (
        project_files.launch_dir() / "torchrun.sh"
    ).is_file()
