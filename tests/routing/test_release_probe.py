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
    "a model of one MoE layer is built with its optimizer, and its router bound",
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
    said = r"megatron-core 0\.99\.1 is none of .*0\.19\.2\): install one of them"
    with pytest.raises(UserError, match=rf"{said}$"):
        backend.init_backend(Backend(kind="cpu"))
    with pytest.raises(UserError, match=rf"{said}, or set backend\.untested=true"):
        release_admission.require_known_release(Backend(), "cuda")


def test_without_any_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed_megatron", lambda: None)
    for untested in (False, True):
        with pytest.raises(UserError, match=r"megatron-core is not installed: install megatron-core==0\.16\.1"):
            backend.init_backend(Backend(kind="cpu", untested=untested))


def test_on_a_cpu_it_is_refused_by_the_fix_that_does_not_name_it(unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its probe is started, which would end by the same."""
    started = answers(monkeypatch, "")
    monkeypatch.setattr("megatron_bai.compat.patch.installed_megatron", lambda: unknown)
    for name in ("prepare_kernel_packages", "admit_untested"):  # which change this process
        monkeypatch.setattr(backend, name, lambda *_: False)
    with pytest.raises(UserError, match=r"patch megatron_cpu is written for .*, but 0\.99\.1 is installed: install"):
        backend.init_backend(Backend(kind="cpu", untested=True))
    assert not started


@pytest.mark.parametrize(
    ("has_rollouts", "said"),
    [(True, "Its rows are compared with a server's next"), (False, "Its rows were not compared with a server's")],
)
def test_what_passes_is_admitted_and_said(
    has_rollouts: bool, said: str, unknown: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    started = answers(monkeypatch, "noise\n" + json.dumps({"verified": CLAIMS}) + "\n")
    with pytest.raises(UserError, match=r"0\.99\.1 is installed"):
        preflight.check_version()
    with caplog.at_level(logging.WARNING):
        release_admission.admit_release(Backend(kind="cpu", untested=True), has_rollouts)
    assert all(claim in caplog.text for claim in CLAIMS) and "0.99.1 was not tried" in caplog.text
    assert said in caplog.text and releases.admitted_megatron() == ("0.99.1",)
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
        release_admission.admit_release(Backend(untested=True), True)
    assert not releases.is_admitted(unknown) and not releases.admitted_megatron()


def test_a_probe_that_does_not_end_is_refused(unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(release_admission.subprocess, "run", run)
    with pytest.raises(
        UserError, match=r"megatron-core 0\.99\.1 fails the probe .*: it did not end within 600 s; install"
    ):
        release_admission.admit_release(Backend(untested=True), False)


def test_a_release_of_the_table_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    started = answers(monkeypatch, "")
    release_admission.require_known_release(Backend(), "cuda")
    release_admission.admit_release(Backend(untested=True), True)
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
        ("records_otherwise", f"{CLAIMS[1]}: recording changes the output"),
        ("stops_gradients", f"{CLAIMS[1]}: the router has no gradient"),
        ("has_no_replay", f"{CLAIMS[0]}: RuntimeError: the router of layer 0 has no replay handle"),
        ("cannot_be_built", f"{CLAIMS[0]}: TypeError: unexpected keyword argument 'vp_stage'"),
    ],
)
def test_the_probe_tells_a_fault_from_health(fault: str, said: str, found: Path) -> None:
    answer = json.loads((found / f"{fault}.json").read_text().splitlines()[-1])
    assert answer.keys() == {"failed" if said else "verified"}
    assert answer.get("failed", "").startswith(said) and answer.get("verified", CLAIMS) == CLAIMS
