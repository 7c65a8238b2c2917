"""Sources of both formats are merged in one pass into either, bit for bit as if they had been converted before."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import checkpoints
import kills
import numpy as np
import pytest
import torch
from kills import after_bytes, at_step
from model.families.spelled import PLAIN, SPELLINGS, draw, same, write
from processes import TESTS, launch
from test_merge_faults import together
from tiers import tiered

from megatron_bai.checkpoint.boxes import box_slices
from megatron_bai.checkpoint.formats import checkpoint_format, open_checkpoint, require_model
from megatron_bai.checkpoint.reader import ScratchBuffers
from megatron_bai.config import Merge
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.execution import executor, journal
from megatron_bai.merge.recipe.output_spec import make_output_spec
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader
from megatron_bai.model.architecture import differences, read_architecture

FAMILIES = ("qwen3_moe", "qwen3_moe_dense_mix", "qwen3_moe_tied_yarn", "glm4_moe")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_box_of_a_translated_checkpoint_is_what_it_would_be_converted(
    name: str, spelling: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "source", name, 1, spelling, checkpoints.rows)
    model = read_architecture(path)
    to = "megatron" if SPELLINGS[spelling][0] == "hf" else "hf"
    wanted = SPELLINGS[PLAIN[to]][1](draw(model, 1), model)
    random = np.random.default_rng(0)
    with open_checkpoint(path) as source:
        reader = TranslatedReader(source, to, ScratchBuffers())
        assert {key: entry.shape for key, entry in reader.tensors.items()} == {
            key: tuple(value.shape) for key, value in wanted.items()
        }
        for key, value in wanted.items():
            assert reader.tensors[key].dtype == value.dtype and reader.tensors[key].is_covered()
            assert torch.equal(reader.read(key, (0,) * value.dim(), tuple(value.shape)), value), key
            for _ in range(4):
                low = tuple(int(random.integers(0, size)) for size in value.shape)
                sizes = tuple(int(random.integers(1, size - at + 1)) for at, size in zip(low, value.shape, strict=True))
                box = value[box_slices((low, sizes), (0,) * value.dim())]
                assert torch.equal(reader.read(key, low, sizes), box), (key, low, sizes)


METHODS: dict[str, dict] = {
    "bai": {"weights": [0.25, 0.75], "alpha": 0.4},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.5},
    "dare_ties": {"drop_rate": 0.5, "seed": 3},
    "average": {},
}
# the spellings of the base and the members
MIXED = {
    "a published base": ("published", "singly", "by layer"),
    "a stacked base": ("stacked", "published", "fused"),
    "all but the output": ("published", "fused", "published"),
    "all but the output, of Megatron's": ("by layer", "stacked", "singly"),
}


def settings(paths: list[Path], method: str, **changes) -> Merge:
    base, *members = map(str, paths)
    first = Merge(method=method, pretrained=base, members=members, verify="all", **METHODS[method])
    return dataclasses.replace(first, **changes)


CASES = [(mixed, method, output) for mixed in MIXED for method in METHODS for output in PLAIN]
# Each mixture and each method into both formats.
QUICK = {case for i, case in enumerate(CASES) if (i // 2 + i // 12) % 3 == 0}


@pytest.mark.parametrize("case", tiered(CASES, QUICK), ids=", ".join)
def test_a_merge_of_both_formats_has_the_bits_of_one_of_converted_sources(
    case: tuple[str, str, str], tmp_path: Path
) -> None:
    mixed, method, output = case
    name = "qwen3_moe_dense_mix" if mixed == "a published base" else "qwen3_moe"
    paths = [write(tmp_path / str(i), name, i, spelling) for i, spelling in enumerate(MIXED[mixed])]
    spelled = MIXED[mixed][0] if SPELLINGS[MIXED[mixed][0]][0] == output else PLAIN[output]  # the base's keys stay
    alike = [write(tmp_path / f"alike {i}", name, i, spelled if i == 0 else PLAIN[output]) for i in range(3)]
    ranks = RankGroup()
    out = tmp_path / "out"
    line = pipeline.run_merge(settings(paths, method, format=output, output=str(out)), ranks)
    pipeline.run_merge(settings(alike, method, output=str(tmp_path / "wanted")), ranks)
    assert "merged " in line and checkpoint_format(out) == output
    same(checkpoints.read(out), checkpoints.read(tmp_path / "wanted"))
    said = checkpoints.provenance(out)
    assert said["format"] == output
    formats = {Path(each["path"]).name: each["format"] for each in said["sources"]}
    assert formats == {str(i): SPELLINGS[spelling][0] for i, spelling in enumerate(MIXED[mixed]) if str(i) in formats}
    again = pipeline.run_merge(settings(paths, method, format=output, output=str(out)), ranks)
    assert again.startswith("nothing to do")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("output", PLAIN)
def test_the_files_beside_the_weights_are_those_of_the_outputs_format(name: str, output: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", name, 0, PLAIN["hf" if output == "megatron" else "megatron"])
    (source / "README.md").write_text("of the base")
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    pipeline.run_merge(Merge(method="average", members=[str(source)], format=output, output=str(out)), RankGroup())
    model = read_architecture(source)
    assert differences(read_architecture(out), model) == {} and (out / "tokenizer.json").is_file()
    if output == "hf":
        assert "Merged from" in (out / "README.md").read_text() and not (out / "common.pt").exists()
        said = checkpoints.provenance(out)["sources"][0]["dropped"]
        assert said == {"objects are not translated": ["decoder.layers.0._extra_state/shard_0_1"]}
    else:
        assert not (out / "README.md").exists()
        state = torch.load(out / "common.pt", weights_only=False)
        assert state["args"].num_layers == model.num_layers and state["checkpoint_version"] == 3.0


def test_the_plan_says_what_is_translated_and_a_pattern_names_the_outputs_tensors(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), "qwen3_moe", i, spelling) for i, spelling in enumerate(("published", "stacked"))]
    base = {"weights": [1.0], "alpha": 0.5, "output": str(tmp_path / "out")}
    plain = dataclasses.replace(settings(paths, "bai"), **base)
    text = pipeline.run_merge(dataclasses.replace(plain, dry_run=True), RankGroup())
    assert f"read under other names or shapes: {paths[1]}" in text and str(paths[0]) not in text.split("other names")[1]
    for pattern, output in (("linear_qkv", "megatron"), ("q_proj", "hf")):
        other = {"megatron": "hf", "hf": "megatron"}[output]
        chosen = dataclasses.replace(plain, alpha_for={pattern: 0.1}, dry_run=True)
        pipeline.run_merge(dataclasses.replace(chosen, format=output), RankGroup())
        with pytest.raises(UserError, match=f"'{pattern}' of merge.alpha_for fits no tensor"):
            pipeline.run_merge(dataclasses.replace(chosen, format=other), RankGroup())


def test_experts_that_are_published_transposed_are_brought_into_one_format_first(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), "gpt_oss", i, spelling) for i, spelling in enumerate(("published", "by layer"))]
    merge = dataclasses.replace(settings(paths, "bai"), weights=[1.0], output=str(tmp_path / "out"))
    for output in PLAIN:
        with pytest.raises(UserError, match="gpt_oss is not made of whole rows .*: bring the sources into one format"):
            pipeline.run_merge(dataclasses.replace(merge, format=output), RankGroup())


def test_what_cannot_be_translated_is_named(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), "qwen3_moe", i, spelling) for i, spelling in enumerate(("published", "stacked"))]
    merge = dataclasses.replace(settings(paths, "bai"), weights=[1.0], output=str(tmp_path / "out"))
    described = json.loads((paths[1] / "config.json").read_text())
    (paths[1] / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"number of layers|lacks|holds"):
        pipeline.run_merge(merge, RankGroup())
    (paths[1] / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        pipeline.run_merge(merge, RankGroup())


UNIT_BYTES = 1 << 13


def merge_in_small_units(merge: Merge, die_after: int | None, threads: int = 1) -> list[str]:
    """Merge in small units; on request die with SIGKILL after some of them."""
    written: list[str] = []
    write_unit = executor._write_unit

    def counted(plan, unit, *rest):
        if len(written) == die_after:
            kills.die()
        written.append(unit.name)
        return write_unit(plan, unit, *rest)

    executor._write_unit = counted
    try:
        jobs = pipeline.make_jobs(merge)
        with ExitStack() as stack:
            plan = pipeline.open_and_plan(
                jobs, stack, RankGroup(), unit_bytes=UNIT_BYTES, output_spec=make_output_spec(merge)
            )
            pipeline.execute_jobs(plan, jobs, RankGroup(), "all", threads)
    finally:
        executor._write_unit = write_unit
    return written


@pytest.mark.parametrize("output", PLAIN)
def test_killed_it_goes_on_and_ends_the_same(output: str, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / str(i), "qwen3_moe", i, spelling, checkpoints.experts)
        for i, spelling in enumerate(MIXED["a stacked base"])
    ]
    merge = settings(paths, "ties", format=output, output=str(tmp_path / "out"))
    whole = dataclasses.replace(merge, output=str(tmp_path / "whole"))
    units = merge_in_small_units(whole, None, threads=3)
    assert kills.in_child(merge_in_small_units, merge, 5) == -signal.SIGKILL
    assert len(units) > 10
    assert len(merge_in_small_units(merge, None)) - len(units) in (-5, -4), "the last was flushed or not"
    same(checkpoints.read(tmp_path / "out"), checkpoints.read(tmp_path / "whole"))


DEATHS: dict[str, Callable] = {
    "at a step": functools.partial(at_step, 31),
    "in an item": functools.partial(after_bytes, 9000),
}
KILLS = [(output, death) for output in PLAIN for death in DEATHS]


@pytest.mark.parametrize("case", tiered(KILLS, KILLS[1:3]), ids=", ".join)
def test_two_ranks_write_what_one_does_also_after_a_kill(case: tuple[str, str], tmp_path: Path) -> None:
    output, death = case
    paths = [write(tmp_path / str(i), "mixtral", i, spelling) for i, spelling in enumerate(MIXED["a stacked base"])]
    alone, both = (settings(paths, "ties", format=output, output=str(tmp_path / out)) for out in ("alone", "both"))
    merge_in_small_units(alone, None)
    codes = together(both, 2, tmp_path / "store", DEATHS[death], UNIT_BYTES)
    assert codes[0] == -signal.SIGKILL
    with pytest.raises(UserError, match="no checkpoint at"):
        require_model(both.output)
    assert (tmp_path / ".both.unfinished" / journal.DIRECTORY).is_dir()
    assert together(both, 2, tmp_path / "store", unit_bytes=UNIT_BYTES) == [0, 0]
    same(checkpoints.read(tmp_path / "both"), checkpoints.read(tmp_path / "alone"))
    with open_checkpoint(tmp_path / "both") as one, open_checkpoint(tmp_path / "alone") as other:
        assert {key: one.read_object(key) for key in one.objects} == {k: other.read_object(k) for k in other.objects}
    assert checkpoints.provenance(tmp_path / "both")["tensors"] == checkpoints.provenance(tmp_path / "alone")["tensors"]


# What ranks of the command do here: small units, each named in a file; where `stop` is there the fifth does not end.
STOPPING = """
import functools, os, pathlib, time
if "RANK" in os.environ:
    from megatron_bai.merge import pipeline
    from megatron_bai.merge.execution import executor
    pipeline.open_and_plan = functools.partial(pipeline.open_and_plan, unit_bytes=1 << 13)
    directory, rank = pathlib.Path(os.environ["STOPPING"]), os.environ["RANK"]
    write_unit, written = executor._write_unit, directory / f"written {rank}"
    def write(plan, unit, *rest):
        with open(written, "a") as file:
            print(unit.name, file=file)
        while (directory / "stop").exists() and len(written.read_text().split()) >= 5:
            (directory / "stopped").touch()
            time.sleep(0.01)
        return write_unit(plan, unit, *rest)
    executor._write_unit = write
"""


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("output", PLAIN)
def test_the_command_ends_at_sigterm_and_goes_on(output: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), "mixtral", i, spelling) for i, spelling in enumerate(MIXED["a stacked base"])]
    (tmp_path / "sitecustomize.py").write_text(STOPPING)
    (tmp_path / "stop").touch()
    units = merge_in_small_units(settings(paths, "bai", format=output, output=str(tmp_path / "alone")), None)
    words = [f"merge.pretrained={paths[0]}", f"merge.members=[{paths[1]},{paths[2]}]", f"merge.output={tmp_path}/both"]
    words += ["merge.weights=[0.25,0.75]", "merge.alpha=0.4", f"merge.format={output}"]
    command = [sys.executable, "-m", "megatron_bai", "torchrun", "--nproc-per-node", "2", "merge", *words]
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent)])
    environment = os.environ | {"PYTHONPATH": path, "STOPPING": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ran:
        deadline = time.monotonic() + 200
        while not (tmp_path / "stopped").exists() and ran.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        ran.send_signal(signal.SIGTERM)
        said = ran.communicate(timeout=120)[0]
    assert (tmp_path / "stopped").exists() and ran.returncode and "Traceback" not in said, said
    with pytest.raises(UserError, match="no checkpoint at"):
        require_model(tmp_path / "both")
    begun = [unit for rank in range(2) for unit in (tmp_path / f"written {rank}").read_text().split()]
    for name in ("stop", "written 0", "written 1"):
        (tmp_path / name).unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("merged ") == 1, done.stderr
    rest = [unit for rank in range(2) for unit in (tmp_path / f"written {rank}").read_text().split()]
    assert set(rest) | set(begun) == set(units) and len(rest) < len(units), "some were finished, and only those"
    same(checkpoints.read(tmp_path / "both"), checkpoints.read(tmp_path / "alone"))


@pytest.mark.distributed
def test_one_pass_is_convert_and_merge(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), "glm4_moe", i, "published") for i in range(2)]
    paths += [write(tmp_path / "2", "glm4_moe", 2, "singly"), write(tmp_path / "3", "qwen3_moe", 3, "published")]
    cases = {
        f"converted {i}": ["convert", f"convert.source={path}", f"convert.target={tmp_path}/converted_{i}", dtype]
        for i, path in enumerate(paths)
        if i != 2
        for dtype in ["backend.dtype=bfloat16"]
    }

    def merge(sources: list[Path], out: str, *more: str) -> list[str]:
        base, *members = sources
        chosen = ["merge.method=task_arithmetic", "merge.scale=0.5", f"merge.output={tmp_path}/{out}", *more]
        return ["merge", f"merge.pretrained={base}", f"merge.members=[{','.join(map(str, members))}]", *chosen]

    cases["alone"] = ["merge", "merge.method=average", f"merge.members=[{paths[3]}]", "merge.format=megatron"]
    cases["alone"].append(f"merge.output={tmp_path}/alone")
    cases["apart"] = merge([tmp_path / "converted_0", tmp_path / "converted_1", paths[2]], "apart")
    cases["at once"] = merge(paths[:3], "at_once", "merge.format=megatron")
    for out in ("apart", "at_once"):
        target = f"convert.target={tmp_path}/{out}_hf"
        cases[f"back {out}"] = ["convert", f"convert.source={tmp_path}/{out}", target, "backend.dtype=bfloat16"]
    launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(cases))
    codes = json.loads((tmp_path / "codes.json").read_text())
    said = {name: (tmp_path / f"{name}.err").read_text() for name in cases}
    assert not any(codes.values()), said
    same(checkpoints.read(tmp_path / "at_once"), checkpoints.read(tmp_path / "apart"))
    same(checkpoints.read(tmp_path / "at_once_hf"), checkpoints.read(tmp_path / "apart_hf"))
    same(checkpoints.read(tmp_path / "alone"), checkpoints.read(tmp_path / "converted_3"))
    for one, other in (("at_once", "converted_0"), ("alone", "converted_3")):
        with open_checkpoint(tmp_path / one) as merged, open_checkpoint(tmp_path / other) as converted:
            objects = [{name for name in each.objects if "common_state" not in name} for each in (merged, converted)]
            assert objects[0] == objects[1] != set()  # some releases of Megatron-Core have the common state among them
