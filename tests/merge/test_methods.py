"""Every merge method against its paper's formula, and independent of tiles, shardings, ranks and stacking."""

import dataclasses
import math
import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import checkpoints
import pytest
import references
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_command import spoil

from megatron_bai.cli import entry_point
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect, Merge
from megatron_bai.distributed.rank_group import RankGroup, merge_ranks
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.compare import inspect_checkpoint
from megatron_bai.merge.execution import executor, slice_stats, tiles
from megatron_bai.merge.execution.provenance import make_model_card
from megatron_bai.merge.methods import METHODS, make_recipes
from megatron_bai.merge.methods.dare import keep_mask
from megatron_bai.merge.methods.slerp import Slerp
from megatron_bai.merge.methods.ties import Ties
from megatron_bai.merge.recipe.regions import OutputTensor, split_into_regions
from megatron_bai.merge.recipe.slices import SliceBox, iter_slices, num_slice_axes

SETTINGS: dict[str, dict] = {
    "bai": {"weights": [0.25, 0.75], "alpha": 0.6},
    "linear": {"weights": [1.0, 3.0], "normalize": True, "pretrained": ""},
    "task_arithmetic": {"weights": [0.7, -0.4], "scale": 0.8},
    "slerp": {"t": 0.3, "pretrained": ""},
    "ties": {"weights": [1.0, 0.6], "density": 0.4, "scale": 0.9},
    "dare": {"weights": [0.5, 0.7], "drop_rate": 0.6, "seed": 5, "scale": 1.1},
    "dare_ties": {"weights": [0.5, 0.7], "drop_rate": 0.4, "seed": 5, "scale": 1.1},
    "average": {"pretrained": ""},
    "ema": {"decay": 0.3, "pretrained": ""},
}


def reference(method: str, key: str, base, a, b) -> torch.Tensor:
    """The exact values of `SETTINGS`, float64."""
    given = {k: v for k, v in SETTINGS[method].items() if k not in ("pretrained", "normalize", "alpha")}
    base, a, b = base[key], a[key], b[key]
    if method == "bai":
        return 0.6 * base.double() + 0.4 * references.linear([a, b], given["weights"])
    if method == "linear":
        return references.linear([a, b], given["weights"])
    if method in ("average", "ema"):
        decay = given.get("decay", 0.5)  # of two, the mean is that of decay 1/2
        return decay * a.double() + (1 - decay) * b.double()
    if method == "task_arithmetic":
        return references.task_arithmetic(base, [a, b], **given)
    tensors = (a, b) if method == "slerp" else (base, a, b)
    return references.by_slice(getattr(references, method), key, *tensors, **given)


@pytest.fixture(params=SETTINGS)
def each(three, request) -> Merge:
    """The three checkpoints' settings for each of the methods."""
    return settings_of(three, request.param)


def settings_of(three: Merge, method: str, **changes) -> Merge:
    plain = dataclasses.replace(three, method=method, weights=[], alpha=None)
    return dataclasses.replace(plain, **(SETTINGS[method] | changes))


def run(settings: Merge, **changes) -> dict[str, torch.Tensor]:
    settings = dataclasses.replace(settings, **changes)
    merge_verb.run(Config(merge=settings))
    return checkpoints.read(Path(settings.output))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].view(-1), b[key].view(-1)) for key in a)


def test_the_paper_s_formula_rounded_once(each):
    merged = run(each)
    sources = [checkpoints.model(seed) for seed in range(3)]
    for key, value in merged.items():
        if key == "decoder.table":
            continue
        exact = reference(each.method, key, *sources)
        half_ulp = torch.finfo(value.dtype).eps / 2
        assert value.dtype == sources[0][key].dtype
        summed = sum(source[key].double().abs() for source in sources)  # each sum rounds it in float32
        assert (value.double() - exact).abs().le(exact.abs() * half_ulp * 1.0001 + summed * 2**-22).all(), key
        if each.method in ("ties", "dare", "dare_ties"):
            assert torch.equal(value, exact.to(value.dtype)), key


def test_fp32_is_the_nearest_too(tmp_path, each):
    sources = [checkpoints.model(seed, torch.float32) for seed in range(3)]
    paths = [str(checkpoints.write(tmp_path / f"wide{i}", source)) for i, source in enumerate(sources)]
    merged = run(each, pretrained=paths[0] if each.pretrained else "", members=paths[1:])
    for key, value in merged.items():
        exact = reference(each.method, key, *sources) if key != "decoder.table" else value
        assert (value.double() - exact).abs().le(exact.abs() * 2**-24 * 1.0001).all(), key


# What the values must not depend on.


@pytest.mark.parametrize("tile, piece", [(1, 64), (7, 1 << 24), (64, 200)])
def test_tiles_do_not_matter(each, tmp_path, monkeypatch, tile, piece):
    expected = run(each)
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(slice_stats, "READ_ELEMENTS", 20 * tile)
    monkeypatch.setattr(pipeline, "ITEM_BYTES", piece)
    assert same(run(each, output=str(tmp_path / "tiled")), expected)


def test_layouts_do_not_matter(each, tmp_path):
    expected = run(each)
    for layout in (checkpoints.irregular, checkpoints.rows, checkpoints.columns, checkpoints.whole):
        paths = [
            str(checkpoints.write(tmp_path / f"{layout.__name__}{seed}", checkpoints.model(seed), layout))
            for seed in range(3)
        ]
        settings = {"pretrained": paths[0] if each.pretrained else "", "members": paths[1:]}
        assert same(run(each, **settings, output=str(tmp_path / f"out-{layout.__name__}")), expected)


def peer(rank: int, size: int, store: str, settings: Merge) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    jobs = pipeline.make_jobs(settings)
    with merge_ranks() as group, ExitStack() as stack:
        work = pipeline.open_and_plan(jobs, stack, group, unit_bytes=512)
        assert len(work.units) > 4 and executor.assign_to_rank(work.units, group), "every rank has something to do"
        assert not work.recipes[0].stats_passes or executor.assign_to_rank(slice_stats.slices_to_measure(work), group)
        pipeline.execute_jobs(work, jobs, group, "all")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_writes_the_same(each, tmp_path, size):
    expected = run(each)
    together = dataclasses.replace(each, output=str(tmp_path / "together"))
    context = multiprocessing.get_context("fork")
    group = [context.Process(target=peer, args=(r, size, str(tmp_path / "store"), together)) for r in range(size)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0] * size
    assert same(checkpoints.read(tmp_path / "together"), expected)


def unstacked(tensors: dict[str, torch.Tensor], apart: bool) -> dict[str, torch.Tensor]:
    """A tensor for each layer and, where `apart`, for each expert."""
    found = {}
    for key, tensor in tensors.items():
        if not key.startswith("decoder.layers."):
            found[key] = tensor
            continue
        for layer, rest in enumerate(tensor):
            name = key.replace("layers.", f"layers.{layer}.")
            if apart and ".experts.experts." in key:
                for expert, part in enumerate(rest):
                    found[name.replace("experts.experts.", f"experts.experts.{expert}.")] = part
            else:
                found[name] = rest
    return found


@pytest.mark.parametrize("apart", [False, True])
def test_stacking_does_not_matter(each, tmp_path, apart):
    expected = unstacked(run(each), apart)
    paths = [
        str(checkpoints.write(tmp_path / f"flat{seed}", unstacked(checkpoints.model(seed), apart))) for seed in range(3)
    ]
    settings = {"pretrained": paths[0] if each.pretrained else "", "members": paths[1:]}
    assert same(run(each, **settings, output=str(tmp_path / "flat")), expected)


@pytest.mark.parametrize(
    "key, shape, count, first",
    [
        ("decoder.layers.mlp.router.weight", (2, 4, 8), 1, "decoder.layers.mlp.router.weight 0"),
        ("decoder.layers.1.mlp.router.weight", (4, 8), 0, "decoder.layers.mlp.router.weight 1"),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 3, 4, 5), 2, "{} 0 0"),
        ("decoder.layers.7.mlp.experts.experts.linear_fc1.weight", (3, 4, 5), 1, "{} 7 0"),
        ("decoder.layers.7.mlp.experts.experts.2.linear_fc1.weight", (4, 5), 0, "{} 7 2"),
        ("decoder.layers.7.mlp.experts.experts.2.linear_fc1.weight_w", (2, 5), 0, "{} 7 2"),
        ("decoder.layers.mlp.shared_experts.gate", (2, 1, 5), 1, "decoder.layers.mlp.shared_experts.gate 0"),
        ("model.layers.3.mlp.experts.5.gate_proj.weight", (4, 5), 0, "model.layers.mlp.experts.gate_up_proj 3 5"),
        ("model.layers.3.mlp.experts.gate_up_proj", (8, 4, 5), 1, "model.layers.mlp.experts.gate_up_proj 3 0"),
        ("model.layers.3.input_layernorm.weight", (5,), 0, "model.layers.input_layernorm.weight 3"),
        ("embedding.word_embeddings.weight", (9, 5), 0, "embedding.word_embeddings.weight"),
        ("decoder.layers.scale", (3,), 1, "decoder.layers.scale 0"),
        ("decoder.scale", (), 0, "decoder.scale"),
    ],
)
def test_what_one_layer_or_expert_owns(key, shape, count, first):
    output = OutputTensor(key, torch.float32, shape, merged=True)
    found = [part for region in split_into_regions(output, (), None) for part in iter_slices(region)]
    assert num_slice_axes(output) == count and len(found) == math.prod(shape[:count])
    assert found[0].slice_name == first.format("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    assert len({part.slice_name for part in found}) == len(found)
    assert torch.equal(found[-1].element_indices(), torch.arange(math.prod(shape[count:])))


def test_elements_are_numbered_in_their_slice():
    part = SliceBox(
        OutputTensor("decoder.layers.mlp.linear_fc2.weight", torch.float32, (3, 4, 5), True), ((1, 2, 1), (1, 2, 3))
    )
    assert part.element_indices().tolist() == [11, 12, 13, 16, 17, 18]


@pytest.mark.parametrize(
    "key",
    ["decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight_v", "model.layers.3.mlp.experts.2.up_proj.weight"],
)
def test_halves_of_a_parameter_are_numbered_one_after_the_other(key):
    first = key.replace("_v", "_w").replace("up_proj", "gate_proj")
    halves = [SliceBox(OutputTensor(name, torch.float32, (4, 5), True), ((0, 0), (4, 5))) for name in (first, key)]
    assert halves[0].slice_name == halves[1].slice_name
    assert torch.cat([half.element_indices() for half in halves]).tolist() == list(range(40))


# Killed, repeated, damaged.


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(settings: Merge, moment: str) -> None:
    if moment == "measuring":
        slice_stats._measure_slice = die
    else:
        write, written = executor._write_unit, []

        def some(plan, unit, *rest):
            if len(written) == 2:
                die()
            written.append(unit)
            return write(plan, unit, *rest)

        executor._write_unit = some
    jobs = pipeline.make_jobs(settings)
    with ExitStack() as stack:
        pipeline.execute_jobs(
            pipeline.open_and_plan(jobs, stack, RankGroup(), unit_bytes=512), jobs, RankGroup(), "all"
        )


@pytest.mark.parametrize("moment", ["measuring", "writing"])
@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_killed_it_goes_on_and_ends_the_same(three, tmp_path, method, moment):
    settings = settings_of(three, method)
    expected = run(settings, output=str(tmp_path / "unbroken"))
    child = multiprocessing.get_context("fork").Process(target=killed, args=(settings, moment))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and not Path(settings.output).exists()
    noted = list(Path(settings.output).parent.glob(".out.unfinished/.journal/*.json"))
    assert len(noted) in ((0,) if moment == "measuring" else (1, 2)), "the last is flushed behind"
    jobs = pipeline.make_jobs(settings)
    with ExitStack() as stack:
        pipeline.execute_jobs(
            pipeline.open_and_plan(jobs, stack, RankGroup(), unit_bytes=512), jobs, RankGroup(), "all"
        )
    assert same(checkpoints.read(Path(settings.output)), expected)


CHANGES = {
    "bai": {"alpha": 0.5},
    "linear": {"weights": [3.0, 1.0]},
    "task_arithmetic": {"scale": 0.7},
    "slerp": {"t": 0.4},
    "ties": {"density": 0.5},
    "dare": {"seed": 6},
    "dare_ties": {"seed": 6},
    "average": {"method": "ema", "decay": 0.2},
    "ema": {"decay": 0.2},
}


def test_other_settings_are_another_merge(each, capsys):
    first = run(each)
    assert same(run(each), first) and "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    second = run(each, **CHANGES[each.method])
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged") and not same(first, second)


def test_another_method_with_the_same_coefficients_is_another_merge(three, capsys):
    run(settings_of(three, "bai"))
    run(settings_of(three, "task_arithmetic", weights=[0.25, 0.75], scale=0.4))
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged")
    assert checkpoints.provenance(Path(three.output))["recipe"]["method"] == "task_arithmetic"


def test_verify_sees_what_was_changed(each, monkeypatch):
    spoil(monkeypatch, 1 + 2**-7)
    for verify in ("sample", "all"):
        wrong_values = f"is not what merge.method={each.method} makes of its sources"
        refused(dataclasses.replace(each, verify=verify), wrong_values)


def test_verify_sees_a_wrong_choice_of_elements(three, monkeypatch):
    """A mask or threshold of another place is another value: the check makes its own."""
    for method in ("ties", "dare"):
        right = METHODS[method].combine

        def shifted(self, values, weights, part, found, right=right):
            return right(self, values, weights, part, found).roll(1)

        monkeypatch.setattr(METHODS[method], "combine", shifted)
        refused(settings_of(three, method), f"is not what merge.method={method} makes of its sources")


# What goes wrong in a source.


def refused(settings: Merge, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(settings)
    assert not Path(settings.output).exists() and not list(Path(settings.output).parent.glob(".*.unfinished"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method, changes", [("slerp", {}), ("ties", {}), ("ties", {"density": 1.0}), ("dare", {"drop_rate": 0.999})]
)
def test_nan_is_named_even_where_it_would_be_dropped(three, tmp_path, value, method, changes):
    tensors = checkpoints.model(2)
    tensors["decoder.layers.mlp.router.weight"][1, 2, 5] = value
    path = checkpoints.write(tmp_path / "bad", tensors, checkpoints.rows)
    settings = settings_of(three, method, members=[three.members[0], str(path)], **changes)
    refused(settings, r"bad: decoder\.layers\.mlp\.router\.weight holds NaN or Inf at \(1, 2, 5\)")


def test_integers_and_objects_as_ever(each):
    merged = run(each)
    assert torch.equal(merged["decoder.table"], torch.arange(10))
    note = checkpoints.provenance(Path(each.output))
    carried = ["decoder.layers.0._extra_state/shard_0_1"] if each.pretrained else []
    assert note["carried_objects"] == carried, "of the checkpoint that gives the layout"


# Settings.


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("bai", {"t": 0.5}, "merge.method=bai does not use merge.t: leave it out"),
        ("bai", {"scale": 0.0}, "does not use merge.scale"),
        ("bai", {"weights": [0.5, 0.6]}, r"sum to 1.1: they must sum to 1, or merge.normalize=true"),
        ("bai", {"pretrained": ""}, "merge.pretrained is empty"),
        ("linear", {"alpha": 0.5}, "merge.method=linear does not use merge.alpha"),
        ("linear", {"alpha_for": {"router": 0.5}}, "does not use merge.alpha_for"),
        ("linear", {"weights": [1.0, -1.0]}, r"\[1, -1\] sum to 0: merge.normalize needs a positive sum"),
        ("linear", {"weights": [1.0, 3.0], "normalize": False}, "sum to 4: they must sum to 1"),
        ("linear", {"weights_for": {"router": [1.0]}}, r"merge.weights_for\[router\] has 1 entries for 2 members"),
        ("linear", {"weights": []}, "merge.weights is not given: merge.method=linear needs a weight for each"),
        ("linear", {"sweep": [0.1]}, "merge.method=linear does not use merge.sweep"),
        ("linear", {"members": []}, "merge.members is empty"),
        ("task_arithmetic", {"density": 0.5}, "does not use merge.density"),
        ("task_arithmetic", {"scale": math.inf}, "merge.scale is inf"),
        ("task_arithmetic", {"weights": [1.0, -1.0], "normalize": True}, "needs a positive sum"),
        ("task_arithmetic", {"pretrained": ""}, "merge.pretrained is empty"),
        ("slerp", {"weights": [0.5, 0.5]}, "merge.method=slerp does not use merge.weights"),
        ("slerp", {"weights_for": {"router": [1.0, 0.0]}}, "does not use merge.weights_for"),
        ("slerp", {"normalize": True}, "does not use merge.normalize"),
        ("slerp", {"t": None}, "merge.t is not given: merge.method=slerp needs it"),
        ("slerp", {"t": 1.5}, "merge.t is 1.5: it must be from 0 to 1"),
        ("slerp", {"t": math.nan}, "merge.t is nan"),
        ("slerp", {"t_for": {"router": -1.0}}, r"merge.t_for\[router\] is -1"),
        ("slerp", {"members": ["a", "b", "c"]}, "merge.members has 3 entries: merge.method=slerp is between two"),
        ("slerp", {"members": ["a", "a"]}, "merge.method=slerp names /.*/a twice"),
        ("ties", {"normalize": True}, "does not use merge.normalize"),
        ("ties", {"seed": 0}, "does not use merge.seed"),
        ("ties", {"density": 0.0}, "merge.density is 0: it must be above 0 and at most 1"),
        ("ties", {"density": math.nan}, "merge.density is nan"),
        ("ties", {"weights": [1.0, -1.0]}, r"merge.weights \[1, -1\] holds a negative weight"),
        ("ties", {"alpha": 0.5, "t": 0.1}, "merge.method=ties does not use merge.alpha, merge.t: leave it out"),
        ("dare", {"drop_rate": 1.0}, "merge.drop_rate is 1: it must be at least 0 and below 1"),
        ("dare", {"drop_rate": None}, "merge.drop_rate is not given: merge.method=dare needs it"),
        ("dare", {"members": ["a", "a"]}, "merge.method=dare names /.*/a twice"),
        ("dare", {"sweep": [0.5, 0.5], "scale": None}, "names a value twice"),
        ("bai", {"sweep": [0.1, 0.5]}, "merge.alpha and merge.sweep are both given"),
        ("slerp", {"sweep": [0.1, 0.5]}, "merge.t and merge.sweep are both given"),
        ("ema", {"sweep": [0.1, 0.5]}, "merge.decay and merge.sweep are both given"),
        ("dare", {"sweep": [0.1, 0.5]}, "merge.scale and merge.sweep are both given"),
        ("bai", {"alpha": None, "sweep": [0.1, 0.5], "alpha_for": {".": 0.3}}, "merge.sweep changes nothing"),
        ("dare_ties", {"normalize": True, "weights": [1.0, -1.0]}, r"\[1, -1\] holds a negative weight"),
        ("dare_ties", {"density": 0.5}, "does not use merge.density"),
        ("dare_ties", {"members": ["a", "a"]}, "merge.method=dare_ties names /.*/a twice"),
        ("average", {"weights": [0.5, 0.5]}, "merge.method=average does not use merge.weights"),
        ("average", {"members": ["a", "a"]}, "merge.method=average names /.*/a twice"),
        ("average", {"members": ["nothing/step-*"]}, "no directory matches nothing/step-"),
        ("ema", {"decay": None}, "merge.decay is not given"),
        ("ema", {"decay": 1.5}, "merge.decay is 1.5"),
        ("slerp", {"t_for": {"roter": 0.5}}, "'roter' of merge.t_for fits no tensor"),
    ],
)
def test_settings_are_refused_by_name(three, method, change, message):
    refused(settings_of(three, method, **change), message)


def test_an_unknown_method_is_named(three):
    refused(dataclasses.replace(three, method="soup"), "merge.method is 'soup': choose bai, linear")


def test_every_field_of_a_method_is_a_setting():
    names = {field.name for field in dataclasses.fields(Merge)}
    for method in METHODS.values():
        assert {field.name for field in dataclasses.fields(method)} <= names


def test_what_is_left_out_has_the_papers_value():
    ties = make_recipes(Merge(method="ties", pretrained="a", members=["b", "c"]))[""]
    assert isinstance(ties, Ties) and (ties.density, ties.scale, ties.weights) == (0.2, 1.0, (1.0, 1.0))


def test_groups_and_patterns(three, tmp_path):
    sources = [checkpoints.model(seed) for seed in range(3)]
    router, norm = "decoder.layers.mlp.router.weight", "decoder.final_layernorm.weight"
    merged = run(settings_of(three, "slerp", t_for={"router": 1.0, "norms": 0.0}))
    assert torch.equal(merged[router], sources[2][router]) and torch.equal(merged[norm], sources[1][norm])
    for method in ("ties", "dare"):
        settings = settings_of(three, method, weights_for={"router": [0.0, 0.0], "norms": [0.0, 0.7]})
        merged = run(settings, output=str(tmp_path / method))
        assert torch.equal(merged[router], sources[0][router])
        more = {k: v for k, v in SETTINGS[method].items() if k != "weights"} | {"weights": [0.0, 0.7]}
        exact = references.by_slice(getattr(references, method), norm, *(s[norm] for s in sources), **more)
        assert torch.equal(merged[norm], exact.bfloat16())
        assert checkpoints.provenance(tmp_path / method)["tensors"][router]["coefficients"] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "ties", "dare", "dare_ties", "ema"])
def test_a_sweep_writes_what_single_merges_write(three, tmp_path, method):
    swept, values = METHODS[method].sweep_setting, [0.25, 1.0]
    plain = settings_of(three, method, **{METHODS[method].sweep_setting: None})
    run_sweep = dataclasses.replace(plain, sweep=values)
    merge_verb.run(Config(merge=run_sweep))
    for value in values:
        single = run(plain, **{swept: value}, output=str(tmp_path / f"single{value}"))
        assert same(checkpoints.read(Path(three.output, f"{swept}-{value}")), single)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_command_line(three, tmp_path, method, capsys, monkeypatch):
    """Chosen and set by Hydra alone; the result names its method wherever it is described."""
    settings = settings_of(three, method)
    words = [f"merge.{name}={value}" for name, value in SETTINGS[method].items()]
    words += [f"merge.method={method}", f"merge.members=[{','.join(settings.members)}]"]
    words += [f"merge.output={settings.output}", f"run.dir={tmp_path}"]
    words += [f"merge.pretrained={settings.pretrained}"] if settings.pretrained else []
    monkeypatch.setattr(entry_point.signal, "signal", lambda *args: None)
    for more in (["merge.dry_run=true"], []):
        monkeypatch.setattr(sys, "argv", ["megatron-bai", "merge", *words, *more])
        entry_point.main()
        said = capsys.readouterr().out
        assert (f"{settings.output}: {method}, " in said) == bool(more) != Path(settings.output).exists()
    assert same(checkpoints.read(Path(settings.output)), run(settings, output=str(tmp_path / "again")))
    capsys.readouterr()
    inspect_checkpoint(Config(inspect=Inspect(path=settings.output)))
    recipe = checkpoints.provenance(Path(settings.output))["recipe"]
    assert f" {method}: " in capsys.readouterr().out and recipe["method"] == method
    used = {name: value for name, value in SETTINGS[method].items() if name != "pretrained"}
    assert {name: recipe[name] for name in used} == used


# SLERP where there is no arc.


def coefficients(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[float, ...]:
    recipe = Slerp("", ("a", "b"), t=t)
    blocks = torch.stack([a, b]).double()
    return recipe.coefficients((1 - t, t), recipe.measure_slice(lambda: iter([blocks]), "w", a.numel()))


def test_slerp_without_an_angle_is_the_straight_line():
    a = torch.arange(1.0, 9.0)
    for b in (0 * a, 3 * a, -2 * a, a * (1 + 1e-9)):
        assert coefficients(a, b, 0.25) == coefficients(b, a, 0.25) == (0.75, 0.25)


def test_slerp_of_perpendicular_vectors_keeps_the_length():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert coefficients(a, b, 0.5) == pytest.approx((math.sqrt(0.5),) * 2, rel=1e-15)


def test_slerp_is_continuous_where_it_becomes_a_line():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for angle in (1e-3, 1e-5, 2e-6, 5e-7):
        b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        assert coefficients(a, b, 0.25) == pytest.approx((0.75, 0.25), rel=angle**2 + 1e-12)


def test_slerp_at_its_ends_is_bitwise_the_member(three, tmp_path):
    for t, seed in ((0.0, 1), (1.0, 2)):
        merged = run(settings_of(three, "slerp", t=t), output=str(tmp_path / f"{t}"))
        assert same(merged, checkpoints.model(seed))


def test_slerp_of_huge_vectors_is_refused_or_right():
    a = torch.tensor([1e200, 0.0], dtype=torch.float64)
    with pytest.raises(UserError, match="w: the squares of its values are beyond float64"):
        coefficients(a, a.roll(1), 0.5)
    tiny = torch.tensor([1e-300, 0.0], dtype=torch.float64)
    assert coefficients(tiny, tiny.roll(1), 0.25) == (0.75, 0.25), "squares that vanish: a zero vector"


# TIES: which elements are kept.

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2**-149, -(2**-140), 3e38])


@examples(max_examples=60)
@given(st.lists(floats | few, min_size=1, max_size=60), st.integers(1, 100), st.integers(1, 9))
def test_the_threshold_is_the_kth_largest(numbers, percent, block):
    tau = torch.tensor(numbers, dtype=torch.float64)
    recipe = Ties("base", ("a",), density=percent / 100)
    whole = torch.stack([torch.zeros_like(tau), tau])
    [found] = recipe.measure_slice(lambda: iter(whole.split(block, dim=1)), "w", len(numbers))
    rank = max(percent * len(numbers) // 100, 1)
    assert found == tau.abs().float().sort(descending=True).values[rank - 1]


def test_the_density_is_the_decimal_that_was_written():
    """0.29 · 100 is 28.999… in floating point; 29 elements are asked for."""
    tau = torch.arange(1.0, 101.0, dtype=torch.float64)
    recipe = Ties("base", ("a",), density=0.29)
    whole = torch.stack([torch.zeros_like(tau), tau])
    assert recipe.measure_slice(lambda: iter([whole]), "w", 100) == (72.0,)


def combine(recipe, base, *members, weights=None, part=None, found=None) -> list[float]:
    values = torch.tensor([base, *members], dtype=torch.float64)
    size = (values.shape[1],)
    part = part or SliceBox(OutputTensor("w", torch.float32, size, merged=True), ((0,), size))
    if found is None and recipe.stats_passes:
        found = recipe.measure_slice(lambda: iter([values]), "w", values.shape[1])
    row = (1.0, *(weights or [1.0] * len(members)))
    merged = recipe.combine(values, row, part, found)
    exact, size = recipe.reference_values(values, row, part, found)
    assert ((merged - exact).abs() <= 1e-14 * size).all()
    return merged.tolist()


def test_ties_by_hand():
    recipe = Ties("base", ("a", "b", "c"), density=0.5, scale=2.0)
    # τ: a trims to [4, -3, 0, 0], b to [2, 0, 0, -5], c to [0, 9, -1, 0]
    a, b, c = [4.0, -3.0, 1.0, 0.5], [2.0, 1.0, 0.0, -5.0], [0.5, 9.0, -1.0, 0.25]
    assert combine(recipe, [0.0] * 4, a, b, c) == [6.0, 18.0, -2.0, -10.0]


def test_ties_keeps_all_that_are_as_large_as_the_last():
    recipe = Ties("base", ("a",), density=0.25)
    assert combine(recipe, [0.0] * 4, [1.0, -1.0, 1.0, 0.5]) == [1.0, -1.0, 1.0, 0.0]


def test_ties_where_values_cancel_the_pretrained_stays():
    recipe = Ties("base", ("a", "b"), density=1.0)
    merged = combine(recipe, [-0.0, 1.0, 7.0], [1.0, 1.0, 8.0], [-1.0, 1.0, 8.0])
    assert merged == [0.0, 1.0, 8.0] and math.copysign(1, merged[0]) == -1


def test_ties_of_one_member_at_full_density_is_the_member(three):
    settings = settings_of(three, "ties", members=three.members[:1], weights=[], density=1.0, scale=None)
    assert same(run(settings), checkpoints.model(1))


# DARE: chance.


def test_dare_is_uniform_and_expects_the_task_vector():
    n, rate = 1 << 20, 0.9
    stay = keep_mask(0, 1, "w", torch.arange(n), rate)
    deviation = math.sqrt(rate * (1 - rate) / n)
    assert abs(float(stay.double().mean()) - (1 - rate)) < 4 * deviation
    parts = stay.view(1024, 1024).double().sum(1)  # each 1024 elements a binomial: χ² of their deviations
    chi = float(((parts - 1024 * (1 - rate)) ** 2 / (1024 * rate * (1 - rate))).sum())
    assert abs(chi - 1024) < 4 * math.sqrt(2 * 1024)
    tau = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rescaled = torch.where(stay, tau, 0) / (1 - rate)
    spread = float(tau.norm()) * math.sqrt(rate / (1 - rate))  # the standard deviation of the sum
    assert abs(float(rescaled.sum() - tau.sum())) < 4 * spread


def test_dare_is_independent_between_seeds_members_slices_and_neighbours():
    n, rate = 1 << 18, 0.5
    elements = torch.arange(n)
    one = keep_mask(0, 1, "w 0", elements, rate)
    others = {
        "seed": keep_mask(1, 1, "w 0", elements, rate),
        "member": keep_mask(0, 2, "w 0", elements, rate),
        "slice": keep_mask(0, 1, "w 1", elements, rate),
        "neighbour": one.roll(1),
        "row": one.roll(4096),
    }
    for what, other in others.items():
        agree = float((one == other).double().mean())
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(n), what


def test_dare_s_mask_is_the_hash_in_whole_numbers():
    elements = torch.tensor([0, 1, 2, 1000, 2**31, 2**40, 2**62])
    for seed, number, name, rate in ((0, 1, "w", 0.5), (-3, 2, "layers.w 4 5", 0.9), (2**40, 1, "", 0.1)):
        expected = [references.kept(seed, number, name, int(i), rate) for i in elements]
        assert keep_mask(seed, number, name, elements, rate).tolist() == expected


def test_dare_leaves_dropped_elements_bitwise_and_drops_the_share(three):
    sources = [checkpoints.model(seed) for seed in range(3)]
    merged = run(settings_of(three, "dare", members=three.members[:1], weights=[], drop_rate=0.9))
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    same_as_base = (merged[key] == sources[0][key]).double().mean()
    assert abs(float(same_as_base) - 0.9) < 4 * math.sqrt(0.09 / merged[key].numel())


def test_dare_that_drops_nothing_is_task_arithmetic(three, tmp_path):
    changes = {"weights": [0.5, 0.25], "scale": 0.5}
    dare = run(settings_of(three, "dare", drop_rate=0.0, **changes))
    plain = run(settings_of(three, "task_arithmetic", **changes), output=str(tmp_path / "plain"))
    for key, value in dare.items():
        assert torch.allclose(value.double(), plain[key].double(), rtol=2**-7, atol=1e-6), key


# Task arithmetic and linear as special cases of BAI.


def test_methods_meet_where_they_should(three, tmp_path):
    bai = run(settings_of(three, "bai"))
    tasks = settings_of(three, "task_arithmetic", weights=[1.0, 3.0], normalize=True, scale=0.4)
    assert same(run(tasks, output=str(tmp_path / "tasks")), bai), "α = 1 − λ"
    paths = [three.pretrained, *three.members]
    linear = settings_of(three, "linear", members=paths, weights=[0.6, 0.1, 0.3], normalize=False)
    assert same(run(linear, output=str(tmp_path / "linear")), bai)
    given = dataclasses.replace(linear, pretrained=three.pretrained, members=three.members, weights=[0.25, 0.75])
    run(given, output=str(tmp_path / "given"))
    assert checkpoints.provenance(tmp_path / "given")["sources"][0]["coefficient"] == 0


def test_the_model_card_names_the_method():
    recipe = make_recipes(Merge(method="dare", pretrained="a", members=["b"], drop_rate=0.9, seed=3))[""]
    card = make_model_card(recipe)
    assert "by DARE (arXiv 2311.03099) with weights 1, scale 1, drop_rate 0.9, seed 3;" in card
    assert "| Checkpoint | Weight |" in card and "| b | 1 |" in card


# Averages over one run's checkpoints, and DARE with an elected sign.


@pytest.mark.parametrize("method, decay", [("average", None), ("ema", 0.25)])
def test_averages_over_the_checkpoints_that_a_pattern_matches(tmp_path, method, decay):
    """By number, so that step-9 is before step-10; the recursion is that of the definition."""
    for step, seed in ((10, 2), (9, 1), (100, 3)):
        checkpoints.write(tmp_path / f"run/step-{step}", checkpoints.model(seed, torch.float32))
    settings = Merge(method=method, members=[str(tmp_path / "run/step-*")], output=str(tmp_path / "out"), decay=decay)
    merged = run(settings)
    for key, value in merged.items():
        rows = [checkpoints.model(seed, torch.float32)[key].double() for seed in (1, 2, 3)]
        expected = rows[0]
        for number, row in enumerate(rows[1:], 2):
            d = (number - 1) / number if decay is None else decay
            expected = d * expected + (1 - d) * row
        assert key == "decoder.table" or torch.allclose(value.double(), expected, rtol=1e-7, atol=1e-12), key
    recorded = checkpoints.provenance(tmp_path / "out")["recipe"]
    assert [Path(member).name for member in recorded["members"]] == ["step-9", "step-10", "step-100"]


@pytest.mark.parametrize("weights, normalize", [([0.5, 0.7], True), ([0.5, -0.7], False)])
def test_dare_ties_adds_or_averages_what_agrees(three, tmp_path, weights, normalize):
    sources = [checkpoints.model(seed) for seed in range(3)]
    merged = run(settings_of(three, "dare_ties", weights=weights, normalize=normalize))
    more = SETTINGS["dare_ties"] | {"weights": weights, "normalize": normalize}
    for key, value in merged.items():
        if key != "decoder.table":
            exact = references.by_slice(references.dare_ties, key, *(source[key] for source in sources), **more)
            assert torch.equal(value, exact.to(value.dtype)), key


def test_dare_ties_of_one_member_is_dare(three, tmp_path):
    one = {"members": three.members[:1], "weights": [0.7]}
    first = run(settings_of(three, "dare_ties", **one, drop_rate=0.6))
    assert same(first, run(settings_of(three, "dare", **one), output=str(tmp_path / "dare")))


def test_a_checkpoint_named_twice_is_said(three, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(three.members[0])
    members = [three.members[0], three.pretrained, str(link)]
    for more in ({"dry_run": True}, {}):
        merge_verb.run(Config(merge=dataclasses.replace(three, members=members, weights=[0.5, 0.25, 0.25], **more)))
        said = capsys.readouterr().out
        assert "named more than once: member 1 and member 3" in said
        assert "named more than once: pretrained and member 2" in said
    assert len(checkpoints.provenance(Path(three.output))["differences"]) == 2
