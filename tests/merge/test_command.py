"""The merge from settings to a sealed directory."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bai.checkpoint import manifest, torch_dist
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Merge
from megatron_bai.distributed.rank_group import RankGroup, merge_ranks
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.execution import bf16_kernel, executor, tiles
from megatron_bai.merge.execution.verify import verify_result
from megatron_bai.merge.recipe.output_spec import make_output_spec
from megatron_bai.merge.recipe.plan import WorkUnit
from megatron_bai.merge.recipe.regions import Fate


def run(settings: Merge, **changes) -> dict[str, torch.Tensor]:
    settings = dataclasses.replace(settings, **changes)
    merge_verb.run(Config(merge=settings))
    return checkpoints.read(Path(settings.output))


def in_child(function, *arguments) -> int:
    """The exit code of `function` in a forked process; negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def terms(settings: Merge) -> list[tuple[dict[str, torch.Tensor], float]]:
    coefficients = [settings.alpha, *((1 - settings.alpha) * w for w in settings.weights)]
    return [(checkpoints.read(Path(p)), c) for p, c in zip([settings.pretrained, *settings.members], coefficients)]


def test_bai_is_the_weighted_sum_rounded_once(three):
    merged = run(three)
    summands = terms(three)
    for key, value in merged.items():
        if key == "decoder.table":
            continue
        exact = checkpoints.exact(summands, key)
        assert value.dtype == summands[0][0][key].dtype
        half_ulp = torch.finfo(value.dtype).eps / 2
        assert (value.double() - exact).abs().le(exact.abs() * half_ulp * 1.0001 + 1e-8).all(), key


def test_fp32_is_the_nearest_too(tmp_path, three):
    for i, name in enumerate(("b", "m", "n")):
        checkpoints.write(tmp_path / name, checkpoints.model(i, torch.float32))
    paths = {"pretrained": str(tmp_path / "b"), "members": [str(tmp_path / "m"), str(tmp_path / "n")]}
    merged = run(three, **paths)
    summands = terms(dataclasses.replace(three, **paths))
    for key, value in merged.items():
        assert torch.equal(value, checkpoints.exact(summands, key).to(value.dtype)) or key == "decoder.table", key


def test_one_pass_and_two_agree_within_the_extra_rounding(three, tmp_path):
    one = run(three)
    # stage 1 alone: its first member plays the pretrained, α its weight; stage 2 with that as the only member
    stage1 = dict(pretrained=three.members[0], members=[three.members[1]], weights=[1.0], alpha=three.weights[0])
    run(three, **stage1, output=str(tmp_path / "sft"))
    two = run(three, members=[str(tmp_path / "sft")], weights=[1.0], output=str(tmp_path / "two"))
    differ = 0
    for key in one:
        if one[key].dtype != torch.bfloat16:
            continue
        a, b = one[key].double(), two[key].double()
        half_ulp = torch.finfo(torch.bfloat16).eps / 2
        between = checkpoints.read(tmp_path / "sft")[key].double().abs() * (1 - three.alpha)
        assert (a - b).abs().le((a.abs() + b.abs() + between) * half_ulp * 1.0001 + 1e-8).all(), key
        differ += int((a != b).sum())
    assert differ > 0, "the two passes round differently somewhere, or the test compares a thing with itself"


def test_the_layout_is_the_pretrained_ones(three):
    run(three)
    with TorchDistReader(three.output) as out, TorchDistReader(three.pretrained) as base:
        for key, entry in out.tensors.items():
            assert {(c.offsets, c.sizes) for c in entry.chunks} == {
                (c.offsets, c.sizes) for c in base.tensors[key].chunks
            }


def test_members_layouts_do_not_matter(three, tmp_path):
    expected = run(three)
    for i, layout in enumerate((checkpoints.irregular, checkpoints.rows, checkpoints.whole)):
        members = [str(checkpoints.write(tmp_path / f"{seed}-{i}", checkpoints.model(seed), layout)) for seed in (1, 2)]
        merged = run(three, members=members, output=str(tmp_path / f"out{i}"))
        assert all(torch.equal(merged[key], value) for key, value in expected.items())


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiles_do_not_matter(three, tmp_path, monkeypatch, tile):
    expected = run(three)
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(pipeline, "ITEM_BYTES", 64)
    merged = run(three, output=str(tmp_path / "tiled"))
    assert all(torch.equal(merged[key], value) for key, value in expected.items())


@pytest.mark.parametrize("at_once", [0, 1])
def test_what_the_compiled_stream_leaves_is_done_by_the_tile(three, tmp_path, monkeypatch, at_once):
    """Where its library does not offer its checksum there is no stream; elsewhere one may stop after each tile."""
    same = [checkpoints.write(tmp_path / f"{i}", checkpoints.model(i), checkpoints.experts) for i in (1, 2)]
    three = dataclasses.replace(three, members=[str(path) for path in same])
    run(three)
    monkeypatch.setattr(tiles, "TILE", 7)
    stream = bf16_kernel.stream
    few = lambda places, crcs, lengths, *rest: stream(places, crcs, np.minimum(lengths, 14), *rest)  # noqa: E731
    monkeypatch.setattr(bf16_kernel, "stream", few if at_once else None)
    run(three, output=str(tmp_path / "tiled"))
    assert content(tmp_path / "tiled") == content(Path(three.output))


def peer(rank: int, size: int, store: str, settings: Merge, unit_bytes: int = 512) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    jobs = pipeline.make_jobs(settings)
    with merge_ranks() as group, ExitStack() as stack:
        spec = make_output_spec(settings)
        work = pipeline.open_and_plan(jobs, stack, group, unit_bytes=unit_bytes, output_spec=spec)
        assert len(work.units) > 4 and executor.assign_to_rank(work.units, group), "every rank has something to do"
        pipeline.execute_jobs(work, jobs, group, "all")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(three, tmp_path, size):
    settings = {n: dataclasses.replace(three, output=str(tmp_path / f"out{n}")) for n in (1, size)}
    for n, each in settings.items():
        context = multiprocessing.get_context("fork")
        group = [context.Process(target=peer, args=(r, n, str(tmp_path / f"store{n}"), each)) for r in range(n)]
        for process in group:
            process.start()
        for process in group:
            process.join(60)
        assert [process.exitcode for process in group] == [0] * n
    one, many = (Path(each.output) for each in settings.values())
    files = sorted(p.name for p in one.glob("*.distcp"))
    assert len(files) > 4 and files == sorted(p.name for p in many.glob("*.distcp"))
    a, b = checkpoints.read(one), checkpoints.read(many)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert checkpoints.provenance(one)["tensors"] == checkpoints.provenance(many)["tensors"]


def test_ranks_share_the_units():
    units = tuple(WorkUnit(f"__{i}_0", (), (), nbytes) for i, nbytes in enumerate((5, 3, 9, 1, 1, 4)))
    for size in (1, 2, 3, 8):
        shares = [executor.assign_to_rank(units, RankGroup(rank, size)) for rank in range(size)]
        assert sorted(u.name for share in shares for u in share) == sorted(u.name for u in units)
    assert max(sum(u.nbytes for u in executor.assign_to_rank(units, RankGroup(rank, 2))) for rank in range(2)) <= 12


@pytest.mark.distributed
def test_torchrun_alone_is_enough(three, tmp_path):
    """No process group is needed before: `run` makes its own and takes it away."""
    expected = run(three)
    settings = dataclasses.replace(three, output=str(tmp_path / "together"))
    code = f"""
from megatron_bai.config import Config, Merge
from megatron_bai.cli.merge import run
import torch.distributed as dist
run(Config(merge={settings!r}))
assert not dist.is_initialized()
"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([*launch, sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("merged 9 tensors") == 1, "one line, from one rank"
    merged = checkpoints.read(tmp_path / "together")
    assert all(torch.equal(merged[key], value) for key, value in expected.items())


def peer_with_an_error(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for error in (UserError("a bad checkpoint"), OSError("a bug")):

        def work(error=error):
            if rank == 1:
                raise error

        try:
            RankGroup(rank, 2).run_on_all(work)
        except Exception as caught:
            results.put((rank, type(caught).__name__, str(caught)))
    dist.destroy_process_group()


def test_one_ranks_error_stops_all(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    group = [context.Process(target=peer_with_an_error, args=(r, str(tmp_path / "store"), results)) for r in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert sorted(results.get() for _ in range(4)) == [
        (0, "RuntimeError", "rank 1 failed: OSError('a bug')"),
        (0, "UserError", "a bad checkpoint"),
        (1, "OSError", "a bug"),
        (1, "UserError", "a bad checkpoint"),
    ]


def test_what_is_carried_dropped_and_noted(three):
    base = Path(three.pretrained)
    (base / "config.json").write_text("{}")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.txt").write_text("a b")
    (base / "provenance.json").write_text('{"of": "the pretrained"}')
    run(three)
    out = Path(three.output)
    assert (out / "config.json").read_text() == "{}" and (out / "tokenizer" / "vocab.txt").read_text() == "a b"
    assert torch.load(out / "common.pt") == {"iteration": 7}
    note = checkpoints.provenance(out)
    first, second, _ = note["sources"]
    assert first["coefficient"] == 0.6 and second["coefficient"] == pytest.approx(0.1)
    assert first["dropped"] == {"optimizer or random-number state": ["rng_state/shard_0_1"]}
    assert note["carried_objects"] == ["decoder.layers.0._extra_state/shard_0_1"]
    with TorchDistReader(out) as merged:
        blob = merged.objects["decoder.layers.0._extra_state/shard_0_1"]
        assert merged.files.read_bytes(blob.file, blob.start, blob.length) == checkpoints.saved("base")
        assert "rng_state/shard_0_1" not in merged.objects
    for key, value in checkpoints.read(out).items():
        if value.is_floating_point():
            assert note["tensors"][key]["norm"] == pytest.approx(float(value.double().norm()), rel=1e-2)
    assert note["tensors"]["decoder.table"] == {"dtype": "int64", "shape": [10], "fate": "equal"}


def test_optimizer_state_is_dropped_from_any_source(three, tmp_path):
    extra = {"optimizer.state.exp_avg.decoder.w": torch.ones(3), "chained_0.optimizer.state.exp_avg.w": torch.ones(2)}
    objects = {"rng_state/shard_0_1": checkpoints.saved(None)}
    member = checkpoints.write(tmp_path / "training", checkpoints.model(1) | extra, objects=objects)
    merged = run(three, members=[str(member), three.members[1]])
    assert not any("optimizer" in key for key in merged)
    dropped = checkpoints.provenance(Path(three.output))["sources"][1]["dropped"]
    assert dropped == {"optimizer or random-number state": [*extra, "rng_state/shard_0_1"]}


def test_the_info_of_the_pretrained_is_kept(three, tmp_path):
    stage = manifest.make_staging_dir(tmp_path / "sealed")
    for file in Path(three.pretrained).iterdir():
        (stage / file.name).write_bytes(file.read_bytes())
    manifest.finalize(stage, tmp_path / "sealed", {"step": 12})
    run(three, pretrained=str(tmp_path / "sealed"))
    assert manifest.require_info(three.output)["step"] == 12


def test_a_source_of_weight_zero_is_not_read(three):
    Path(three.members[0], "__0_0.distcp").write_bytes(bytes(Path(three.members[0], "__0_0.distcp").stat().st_size))
    merged = run(three, weights=[0.0, 1.0])
    exact = checkpoints.exact([(checkpoints.model(0), 0.6), (checkpoints.model(2), 0.4)], "decoder.scale")
    assert torch.equal(merged["decoder.scale"], exact.bfloat16())


def test_again_is_nothing_to_do(three, capsys):
    run(three)
    before = {p: p.stat().st_mtime_ns for p in Path(three.output).iterdir()}
    run(three)
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert before == {p: p.stat().st_mtime_ns for p in Path(three.output).iterdir()}


@pytest.mark.parametrize("change", ["alpha", "source", "damage", "carried file"])
def test_again_with_something_changed_merges(three, capsys, change):
    run(three)
    if change == "source":
        Path(three.members[0]).rename(three.members[0] + "-old")
        checkpoints.write(Path(three.members[0]), checkpoints.model(9), checkpoints.columns)
    elif change == "damage":
        os.truncate(Path(three.output, "__0_0.distcp"), 5)
    elif change == "carried file":
        Path(three.pretrained, "config.json").write_text("{}")
    settings = dataclasses.replace(three, alpha=0.5 if change == "alpha" else three.alpha)
    merged = run(settings)
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged 9 tensors")
    assert torch.equal(
        merged["decoder.final_layernorm.weight"],
        checkpoints.exact(terms(settings), "decoder.final_layernorm.weight").bfloat16(),
    )


def test_dry_run_writes_nothing(three, capsys):
    merge_verb.run(Config(merge=dataclasses.replace(three, dry_run=True)))
    text = capsys.readouterr().out
    assert "8 tensors merged, 1 must be equal" in text and f"0.6 × {three.pretrained}" in text
    assert "optimizer or random-number state: 1 entries such as rng_state/shard_0_1" in text
    assert not Path(three.output).exists() and not list(Path(three.output).parent.glob(".*"))


def test_groups_and_patterns_get_their_own_numbers(three, capsys):
    settings = dataclasses.replace(
        three, alpha_for={"router": 1.0, "final_layernorm": 0.0}, weights_for={"experts": [1.0, 0.0]}
    )
    merge_verb.run(Config(merge=dataclasses.replace(settings, dry_run=True)))
    assert "decoder.final_layernorm.weight: 0, 0.25, 0.75" in capsys.readouterr().out
    merged = run(settings)
    base, instruct, reasoning = (checkpoints.model(seed) for seed in range(3))
    assert torch.equal(merged["decoder.layers.mlp.router.weight"], base["decoder.layers.mlp.router.weight"])
    for key, coefficients in {
        "decoder.final_layernorm.weight": (0.0, 0.25, 0.75),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (0.6, 0.4, 0.0),
        "decoder.layers.self_attention.linear_qkv.weight": (0.6, 0.1, 0.3),
    }.items():
        exact = checkpoints.exact(list(zip((base, instruct, reasoning), coefficients)), key)
        assert (merged[key].double() - exact).abs().le(exact.abs() * 2**-8 * 1.0001 + 1e-8).all(), key
    note = checkpoints.provenance(Path(three.output))
    assert note["tensors"]["decoder.final_layernorm.weight"]["coefficients"] == [0.0, 0.25, 0.75]
    assert note["recipe"]["alpha_for"] == {"router": 1.0, "final_layernorm": 0.0}
    run(dataclasses.replace(settings, alpha_for={"router": 0.5, "final_layernorm": 0.0}))
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged"), "other numbers are another merge"


def test_a_pattern_that_fits_nothing_is_refused(three):
    refused(dataclasses.replace(three, alpha_for={"roter": 1.0}), "'roter' of merge.alpha_for fits no tensor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_for": {".": 0.9}}, "merge.alpha is given and never read, since merge.alpha_for fits every tensor"),
        ({"alpha_for": {"layers": 0.9, "^(?!.*layers)": 0.1}}, "merge.alpha is given and never read"),
        ({"weights_for": {"": [1.0, 0.0]}}, "merge.weights is given and never read"),
        ({"method": "ties", "alpha": None, "weights_for": {"": [1.0, 0.0]}}, "merge.weights is given and never read"),
        ({"method": "slerp", "alpha": None, "weights": [], "t": 0.5, "t_for": {"": 0.1}}, "merge.t is given and never"),
        ({"alpha": None, "sweep": [0.3], "alpha_for": {".": 0.9}}, "merge.sweep changes nothing: merge.alpha_for"),
        ({"alpha_for": {"experts": 0.9, "linear_fc1": 0.1}}, "'linear_fc1' of merge.alpha_for is never read"),
        ({"weights": [], "weights_for": {"experts": [1.0, 0.0]}}, "merge.weights is not given, and no pattern of"),
        ({"method": "slerp", "alpha": None, "weights": [], "t_for": {"experts": 0.1}}, "merge.t is not given, and no"),
    ],
)
def test_a_number_that_no_tensor_or_a_tensor_that_no_number_is_for_is_refused(three, changes, message):
    refused(dataclasses.replace(three, **changes), message)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"alpha": None, "alpha_for": {"": 0.6}}, {}),
        ({"weights": [], "weights_for": {"experts": [0.25, 0.75], "": [0.25, 0.75]}}, {}),
        (
            {"method": "slerp", "alpha": None, "weights": [], "t_for": {"": 0.3}},
            {"method": "slerp", "alpha": None, "weights": [], "t": 0.3},
        ),
    ],
)
def test_numbers_for_every_tensor_need_no_other(three, changes, same, tmp_path, capsys):
    merged = run(dataclasses.replace(three, **changes), output=str(tmp_path / "for"))
    other = run(dataclasses.replace(three, **same), output=str(tmp_path / "all"))
    assert all(torch.equal(merged[key], other[key]) for key in other)
    assert "None" not in capsys.readouterr().out


ALPHAS = [0.0, 0.1, 0.5, 1.0]


def test_a_sweep_writes_what_single_merges_write_and_reads_once(three, tmp_path, monkeypatch, capsys):
    base = checkpoints.model(0)
    base["decoder.layers.self_attention.linear_qkv.weight"][0] = -0.0  # which + 0 · value would lose
    three = dataclasses.replace(three, pretrained=str(checkpoints.write(tmp_path / "zeros", base)))
    singles = {alpha: run(three, alpha=alpha, output=str(tmp_path / f"single-{alpha}")) for alpha in ALPHAS}
    reads = Counter()

    def counted(read):
        def count(self, key, offsets, sizes):
            found = read(self, key, offsets, sizes)
            reads[self.path.name] += 0 if found is None else torch.Size(sizes).numel()
            return found

        return count

    monkeypatch.setattr(TorchDistReader, "read", counted(TorchDistReader.read))
    monkeypatch.setattr(TorchDistReader, "stream", counted(TorchDistReader.stream))
    merge_verb.run(Config(merge=dataclasses.replace(three, alpha=None, sweep=ALPHAS, verify="none")))
    monkeypatch.undo()
    assert "9 tensors, 7,730 bytes 4 times" in capsys.readouterr().out.splitlines()[-1]
    elements = sum(tensor.numel() for tensor in checkpoints.model(0).values())
    assert reads == {"zeros": elements + 10, "instruct": elements, "reasoning": elements}, "10: the table, to copy"
    for alpha, single in singles.items():
        path = Path(three.output, f"alpha-{alpha}")
        merged = checkpoints.read(path)
        for key, value in single.items():
            assert torch.equal(merged[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key
        assert checkpoints.provenance(path)["recipe"]["alpha"] == alpha and manifest.require_info(path)


def test_a_sweep_does_only_what_is_missing(three, capsys):
    merge_verb.run(Config(merge=dataclasses.replace(three, alpha=None, sweep=[0.1, 0.5])))
    done = Path(three.output, "alpha-0.1", "manifest.json").stat().st_mtime_ns
    merge_verb.run(Config(merge=dataclasses.replace(three, alpha=None, sweep=[0.1, 0.9])))
    assert Path(three.output, "alpha-0.1", "manifest.json").stat().st_mtime_ns == done
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged 9 tensors, 8,991 bytes in")
    assert sorted(p.name for p in Path(three.output).iterdir()) == ["alpha-0.1", "alpha-0.5", "alpha-0.9"]


def test_a_sweep_is_checked_before(three):
    refused(dataclasses.replace(three, alpha=None, sweep=[0.1, 1.5]), "alpha is 1.5")
    refused(dataclasses.replace(three, alpha=None, sweep=[0.1, 0.1]), "names a value twice")


# What is refused, by name; the target stays as it was.


def refused(settings: Merge, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(settings)
    assert not Path(settings.output).exists() and not list(Path(settings.output).parent.glob(".*.unfinished"))


def replaced(three: Merge, **tensors) -> Merge:
    """The settings with the second member's tensors changed; None takes one out."""
    found = checkpoints.model(2) | {key.replace("__", "."): value for key, value in tensors.items()}
    path = Path(three.members[1] + "-changed")
    checkpoints.write(path, {key: value for key, value in found.items() if value is not None}, checkpoints.rows)
    return dataclasses.replace(three, members=[three.members[0], str(path)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_named(three, value):
    weight = checkpoints.model(2)["decoder.layers.mlp.router.weight"]
    weight[1, 2, 5] = value
    settings = replaced(three, decoder__layers__mlp__router__weight=weight)
    refused(settings, r"reasoning-changed: decoder\.layers\.mlp\.router\.weight holds NaN or Inf at \(1, 2, 5\)")


def test_large_finite_values_are_no_nan(three):
    big = torch.full((2, 4), 3e38)
    merged = run(replaced(three, decoder__layers__mlp__router__expert_bias=big))
    assert merged["decoder.layers.mlp.router.expert_bias"].isfinite().all()


def test_a_sum_outside_the_dtype_is_refused(three):
    big = torch.full((2, 4), 3e38)
    settings = replaced(three, decoder__layers__mlp__router__expert_bias=big)
    refused(dataclasses.replace(settings, weights=[-9.0, 10.0]), "too large for torch.float32")


def test_shapes_are_named(three):
    refused(
        replaced(three, decoder__final_layernorm__weight=torch.ones(8).bfloat16()),
        r"differ in the shape of decoder\.final_layernorm\.weight \(\(16,\) and \(8,\)\)",
    )


def test_dtypes_are_named(three):
    refused(replaced(three, decoder__scale=torch.ones(())), r"differ in the dtype of decoder\.scale")


def test_missing_and_additional_tensors_are_named(three):
    refused(replaced(three, decoder__scale=None), r"reasoning-changed lacks decoder\.scale of ")
    other = dataclasses.replace(three, members=[three.members[0], three.members[1] + "2"])
    refused(replaced(other, mtp__w=torch.ones(2)), r"base lacks mtp\.w of ")


def test_integers_that_differ_are_named(three):
    settings = replaced(three, decoder__table=torch.arange(10).flip(0))
    refused(settings, r"differ in decoder\.table, which is torch\.int64")


def test_a_flipped_bit_in_a_source_is_named(three):
    file = Path(three.members[0], "__1_0.distcp")
    with TorchDistReader(three.members[0]) as source:
        entry = next(e for e in source.tensors.values() if e.chunks[0].file == file.name)
        record = source.locate_record(entry, entry.chunks[0])
    data = bytearray(file.read_bytes())
    data[record.start] ^= 4
    file.write_bytes(data)
    refused(three, f"instruct/{file.name}: the bytes of {entry.key}")


def test_a_missing_source_is_named(three):
    settings = dataclasses.replace(three, members=[three.members[0], three.members[1] + "x"])
    refused(settings, "no checkpoint at .*reasoningx")


def test_a_damaged_sealed_source_is_named(three, tmp_path):
    stage = manifest.make_staging_dir(tmp_path / "sealed")
    for file in Path(three.pretrained).iterdir():
        (stage / file.name).write_bytes(file.read_bytes())
    manifest.finalize(stage, tmp_path / "sealed", {})
    os.truncate(tmp_path / "sealed" / "common.pt", 3)
    refused(dataclasses.replace(three, pretrained=str(tmp_path / "sealed")), "common.pt has 3 bytes instead of")


def test_the_target_is_not_overwritten(three, tmp_path):
    for output in (three.pretrained, three.pretrained + "/merged", three.members[1]):
        with pytest.raises(UserError, match="is one of the sources"):
            run(three, output=output)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is no merge's output"):
        run(three, output=str(tmp_path / "work"))
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"


def test_a_full_disk_is_seen_before(three, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    refused(three, "has 100 bytes free, the merge needs")


def test_settings_are_named(three):
    with pytest.raises(UserError, match="merge.output is empty"):
        run(three, output="")
    refused(dataclasses.replace(three, verify="some"), "merge.verify is 'some'")
    refused(dataclasses.replace(three, memory_mib=16), "merge.memory_mib is 16: at least")


# Killed at any moment.


def killed_at(settings: Merge, moment: str) -> None:
    """Merge in a child that kills itself with SIGKILL when it reaches `moment`."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "first tile":
        tiles.merge_items = die
    elif moment == "index":
        torch_dist.write_index = die
    elif moment == "provenance":
        pipeline.write_provenance = die
    elif moment == "verify":
        pipeline.verify_result = die
    elif moment == "seal":
        manifest.finalize = die
    elif moment == "manifest":
        manifest.json.dumps = die
    elif moment == "rename":
        Path.rename = die
    merge_verb.run(Config(merge=settings))


@pytest.mark.parametrize("moment", ["first tile", "index", "provenance", "verify", "seal", "manifest", "rename"])
@pytest.mark.parametrize("before", ["nothing", "an earlier merge"])
def test_killed_the_target_is_never_half_written(three, moment, before):
    if before == "an earlier merge":
        earlier = run(three, alpha=0.25)
    assert in_child(killed_at, three, moment) == -signal.SIGKILL
    if before == "an earlier merge":
        if Path(three.output).exists():  # between the two renames of `seal` there is neither the old nor the new
            found = checkpoints.read(Path(three.output))
            assert manifest.read_info(three.output) and all(torch.equal(found[key], earlier[key]) for key in earlier)
        else:
            assert moment == "rename"
    else:
        assert not Path(three.output).exists()
        with pytest.raises(UserError):
            manifest.require_info(three.output)
    merged = run(three)
    summands = terms(three)
    assert torch.equal(
        merged["decoder.layers.mlp.router.expert_bias"],
        checkpoints.exact(summands, "decoder.layers.mlp.router.expert_bias").float(),
    )
    assert manifest.require_info(three.output) and not list(Path(three.output).parent.glob(".*"))


def merge_in_small_units(settings: Merge, die_after: int | None = None, counted: Path | None = None) -> None:
    """Merge in units of 512 bytes; on request die with SIGKILL after some units, and list the units written."""
    write_unit, units = executor._write_unit, []

    def write(plan, unit, *rest):
        if die_after == len(units):
            os.kill(os.getpid(), signal.SIGKILL)
        units.append(unit.name)
        return write_unit(plan, unit, *rest)

    executor._write_unit = write
    jobs = pipeline.make_jobs(settings)
    with ExitStack() as stack:
        pipeline.execute_jobs(
            pipeline.open_and_plan(jobs, stack, RankGroup(), unit_bytes=512), jobs, RankGroup(), "all"
        )
    if counted:
        counted.write_text(json.dumps(units))


def content(directory: Path) -> dict[str, bytes]:
    """Every file but the two that hold a time or a random number."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix in (".distcp", ".safetensors")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("sweep", [[], [0.1, 0.6]])
@pytest.mark.parametrize("die_after", [0, 1, 4])
def test_killed_it_goes_on_and_ends_the_same(three, tmp_path, die_after, sweep):
    three = dataclasses.replace(three, alpha=None, sweep=sweep)
    unbroken = dataclasses.replace(three, output=str(tmp_path / "unbroken"))
    assert in_child(merge_in_small_units, unbroken, None, tmp_path / "all") == 0
    assert in_child(merge_in_small_units, three, die_after) == -signal.SIGKILL
    assert in_child(merge_in_small_units, three, None, tmp_path / "rest") == 0
    units = [json.loads((tmp_path / name).read_text()) for name in ("all", "rest")]
    assert len(units[0]) > 5
    assert units[1] in (units[0][die_after:], units[0][max(die_after - 1, 0) :]), "the last was flushed or not"
    assert content(Path(three.output)) == content(Path(unbroken.output)) != {}
    for name in [f"alpha-{alpha}" for alpha in sweep] or [""]:
        ended, whole = (checkpoints.provenance(Path(path, name)) for path in (three.output, unbroken.output))
        assert ended["tensors"] == whole["tensors"]
        assert not Path(three.output, name, ".journal").exists()
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("change", ["alpha", "source", "unit"])
def test_killed_and_changed_it_begins_anew(three, tmp_path, change):
    assert in_child(merge_in_small_units, three, 3) == -signal.SIGKILL
    if change == "source":
        Path(three.members[0]).rename(three.members[0] + "-old")
        checkpoints.write(Path(three.members[0]), checkpoints.model(9), checkpoints.columns)
    settings = dataclasses.replace(three, alpha=0.5 if change == "alpha" else three.alpha)
    if change == "unit":
        run(settings)
    else:
        assert in_child(merge_in_small_units, settings) == 0
    merged, key = checkpoints.read(Path(three.output)), "decoder.layers.mlp.router.expert_bias"
    assert torch.equal(merged[key], checkpoints.exact(terms(settings), key).float())


# Verification.


@pytest.mark.parametrize("everything", [True, False])
def test_verify_sees_what_was_changed(three, everything):
    run(three)
    out = checkpoints.read(Path(three.output))
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    jobs = pipeline.make_jobs(three)
    for scale, wrong in ((1.0, False), (1 + 2**-7, True)):
        changed = out | {key: (out[key].float() * scale).bfloat16()}
        path = checkpoints.write(Path(three.output + f"-{scale}"), changed, checkpoints.rows)
        with ExitStack() as stack, TorchDistReader(path) as output:
            work = pipeline.open_and_plan(jobs, stack, RankGroup())
            if wrong:
                with pytest.raises(UserError, match=f"{key} at .* is not what merge.method=bai makes"):
                    verify_result(work, 0, output, RankGroup(), everything)
            else:
                assert verify_result(work, 0, output, RankGroup(), everything) > 0


def test_verify_all_compares_every_element_and_a_sample_every_tensor(three):
    jobs = pipeline.make_jobs(three)
    run(three)
    with ExitStack() as stack, TorchDistReader(three.output) as output:
        work = pipeline.open_and_plan(jobs, stack, RankGroup())
        total = sum(torch.Size(o.shape).numel() for o in work.outputs.values())
        assert verify_result(work, 0, output, RankGroup(), True) == total
        assert 0 < verify_result(work, 0, output, RankGroup(), False) < total


def spoil(monkeypatch, factor: float) -> None:
    """Let everything that is merged be wrong by this factor."""
    right = tiles._tile_merger

    def wrong(plan, region, *rest):
        way, limit = right(plan, region, *rest)

        def spoiled(box):
            for data, square in way(box):
                if region.fate is Fate.MERGED:
                    torch.frombuffer(data, dtype=region.dtype).mul_(factor)
                yield data, square

        return spoiled, limit

    monkeypatch.setattr(tiles, "_tile_merger", wrong)
    monkeypatch.setattr(tiles, "_is_bf16_sum", lambda *_: False)


def test_a_wrong_output_is_not_sealed(three, monkeypatch):
    spoil(monkeypatch, 1 + 2**-7)
    refused(three, "is not what merge.method=bai makes of its sources")


def test_the_manifest_covers_every_file(three):
    run(three)
    listed = json.loads(Path(three.output, "manifest.json").read_text())["files"]
    assert set(listed) == {p.name for p in Path(three.output).iterdir()} - {"manifest.json"}
