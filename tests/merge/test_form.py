"""What the output looks like besides its values: vocabulary, tied embeddings, dtypes, chunks and files."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import checkpoints
import pytest
import spellings
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_command import content, in_child, merge_in_small_units, refused
from test_spelling import COEFFICIENTS, reference, same, settings, write_hf, write_three

from megatron_bai.checkpoint.hf_files import SafetensorsReader
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.pipeline import choose_threads, make_jobs

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


# The vocabulary. The models have 9 tokens.


def padded(tensors: checkpoints.Tensors, rows: int, value: float) -> checkpoints.Tensors:
    """The vocabulary padded to `rows` rows of `value`."""
    grown = {}
    for key in VOCABULARY:
        pad = torch.full((rows - len(tensors[key]), spellings.HIDDEN), value, dtype=tensors[key].dtype)
        grown[key] = torch.cat([tensors[key], pad])
    return tensors | grown


def write_padded(tmp_path: Path, rows: tuple[int, ...], sizes: tuple[int | None, ...]) -> list[Path]:
    """Models with `rows` rows, and `sizes` in their config.json where it is not None."""
    paths = []
    for seed, (count, size) in enumerate(zip(rows, sizes)):
        layout = (checkpoints.rows, checkpoints.whole, checkpoints.columns)[seed]
        tensors = padded(spellings.stacked(spellings.model(seed)), count, seed + 0.125)
        paths.append(checkpoints.write(tmp_path / f"s{seed}", tensors, layout))
        if size is not None:
            (paths[-1] / "config.json").write_text(json.dumps({"vocab_size": size}))
    return paths


@pytest.mark.parametrize(
    "rows, sizes, given",
    [
        ((12, 16, 10), (9, 9, 9), 0),
        ((10, 9, 12), (9, 9, 9), 0),
        ((12, 16, 10), (None, None, None), 9),
        ((12, 16, 10), (9, 10, None), 9),
        ((12, 12, 12), (None, 9, None), 0),
    ],
)
def test_rows_that_mean_a_token_are_merged_and_padding_is_the_bases(tmp_path, rows, sizes, given):
    paths = write_padded(tmp_path, rows, sizes)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", vocab_size=given)))
    expected = padded(spellings.stacked(reference()), rows[0], 0.125)
    assert same(checkpoints.read(tmp_path / "out"), expected)
    note = checkpoints.provenance(tmp_path / "out")["tensors"]["output_layer.weight"]
    assert note["rows"] == [{"fate": "merged", "rows": [0, 9]}, {"fate": "kept", "rows": [9, rows[0]]}]


def test_padding_is_the_bases_even_if_nothing_else_is(tmp_path, capsys):
    """With alpha 0; and other padding is another merge."""
    paths = write_padded(tmp_path, (12, 16, 10), (9, 9, 9))
    for value in (0.125, 3.5):
        merge_verb.run(Config(merge=settings(paths, tmp_path / "out", alpha=0.0)))
        assert capsys.readouterr().out.splitlines()[-1].startswith("merged")
        found = checkpoints.read(tmp_path / "out")["output_layer.weight"]
        assert torch.equal(found[9:], torch.full((3, 7), value).bfloat16())
        assert torch.equal(found[:9], reference(coefficients=lambda at: [0.0, 0.25, 0.75])["output", None, None])
        shutil.rmtree(paths[0])
        tensors = padded(spellings.stacked(spellings.model(0)), 12, 3.5)
        (checkpoints.write(paths[0], tensors, checkpoints.rows) / "config.json").write_text('{"vocab_size": 9}')


def test_without_a_word_equal_rows_are_all_merged(tmp_path):
    paths = write_padded(tmp_path, (12, 12, 12), (None, None, None))
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    merged = checkpoints.read(tmp_path / "out")["output_layer.weight"]
    assert torch.equal(merged[9:], torch.full((3, 7), 0.125 * 1 + 0.1 + 0.6).bfloat16())


class Foreign:
    """Of a class that must not be loaded."""

    def __setstate__(self, state):
        raise AssertionError("an object of a checkpoint was made")


def test_megatrons_arguments_say_the_size_too(tmp_path):
    paths = write_padded(tmp_path, (12, 16, 10), (9, None, 9))
    arguments = argparse.Namespace(vocab_size=9, params_dtype=torch.bfloat16, tokenizer=Foreign())
    torch.save({"args": arguments}, paths[1] / "common.pt")
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    assert same(checkpoints.read(tmp_path / "out"), padded(spellings.stacked(reference()), 12, 0.125))


@pytest.mark.parametrize(
    "rows, sizes, given, message",
    [
        ((12, 16, 10), (9, 8, 9), 0, r"different vocabularies, 9 tokens \(.*s0/config.json\) and 8 .*merge.vocab_size"),
        ((12, 12, 12), (9, 9, 8), 0, "different vocabularies"),
        ((12, 16, 10), (9, None, 9), 0, r"have 10 and 12 and 16 rows, and nothing says .*s1 .*merge.vocab_size"),
        ((12, 16, 10), (None, None, None), 0, "have 10 and 12 and 16 rows"),
        ((12, 16, 10), (9, 9, 9), 11, "s2 has 10 rows in its vocabulary, merge.vocab_size says 11 tokens"),
        ((12, 16, 10), (11, 11, 11), 0, r"s2 has 10 rows in its vocabulary, .*config\.json says 11 tokens"),
    ],
)
def test_vocabularies_that_cannot_be_reconciled(tmp_path, rows, sizes, given, message):
    paths = write_padded(tmp_path, rows, sizes)
    torch.save({"args": argparse.Namespace(tokenizer=Foreign())}, paths[1] / "common.pt")
    refused(settings(paths, tmp_path / "out", vocab_size=given), message)


def test_a_damaged_config_is_named(tmp_path):
    paths = write_padded(tmp_path, (12, 12, 12), (9, 9, 9))
    (paths[2] / "config.json").write_text("{")
    refused(settings(paths, tmp_path / "out"), r"cannot read .*s2/config\.json: ")


# Tied embeddings.


def tied(weights: spellings.Model) -> spellings.Model:
    return {at: tensor for at, tensor in weights.items() if at[0] != "output"}


@pytest.mark.parametrize("spell", [spellings.stacked, spellings.hf])
def test_tied_embeddings(tmp_path, spell):
    models = [spellings.model(seed) for seed in range(3)]
    write = write_hf if spell is spellings.hf else checkpoints.write
    both = [
        [write(tmp_path / f"{name}{seed}", spell(change(models[seed]))) for seed in range(3)]
        for name, change in (("untied", dict), ("tied", tied))
    ]
    merge_verb.run(Config(merge=settings(both[1], tmp_path / "all")))
    terms = list(zip(models, COEFFICIENTS))
    assert same(checkpoints.read(tmp_path / "all"), spell(tied(spellings.merged(terms))))

    merge_verb.run(Config(merge=settings([both[0][0], both[1][1], both[0][2]], tmp_path / "member")))
    models[1]["output", None, None] = models[1]["embedding", None, None]
    assert same(checkpoints.read(tmp_path / "member"), spell(spellings.merged(list(zip(models, COEFFICIENTS)))))

    refused(
        settings([both[1][0], *both[0][1:]], tmp_path / "base"),
        "tied0 has tied embeddings and .*untied1 has not: .* take the untied one as merge.pretrained",
    )


def test_an_output_layer_that_is_missing_is_no_tied_one(tmp_path):
    paths = [write_hf(tmp_path / "base", spellings.hf(spellings.model(0)))]
    paths.append(write_hf(tmp_path / "cut", spellings.hf(tied(spellings.model(1))), '{"tie_word_embeddings": false}'))
    refused(settings(paths, tmp_path / "out", weights=[1.0]), r"cut has no lm_head\.weight and is not tied")


# Dtypes.


def write_dtypes(tmp_path: Path, dtypes: list[torch.dtype], is_hf: bool = False) -> list[Path]:
    paths = []
    for seed, dtype in enumerate(dtypes):
        weights = spellings.model(seed, dtype=dtype)
        if is_hf:
            paths.append(write_hf(tmp_path / f"s{seed}", spellings.hf(weights), '{"dtype": "float32"}'))
        else:
            paths.append(checkpoints.write(tmp_path / f"s{seed}", spellings.stacked(weights)))
    return paths


def exact(dtypes: list[torch.dtype]) -> spellings.Model:
    models = [spellings.model(seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    return {at: sum(m[at].double() * c for m, c in zip(models, COEFFICIENTS)) for at in models[0]}


MIXED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("is_hf", [False, True])
@pytest.mark.parametrize("dtypes", [MIXED, MIXED[1:2] * 3])
def test_dtype_of_the_output(tmp_path, wanted, is_hf, dtypes):
    paths = write_dtypes(tmp_path, dtypes, is_hf)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", dtype=wanted)))
    found = checkpoints.read(tmp_path / "out")
    spelled = (spellings.hf if is_hf else spellings.stacked)(exact(dtypes))
    for key, value in found.items():
        biased = key.endswith("bias")
        assert value.dtype == (torch.float32 if biased else getattr(torch, wanted)), "the router's bias stays float32"
        half_ulp = torch.finfo(value.dtype).eps / 2
        assert (value.double() - spelled[key]).abs().le(spelled[key].abs() * half_ulp * 1.0001 + 1e-7).all(), key
    if is_hf:
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": wanted}
        loaded = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(loaded[key], value) for key, value in found.items())
        with SafetensorsReader(tmp_path / "out") as out:
            assert all(e.chunks[0].start % e.dtype.itemsize == 0 for e in out.tensors.values()), "each is aligned"


def test_what_the_base_keeps_wider_than_its_embeddings_stays_wide(tmp_path):
    paths = []
    for seed in range(2):
        weights = spellings.model(seed)
        weights = {at: tensor.float() if at[0] == "router" else tensor for at, tensor in weights.items()}
        paths.append(checkpoints.write(tmp_path / f"s{seed}", spellings.stacked(weights)))
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", weights=[1.0], dtype="float16")))
    found = checkpoints.read(tmp_path / "out")
    assert found["decoder.layers.mlp.router.weight"].dtype == torch.float32
    assert found["decoder.layers.self_attention.linear_qkv.weight"].dtype == torch.float16


@pytest.mark.parametrize("wanted", [{}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("wide", [0, 1])
def test_the_routers_bias_is_float32_if_one_source_has_it_so(tmp_path, wide, wanted):
    narrow = torch.bfloat16
    weights = [spellings.model(seed, dtype=narrow) for seed in range(2)]
    for seed, tensors in enumerate(weights):
        tensors |= {at: t.float() if seed == wide else t.to(narrow) for at, t in tensors.items() if at[0] == "bias"}
    paths = [checkpoints.write(tmp_path / f"s{seed}", spellings.stacked(each)) for seed, each in enumerate(weights)]
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", weights=[1.0], alpha=0.5, **wanted)))
    for key, value in checkpoints.read(tmp_path / "out").items():
        assert value.dtype == (torch.float32 if key.endswith("bias") else narrow), key
        if key.endswith("bias"):
            mean = sum(checkpoints.read(path)[key].float() for path in paths) / 2
            torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)


def test_dtypes_that_differ_are_named(tmp_path):
    refused(
        settings(write_dtypes(tmp_path, MIXED), tmp_path / "out"),
        r"differ in the dtype of decoder\.final_layernorm\.weight "
        r"\(torch\.float32 and torch\.bfloat16\), .*merge\.dtype",
    )


def test_a_sum_outside_the_chosen_dtype_is_refused(tmp_path):
    tensors = [{"decoder.w": torch.full((4,), 1e5)} for _ in range(2)]
    paths = [checkpoints.write(tmp_path / f"s{i}", t) for i, t in enumerate(tensors)]
    refused(
        settings(paths, tmp_path / "out", weights=[1.0], dtype="float16"), "too large for torch.float16: .*merge.dtype"
    )


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_quantised_tensors_are_refused(tmp_path, dtype):
    paths = [checkpoints.write(tmp_path / f"s{i}", {"decoder.w": torch.ones(4).to(torch.float8_e4m3fn)}) for i in "ab"]
    refused(settings(paths, tmp_path / "out", weights=[1.0], dtype=dtype), "sa holds quantised tensors .decoder.w.")


# Chunks and files.


def test_chunks_are_cut_anew(tmp_path, monkeypatch):
    paths = write_three(tmp_path, [spellings.stacked, spellings.by_layer, spellings.singleton])
    monkeypatch.setattr(
        pipeline,
        "make_output_spec",
        lambda s: dataclasses.replace(pipeline.OutputSpec(), chunk_bytes=128, file_bytes=512),
    )
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    assert same(checkpoints.read(tmp_path / "out"), spellings.stacked(reference()))
    with TorchDistReader(tmp_path / "out") as out, TorchDistReader(paths[0]) as base:
        assert any(len(out.tensors[key].chunks) != len(entry.chunks) for key, entry in base.tensors.items())
        for entry in out.tensors.values():
            assert all(torch.Size(chunk.sizes).numel() * entry.dtype.itemsize <= 128 for chunk in entry.chunks)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.distcp")]
    assert len(sizes) > 3


def test_the_settings_cut_in_mebibytes(tmp_path):
    tensors = {"decoder.w": torch.randn(5, 3 << 18)}
    paths = [checkpoints.write(tmp_path / f"s{i}", tensors) for i in range(2)]
    merge_verb.run(
        Config(merge=settings(paths, tmp_path / "out", weights=[1.0], chunk_mib=1, file_mib=4, verify="none"))
    )
    with TorchDistReader(tmp_path / "out") as out:
        assert [c.sizes for c in out.tensors["decoder.w"].chunks] == [(1, 1 << 18)] * 15
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 4
    assert torch.equal(checkpoints.read(tmp_path / "out")["decoder.w"], tensors["decoder.w"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunk_mib": 8, "file_mib": 4}, "merge.file_mib is 4 and merge.chunk_mib is 8"),
        ({"memory_mib": 512, "threads": 20}, r"merge.memory_mib is 512: at least \d+ are needed with 20 threads"),
        ({"chunk_mib": -1}, "merge.chunk_mib is -1"),
        ({"dtype": "fp8"}, "merge.dtype is 'fp8': choose bfloat16, float16 or float32"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, changes, message):
    refused(settings(write_three(tmp_path, [spellings.stacked] * 3), tmp_path / "out", **changes), message)


def test_safetensors_have_no_chunks(tmp_path):
    paths = write_three(tmp_path, [spellings.hf] * 3)
    refused(
        settings(paths, tmp_path / "out", chunk_mib=1), "merge.chunk_mib is for torch_dist: .*s0 holds every tensor"
    )


def in_files(monkeypatch, file_bytes: int) -> None:
    monkeypatch.setattr(
        pipeline, "make_output_spec", lambda s: pipeline.OutputSpec(torch.float32, file_bytes=file_bytes)
    )


@pytest.mark.parametrize("file_bytes", [300, 2000, 1 << 20])
def test_safetensors_files_of_a_chosen_size(tmp_path, monkeypatch, file_bytes):
    """Other files and another dtype than the base's: headers and index are our own, as transformers reads them."""
    paths = write_three(tmp_path, [spellings.hf, spellings.hf_fused, spellings.hf])
    in_files(monkeypatch, file_bytes)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {key: value for file in files for key, value in load_file(file).items()}
    models = [spellings.model(seed) for seed in range(3)]
    expected = {at: sum(m[at].double() * c for m, c in zip(models, COEFFICIENTS)).float() for at in models[0]}
    assert same(found, spellings.hf(expected))
    index = tmp_path / "out" / "model.safetensors.index.json"
    if file_bytes == 1 << 20:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
    else:
        told = json.loads(index.read_text())
        assert told["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        assert told["weight_map"] == {key: file.name for file in files for key in load_file(file)}
        for number, file in enumerate(files, 1):
            assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= file_bytes
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_safetensors_in_other_files_go_on_after_a_kill(tmp_path, monkeypatch):
    paths = write_three(tmp_path, [spellings.hf, spellings.hf_fused, spellings.hf])
    prepare = pipeline.open_and_plan
    form = pipeline.OutputSpec(torch.float32, file_bytes=700)
    monkeypatch.setattr(pipeline, "open_and_plan", lambda *a, **k: prepare(*a, **{**k, "output_spec": form}))
    broken, unbroken = settings(paths, tmp_path / "broken"), settings(paths, tmp_path / "unbroken")
    assert in_child(merge_in_small_units, unbroken) == 0
    assert in_child(merge_in_small_units, broken, 3) == -9
    assert in_child(merge_in_small_units, broken) == 0
    assert content(tmp_path / "broken") == content(tmp_path / "unbroken") != {}


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"chunk_mib": 1}, {"file_mib": 1}, {"vocab_size": 9}])
def test_another_form_is_another_merge(tmp_path, capsys, changes):
    paths = write_three(tmp_path, [spellings.stacked] * 3)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", **changes)))
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged")
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", **changes)))
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing to do")


def test_as_many_threads_as_the_memory_has_room_for(tmp_path):
    three = settings(["base", "a", "b"], tmp_path / "out")
    wide = settings(["base", "a", "b"], tmp_path / "out", sweep=[0.1, 0.2, 0.5, 0.7, 0.9], alpha=None)
    assert choose_threads(wide, make_jobs(wide), most=8) == 8, "the default memory has room for a sweep on any machine"
    tight = dataclasses.replace(three, memory_mib=100)
    assert choose_threads(tight, make_jobs(three), most=8) == 2
    with pytest.raises(UserError, match="merge.memory_mib is 39: at least 40 are needed with 1 thread$"):
        choose_threads(dataclasses.replace(three, memory_mib=39), make_jobs(three), most=8)
