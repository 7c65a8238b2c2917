"""`init`: what a run starts from, and a merge that is done at its start."""

import dataclasses
import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from initial_worker import SOURCES, STARTS, settings_of
from kills import after_bytes, at_step, in_child
from processes import launch
from safetensors.torch import load_file

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.cli import merge as merge_verb
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.execution import journal
from megatron_bai.merge.recipe.output_spec import OutputSpec
from megatron_bai.merge.recipe.plan import make_plan
from megatron_bai.rl import init_weights
from megatron_bai.rl.sft_fingerprint import sft_fingerprint
from megatron_bai.utils import terminal_logging


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `initial_worker.py` leaves."""
    directory = tmp_path_factory.mktemp("initial")
    launch(Path(__file__).with_name("initial_worker.py"), directory)
    return directory


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(checkpoint) as source:
        entries = source.tensors.items()
        return {key: source.read(key, (0,) * len(entry.shape), entry.shape).clone() for key, entry in entries}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.distributed
@pytest.mark.parametrize(("form", "world"), STARTS)
def test_merged_on_the_fly_the_actor_has_the_very_weights_of_merge_and_checkpoint(
    started: Path, form: str, world: int
) -> None:
    verb = started / form / ("merged" if form == "hf" else "loaded")
    weights = (verb, started / form / str(world) / "hf", started / "hf" / SOURCES[0])
    expected, found, pretrained = (load_file(path / "model.safetensors") for path in weights)
    assert equal(found, expected) and not torch.equal(found["lm_head.weight"], pretrained["lm_head.weight"])


@pytest.mark.distributed
def test_the_routing_that_a_merge_keeps_is_measured_alike_in_every_layout_and_by_inspect(started: Path) -> None:
    """Layers' shares are tested in `test_merge_routing.py`; that the merge's weights are back afterwards is, above."""
    files = [started / form / str(world) / "routing.json" for form, world in STARTS]
    first, *others = (json.loads(file.read_text()) for file in files)
    kept = [first[f"merge_routes_kept/{i}"] for i in range(len(SOURCES))]
    assert all(0 < share < 1 and share < first[f"merge_routes_overlap/{i}"] for i, share in enumerate(kept))
    assert all(found == pytest.approx(first) for found in others)
    words = [f"inspect.path={started / 'megatron' / 'merged'}", "inspect.routing=true", "backend.kind=cpu"]
    command = [sys.executable, "-m", "megatron_bai", "inspect", *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert [float(x) / 100 for x in re.findall(r"[:;] \w+ ([\d.]+)%", shown)] == pytest.approx(kept, abs=6e-4)


def merging(started: Path, target: Path, **changes: Any) -> config.Config:
    """A run that starts from a merge into `target`."""
    settings = settings_of(started / "megatron", config.MergeInit(), target)
    settings.merge = dataclasses.replace(settings.merge, **changes)
    return settings


def state(directory: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in directory.iterdir()}
    return {name: (each[stat.ST_INO], each.st_mtime_ns) for name, each in found.items()}


@pytest.mark.distributed
def test_what_is_merged_is_not_merged_again(started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal_logging.setup()
    settings = merging(started, tmp_path / "actor")
    init_weights.run_init_merge(settings)
    before = state(tmp_path / "actor")
    assert capsys.readouterr().out.startswith("[rank 0] merged")
    init_weights.run_init_merge(settings)
    assert state(tmp_path / "actor") == before and "nothing to do" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alpha": 0.25}, "with merge.alpha 0.3 instead of 0.25"),
        ({"weights": [0.5, 0.5]}, r"with merge.weights \[0.25, 0.75\] instead of \[0.5, 0.5\]"),
        ({"method": "linear", "alpha": None, "pretrained": ""}, "with merge.method bai instead of linear"),
        ({"dtype": "bfloat16"}, "of sources that have changed since, or in another form"),
    ],
)
def test_another_merge_in_its_place_is_refused_and_kept(
    started: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    init_weights.run_init_merge(merging(started, tmp_path / "actor"))
    before = state(tmp_path / "actor")
    with pytest.raises(UserError, match=f"merge.output {tmp_path}/actor holds another merge, {named}: remove it"):
        init_weights.run_init_merge(merging(started, tmp_path / "actor", **changes))
    assert state(tmp_path / "actor") == before and [path.name for path in tmp_path.iterdir()] == ["actor"]
    merge_verb.run(merging(started, tmp_path / "actor", **changes))  # the verb replaces it
    init_weights.run_init_merge(merging(started, tmp_path / "actor", **changes))


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "at"), [(at_step, 60), (after_bytes, 250_000), (after_bytes, 500_000)])
def test_killed_in_the_middle_it_goes_on_and_ends_the_same(
    started: Path, tmp_path: Path, kind: Callable, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline, "make_plan", lambda recipes, sources, *_: make_plan(recipes, sources, 1 << 14, 1 << 16, OutputSpec())
    )
    settings, actor = merging(started, tmp_path / "actor"), tmp_path / "actor"
    assert in_child(kind, at, init_weights.run_init_merge, settings) == -signal.SIGKILL
    assert not actor.exists() and journal.finished_names(atomic_dir.staging_path(actor))
    stage = atomic_dir.staging_path(actor).stat().st_ino
    init_weights.run_init_merge(settings)
    assert actor.stat().st_ino == stage  # and not a new one
    assert equal(tensors(actor), tensors(started / "megatron" / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]


@pytest.mark.distributed
def test_what_could_not_be_loaded_is_refused_before_it_is_merged(started: Path, tmp_path: Path) -> None:
    settings = merging(started, tmp_path / "actor")
    settings.model = dataclasses.replace(settings.model, rope_theta=1e6)
    with pytest.raises(
        UserError, match=r"pretrained has rope_theta 5000.0, the configured model.rope_theta is 1000000.0"
    ):
        init_weights.run_init_merge(settings)
    with pytest.raises(UserError, match="no checkpoint at .*/nowhere"):
        init_weights.run_init_merge(merging(started, tmp_path / "actor", pretrained=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_supervised_checkpoint_is_known_by_the_recipe_it_started_from(started: Path, tmp_path: Path) -> None:
    def mark(**changes: Any) -> str:
        return sft_fingerprint(merging(started, tmp_path / "actor", **changes))

    assert mark() == mark(output=str(tmp_path / "elsewhere"), threads=1)
    others = [mark(alpha=0.4), mark(dtype="bfloat16"), mark(members=[str(started / "megatron" / SOURCES[1])] * 2)]
    assert len({mark(), *others}) == 4
    from_checkpoint = merging(started, tmp_path / "actor")
    from_checkpoint.init = config.CheckpointInit(checkpoint=str(started / "megatron" / "merged"))
    from_checkpoint.merge = config.Merge()
    assert sft_fingerprint(from_checkpoint) not in (mark(), *others)
