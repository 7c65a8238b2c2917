"""What older heads left on disk (`make_head.py`) is read and gone on with, by the command line that made it.

A head's directory is `tests/data/head-COMMIT`; one that is added is tested by all that is here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_head import URL, answering
from processes import TESTS
from safetensors.numpy import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_bai.routing.store.route_store import RouteStore, StoreWriter

pytestmark = pytest.mark.distributed

HEADS = sorted((TESTS / "data").glob("head-*"))
NEVER = 1_000_000_000  # seconds: when files were changed that no one has changed since
TAKEN_UP = "taken-up"  # a file in what an interrupted merge left: it is gone if the merge begins anew
CHECKPOINTS = ("pretrained", "reasoning", "merged", "converted", "split", "critic", "run/checkpoints/step-00002")


@dataclass(frozen=True)
class Head:
    """An older head's directory, and a copy with which this head has gone on.

    Attributes:
        codes, said: of each case, its exit code and what it printed.
    """

    old: Path
    now: Path
    codes: dict[str, int]
    said: dict[str, str]


@pytest.fixture(scope="module", params=HEADS, ids=lambda path: path.name)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Every command of the head once more, where it stood, and what else its files are good for."""
    old, now, out = request.param, tmp_path_factory.mktemp("head") / "copy", tmp_path_factory.mktemp("said")
    shutil.copytree(old, now)
    for path in now.rglob("*"):
        os.utime(path, (NEVER, NEVER))
    for stage in now.glob(".*.unfinished"):
        (stage / TAKEN_UP).touch()
    commands = json.loads((old / "commands.json").read_text())
    unsaved = [word for word in commands["finished"] if not word.startswith(("run.", "replay.", "objective."))]
    cases = {
        **{f"inspect {path}": ["inspect", f"inspect.path={path}"] for path in CHECKPOINTS},
        "inspect both": ["inspect", "inspect.path=merged", "inspect.other=pretrained"],
        "inspect stores": ["inspect", "inspect.path=run/routes", "inspect.other=finished/routes"],
        **{name: commands[name] for name in commands if name not in ("converted", "split")},
        "to hf": ["convert", "backend.kind=cpu", "convert.source=merged", "convert.target=to-hf"],
        "to megatron": [
            "convert", "backend.kind=cpu", "convert.source=split", "convert.to=megatron", "convert.target=back",
        ],
        "merge": [
            "merge", "merge.method=linear", "merge.pretrained=merged", "merge.members=[merged,back]",
            "merge.weights=[0.75,0.25]", "merge.output=of-all",
        ],
        "critic": [
            *unsaved, "run.dir=further", "init.checkpoint=converted", "objective=ppo", "replay.mode=r3",
            "objective.critic_checkpoint=critic",
        ],
        "report": ["report", "report.runs=[run,finished]", "report.output=both.html"],
    }  # fmt: skip
    with answering(now) as url:
        words = {name: [word.replace(URL, url) for word in case] for name, case in cases.items()}
        files = {name: name.replace("/", "-").replace(" ", "-") for name in words}
        _run(now, out, {files[name]: case for name, case in words.items()})
    codes = json.loads((out / "codes.json").read_text())
    said = {name: "".join((out / f"{files[name]}.{end}").read_text() for end in ("out", "err")) for name in files}
    yield Head(old, now, {name: codes[files[name]] for name in files}, said)


def _run(where: Path, out: Path, cases: dict[str, list[str]]) -> None:
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS / "e2e"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("again.py")), str(out), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """Of a checkpoint in either form, without the package."""
    if files := list(checkpoint.glob("*.safetensors")):
        return {key: value for file in files for key, value in load_file(file).items()}
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value.numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same(one: Path, other: Path, gap: float = 0.0) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours and ours.keys() == theirs.keys()
    for key in ours:
        assert np.abs(ours[key] - theirs[key]).max() <= gap * np.abs(theirs[key]).max(), key


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def unchanged(path: Path) -> bool:
    return path.stat().st_mtime == NEVER


def test_there_are_older_heads() -> None:
    assert HEADS


def test_every_command_ends_well(head: Head) -> None:
    assert not {name: head.said[name][-2000:] for name, code in head.codes.items() if code}


@pytest.mark.parametrize("path", CHECKPOINTS)
def test_checkpoints_are_whole(path: str, head: Head) -> None:
    said = head.said[f"inspect {path}"]
    if path == "split":
        assert "split has no checksums" in said
    else:
        assert f"{path}: every file is what was written" in said.replace(str(head.now) + "/", "")
    assert "float32" in said


def test_provenance_is_read(head: Head) -> None:
    said = head.said["inspect merged"]
    assert "by megatron_bai 0." in said and "bai: weights 1, alpha 0.5" in said
    assert "not the output of a merge" in head.said["inspect pretrained"]
    assert "tensors differ" in head.said["inspect both"]


@pytest.mark.parametrize("name", ["pretrained", "reasoning"])
def test_a_supervised_checkpoint_is_still_what_its_settings_make(name: str, head: Head) -> None:
    assert head.said[name] == f"{name} is complete: nothing to do\n" and unchanged(head.now / name / "manifest.json")


def test_a_merge_is_still_what_its_settings_make(head: Head) -> None:
    assert head.said["merged"].startswith("nothing to do, the output holds this merge: ")
    assert unchanged(head.now / "merged" / "manifest.json")


@pytest.mark.parametrize("name", ["again", "again-hf"])
def test_an_interrupted_merge_goes_on(name: str, head: Head) -> None:
    """Where it stopped, with what was written of it."""
    assert head.said[name].startswith("merged ") and not (head.now / f".{name}.unfinished").exists()
    assert (head.now / name / TAKEN_UP).exists()
    if name == "again":
        assert_same(head.now / name, head.old / "merged")
        assert unchanged(head.now / name / "__0_0.distcp")
    else:  # whose headers are written again
        assert_same(head.now / name, head.old / f".{name}.unfinished")


def test_checkpoints_are_converted(head: Head) -> None:
    assert_same(head.now / "to-hf", head.old / "converted")
    assert_same(head.now / "back", head.old / "pretrained")


def test_checkpoints_are_merged(head: Head) -> None:
    """Three quarters of merged, and one of pretrained, which came from Hugging Face's form."""
    merged, pretrained, found = (tensors(head.now / name) for name in ("merged", "pretrained", "of-all"))
    assert found.keys() == merged.keys()
    for key in found:
        assert np.allclose(found[key], 0.75 * merged[key] + 0.25 * pretrained[key], rtol=1e-6, atol=1e-7), key


def test_the_unfinished_run_goes_on_to_its_end(head: Head) -> None:
    assert "step-00002, after step 2" in head.said["run"] and "another layout" not in head.said["run"]
    former, now = metrics(head.old / "run"), metrics(head.now / "run")
    assert [step["step"] for step in former] == [1, 2] and [step["step"] for step in now] == [1, 2, 3, 4]
    assert now[:2] == former
    assert all(step["route_coverage"] == 1.0 and step["grad_norm"] > 0 for step in now)
    assert not former[1].keys() - now[3].keys(), "metrics of an older head that this one does not have"
    summary = json.loads((head.now / "run" / "summary.json").read_text())
    assert summary["complete"] and summary["resumed"] == [2] and len(summary["steps"]) == 4
    assert (head.now / "run" / "result" / "manifest.json").is_file()


def test_its_waiting_samples_were_gone_on_with(head: Head) -> None:
    """Those of the third step were begun before the run was killed, with older weights."""
    third = metrics(head.now / "run")[2]
    assert third["stale_fraction"] > 0 and third["version_age_max"] >= 1


def test_a_store_of_routes_is_read_and_appended_to(head: Head, tmp_path: Path) -> None:
    with RouteStore(head.old / "run" / "routes") as old, RouteStore(head.now / "run" / "routes") as now:
        assert not old.damage and not now.damage
        kept = [(entry.step, entry.sample, entry.source, old.envelope(entry)) for entry in old.entries]
        found = [(entry.step, entry.sample, entry.source, now.envelope(entry)) for entry in now.entries]
        before = [each for each in kept if each[0] < 2]  # of steps that the checkpoint has
        assert before and before == [each for each in found if each[0] < 2]
        assert {each[0] for each in found} == {0, 1, 2, 3}
        for entry in now.entries:
            assert now.read_record(entry).valid.all()
    for run in ("run", "finished"):
        shutil.copytree(head.old / run / "routes", tmp_path / run)
        with StoreWriter(tmp_path / run, "replica-00000") as writer:
            count, last = len(writer.entries), writer.entries[-1]
            assert not writer.num_bytes_cut
            with RouteStore(tmp_path / run) as store:
                writer.append(last.step + 1, 0, last.source, store.envelope(last))
        with RouteStore(tmp_path / run) as store:
            assert len(store.entries) == count + 1
            assert np.array_equal(store.read_record(store.entries[-1]).ids, store.read_record(last).ids)


def test_stores_are_compared(head: Head) -> None:
    assert "run/routes" in head.said["inspect stores"] and "finished/routes" in head.said["inspect stores"]


def test_a_finished_run_is_done(head: Head) -> None:
    assert head.said["finished"].endswith("finished is complete: nothing to do\n")
    assert unchanged(head.now / "finished" / "metrics.jsonl") and unchanged(head.now / "critic" / "manifest.json")


def test_checkpoints_are_trained_from(head: Head) -> None:
    """The actor from the form of Hugging Face, and the critic."""
    (step,) = metrics(head.now / "further")
    assert step["grad_norm"] > 0 and step["critic_grad_norm"] > 0 and step["route_coverage"] == 1.0


def test_runs_are_reported(head: Head) -> None:
    assert "wrote both.html" in head.said["report"] and (head.now / "both.html").stat().st_size > 10_000
