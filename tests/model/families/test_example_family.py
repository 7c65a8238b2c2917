"""docs/families.md: the family of examples/plugin is added as a package, and is transformers' model."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from model.families import published
from model.families.test_families import WORKER, Results, require_same_bits, require_same_function
from outside import EXAMPLES, install_example
from processes import TESTS, launch

from megatron_bai.errors import UserError
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.families import registry

NAME = "solar_open"
MODULE = EXAMPLES / "plugin" / "my_package" / f"{NAME}.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the package is installed, for this process and those that it starts."""
    site = install_example(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        registry.all_families.cache_clear()
        yield site
    registry.all_families.cache_clear()


@pytest.fixture(scope="module")
def results(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("family")
    published.make(NAME, directory / NAME / "published")
    launch(WORKER, directory, "one", NAME)
    return Results(directory)


def test_the_page_names_it_and_it_is_short() -> None:
    page = (TESTS.parent / "docs" / "families.md").read_text()
    (lines,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert lines in (EXAMPLES / "plugin" / "pyproject.toml").read_text()
    assert str(MODULE.relative_to(TESTS.parent)) in page
    assert len(MODULE.read_text().splitlines()) < 100


def test_without_the_package_it_is_refused_by_name(tmp_path: Path) -> None:
    registry.all_families.cache_clear()
    with pytest.raises(UserError, match="model_type is 'solar_open', supported are "):
        read_architecture(published.make(NAME, tmp_path / "published"))


@pytest.mark.distributed
def test_it_is_recognised_and_the_same_function(results: Results) -> None:
    assert read_architecture(results.directory / NAME / "published").family.name == NAME
    require_same_function(results, NAME, "one")


@pytest.mark.distributed
def test_what_is_imported_comes_back_bit_for_bit(results: Results) -> None:
    require_same_bits(results, NAME, "one")
