"""A Megatron-Core that has no row in the table: refused by the setting's name, or probed, and what the probe finds."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import TESTS, launch

from megatron_bai.compat import releases
from megatron_bai.config import Backend
from megatron_bai.distributed import backend, release_admission
from megatron_bai.errors import UserError
from megatron_bai.routing.replay import preflight

CLAIMS = [
    "a model of one MoE layer is built and its router bound",
    "recorded routes, forced, change no bit",
    "other routes change output and gradient",
    "a checkpoint is saved and loaded bit for bit",
]


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(releases, "installed_megatron", lambda: "0.99.1")
    monkeypatch.setattr(releases, "_admitted", set())
    return "0.99.1"


def answers(monkeypatch: pytest.MonkeyPatch, out: str, err: str = "", code: int = 0) -> list[dict[str, Any]]:
    """Have the probe say something; returns the environments it was started in."""
    started = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
        started.append({"command": command[1:], "env": env})
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(release_admission.subprocess, "run", run)
    return started


def test_without_the_setting_it_is_refused_before_anything_and_named(unknown: str) -> None:
    with pytest.raises(UserError, match=r"megatron-core 0\.99\.1 is none of .*0\.19\.2\).*backend\.untested=true"):
        backend.init_backend(Backend(kind="cpu"))


def test_what_passes_is_admitted_and_said(unknown: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    started = answers(monkeypatch, "noise\n" + json.dumps({"verified": CLAIMS}) + "\n")
    with pytest.raises(UserError, match=r"0\.99\.1 is installed"):
        preflight.check_version()
    with caplog.at_level(logging.WARNING):
        release_admission.admit_release(Backend(kind="cpu", untested=True))
    assert all(claim in caplog.text for claim in CLAIMS) and "0.99.1 was not tried" in caplog.text
    preflight.check_version()
    *command, settings = started[0]["command"]
    assert command == ["-m", "megatron_bai.routing.release_probe"]
    assert Backend(**json.loads(settings)) == Backend(kind="cpu", untested=True)
    assert not {"RANK", "LOCAL_RANK"} & started[0]["env"].keys(), "a world of its own"


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        ('{"failed": "recorded routes: the output differs"}\n', "", "recorded routes: the output differs"),
        ("", "Traceback\nImportError: no GPTModel\n", "ended with code 1: ImportError: no GPTModel"),
        ("text\n", "", "ended with code 1: it said nothing"),
    ],
)
def test_what_fails_is_refused_by_name(
    out: str, err: str, said: str, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, out, err, code=1)
    with pytest.raises(UserError, match=rf"megatron-core 0\.99\.1 fails the probe of backend\.untested: .*{said}"):
        release_admission.admit_release(Backend(untested=True))
    assert not releases.is_admitted(unknown)


def test_a_release_of_the_table_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    started = answers(monkeypatch, "")
    release_admission.require_known_release(Backend())
    release_admission.admit_release(Backend(untested=True))
    assert not started


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("probe")
    launch(TESTS / "routing" / "release_probe_worker.py", directory)
    return directory


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("healthy", ""),
        ("ignores_forced_routes", f"{CLAIMS[2]}: RuntimeError: the router of layer 0 bypassed replay in 32 rows"),
        ("weighs_forced_routes_otherwise", f"{CLAIMS[1]}: the output differs from the live one"),
        ("loads_other_weights", f"{CLAIMS[3]}: the weights loaded are not those saved"),
        ("cannot_be_built", f"{CLAIMS[0]}: TypeError: unexpected keyword argument 'vp_stage'"),
    ],
)
def test_the_probe_tells_a_fault_from_health(fault: str, said: str, found: Path) -> None:
    answer = json.loads((found / f"{fault}.json").read_text().splitlines()[-1])
    assert answer == ({"failed": said} if said else {"verified": CLAIMS})
