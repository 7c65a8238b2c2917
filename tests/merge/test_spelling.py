"""Sources that name, stack or cut the same weights otherwise."""

import multiprocessing
from pathlib import Path

import checkpoints
import pytest
import spellings
import torch
from safetensors.torch import save_file
from test_command import content, in_child, merge_in_small_units, peer, refused

from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Merge
from megatron_bai.merge.execution import tiles
from megatron_bai.merge.tensor_names.canonical_names import canonical_box
from megatron_bai.merge.tensor_names.param_groups import matches

COEFFICIENTS = [0.6, 0.4 * 0.25, 0.4 * 0.75]
LAYOUTS = [checkpoints.whole, checkpoints.rows, checkpoints.columns]


def settings(paths: list[Path], output: Path, **changes) -> Merge:
    base, *members = map(str, paths)
    usual = dict(weights=[0.25, 0.75], alpha=0.6, verify="all")
    return Merge(pretrained=base, members=members, output=str(output), **usual | changes)


def write_hf(path: Path, tensors: checkpoints.Tensors, config: str = "{}") -> Path:
    path.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(config)
    return path


def write_three(tmp_path: Path, spells, dense: int = 0) -> list[Path]:
    """Models 0, 1 and 2, the first as base; Megatron's in three layouts."""
    paths = []
    for seed, (spell, layout) in enumerate(zip(spells, LAYOUTS)):
        tensors, path = spell(spellings.model(seed, dense)), tmp_path / f"s{seed}"
        is_hf = spell in (spellings.hf, spellings.hf_fused)
        paths.append(write_hf(path, tensors) if is_hf else checkpoints.write(path, tensors, layout))
    return paths


def same(found: checkpoints.Tensors, expected: checkpoints.Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in expected.items()
    )


def reference(dense: int = 0, coefficients=None) -> spellings.Model:
    terms = [(spellings.model(seed, dense), number) for seed, number in enumerate(COEFFICIENTS)]
    return spellings.merged(terms, coefficients)


@pytest.mark.parametrize("first", range(len(spellings.MEGATRON)))
@pytest.mark.parametrize("tile", [7, tiles.TILE])
def test_megatrons_spellings_merge_into_the_bases(tmp_path, monkeypatch, first, tile):
    """In tiles of 7 elements too: every region of a view is read, whatever it is cut from."""
    monkeypatch.setattr(tiles, "TILE", tile)
    base, *others = spellings.MEGATRON[first:] + spellings.MEGATRON[:first]
    for i, members in enumerate(zip(others, others[1:] + others[:1])):
        (tmp_path / str(i)).mkdir()
        paths = write_three(tmp_path / str(i), [base, *members])
        merge_verb.run(Config(merge=settings(paths, tmp_path / f"out{i}")))
        assert same(checkpoints.read(tmp_path / f"out{i}"), base(reference())), [s.__name__ for s in members]


@pytest.mark.parametrize("local", [False, True])
def test_models_that_begin_with_dense_layers(tmp_path, local):
    """The norm before a dense MLP is called like a fused one in Megatron's local layers and under TE alike."""
    spells = [spellings.by_layer, lambda w: spellings.singleton(w, local), spellings.by_layer]
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        ordered = spells[i:] + spells[:i]
        paths = write_three(tmp_path / str(i), ordered, dense=1)
        merge_verb.run(Config(merge=settings(paths, tmp_path / f"out{i}")))
        assert same(checkpoints.read(tmp_path / f"out{i}"), ordered[0](reference(dense=1)))


@pytest.mark.parametrize("fused", [0, 1])
def test_fused_and_separate_experts_of_hugging_face(tmp_path, fused):
    spells = [spellings.hf_fused, spellings.hf, spellings.hf_fused][fused:] + [spellings.hf]
    paths = write_three(tmp_path, spells[:3], dense=1)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out")))
    assert same(checkpoints.read(tmp_path / "out"), spells[0](reference(dense=1)))


def test_a_view_is_only_made_where_it_is_needed(tmp_path, capsys):
    paths = write_three(tmp_path, [spellings.by_layer, spellings.by_layer, spellings.stacked])
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", dry_run=True)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("read under other names")]
    assert lines == [f"read under other names or shapes: {paths[2]}"]


def test_killed_it_goes_on_under_other_spellings(tmp_path):
    paths = write_three(tmp_path, [spellings.stacked, spellings.singleton, spellings.by_layer])
    broken, unbroken = settings(paths, tmp_path / "broken"), settings(paths, tmp_path / "unbroken")
    assert in_child(merge_in_small_units, unbroken) == 0
    assert in_child(merge_in_small_units, broken, 2) == -9
    assert in_child(merge_in_small_units, broken) == 0
    assert content(tmp_path / "broken") == content(tmp_path / "unbroken") != {}


def test_ranks_share_the_work_under_other_spellings(tmp_path):
    paths = write_three(tmp_path, [spellings.stacked, spellings.singleton, spellings.by_layer])
    merge_verb.run(Config(merge=settings(paths, tmp_path / "alone")))
    context = multiprocessing.get_context("fork")
    arguments = 2, str(tmp_path / "store"), settings(paths, tmp_path / "together")
    group = [context.Process(target=peer, args=(rank, *arguments)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0]
    assert same(checkpoints.read(tmp_path / "together"), checkpoints.read(tmp_path / "alone"))


# Ranges of layers.


def in_layers_1_and_2(at) -> list[float]:
    """For alpha_for {layers.1-2/experts: 1, layers.0: 0, router: 0.25}."""
    kind, layer, expert = at
    alpha = 0.6
    if kind in ("router", "bias"):
        alpha = 0.25
    if layer == 0:
        alpha = 0.0
    if layer in (1, 2) and expert is not None:
        alpha = 1.0
    return [alpha, (1 - alpha) * 0.25, (1 - alpha) * 0.75]


RANGES = {"layers.1-2/experts": 1.0, "layers.0": 0.0, "router": 0.25}


@pytest.mark.parametrize(
    "spells",
    [
        [spellings.stacked, spellings.by_layer, spellings.stacked],
        [spellings.singleton, spellings.stacked, spellings.by_layer],
        [spellings.hf, spellings.hf_fused, spellings.hf],
        [spellings.hf_fused] * 3,
    ],
)
def test_ranges_of_layers_have_their_own_coefficients(tmp_path, spells):
    paths = write_three(tmp_path, spells)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", alpha_for=RANGES)))
    assert same(checkpoints.read(tmp_path / "out"), spells[0](reference(coefficients=in_layers_1_and_2)))


def test_provenance_and_plan_name_the_parts_of_a_tensor(tmp_path, capsys):
    paths = write_three(tmp_path, [spellings.stacked] * 3)
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", alpha_for={"layers.1": 0.5}, dry_run=True)))
    assert "decoder.layers.mlp.router.weight[1:2]: 0.5, 0.125, 0.375" in capsys.readouterr().out
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", alpha_for={"layers.1": 0.5})))
    note = checkpoints.provenance(tmp_path / "out")["tensors"]["decoder.layers.mlp.router.weight"]
    assert note["rows"] == [
        {"fate": "merged", "rows": [0, 1]},
        {"fate": "merged", "rows": [1, 2], "coefficients": [0.5, 0.125, 0.375]},
        {"fate": "merged", "rows": [2, 3]},
    ]


@pytest.mark.parametrize(
    "pattern, key, layer, found",
    [
        ("layers.3", "decoder.layers.mlp.router.weight", 3, True),
        ("layers.3", "decoder.layers.30.mlp.router.weight", 30, False),
        ("layers.0-11/experts", "decoder.layers.mlp.experts.experts.linear_fc1.weight", 11, True),
        ("layers.0-11/experts", "decoder.layers.mlp.experts.experts.linear_fc1.weight", 12, False),
        ("layers.0-11/experts", "decoder.layers.mlp.router.weight", 3, False),
        ("layers.0-11/q_proj|k_proj", "model.layers.3.self_attn.k_proj.weight", 3, True),
        ("layers.0-11", "model.norm.weight", None, False),
        (r"layers\.[01]\.", "model.layers.1.mlp.gate.weight", 1, True),
        ("layers.0-11x", "decoder.layers.0-11x", None, True),
    ],
)
def test_patterns(pattern, key, layer, found):
    assert matches(pattern, key, layer) == found


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("layers.5-3", "'layers.5-3' names no layer"),
        ("layers.3-9", "'layers.3-9' of merge.alpha_for fits no tensor"),
        ("layers.0/roter", "'layers.0/roter' of merge.alpha_for fits no tensor"),
    ],
)
def test_ranges_that_choose_nothing_are_refused(tmp_path, pattern, message):
    paths = write_three(tmp_path, [spellings.stacked] * 3)
    refused(settings(paths, tmp_path / "out", alpha_for={pattern: 0.5}), message)


# What does not match, by name.


def changed(tmp_path: Path, change, base=spellings.stacked, other=spellings.by_layer, dense: int = 0) -> Merge:
    """A merge of two whose second was changed, in its own spelling."""
    tensors = other(spellings.model(1, dense))
    change(tensors)
    paths = [
        checkpoints.write(tmp_path / "base", base(spellings.model(0, dense))),
        checkpoints.write(tmp_path / "other", tensors),
    ]
    return settings(paths, tmp_path / "out", weights=[1.0])


QKV = "decoder.layers.2.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("decoder.final_layernorm.weight"), r"other lacks decoder\.final_layernorm\.weight of .*base"),
        (lambda t: t.update({"decoder.gain": torch.ones(2)}), r"base lacks decoder\.gain of .*other"),
        (
            lambda t: t.update({QKV: torch.ones(7, 7)}),
            r"holds 161 of the 168 elements of decoder.layers.self_attention",
        ),
        (lambda t: t.pop(QKV.replace("2", "1")), r"holds 112 of the 168 elements of decoder\.layers\.self_attention"),
        (lambda t: t.pop(QKV), r"number of layers of decoder\.layers\.self_attention\.linear_qkv\.weight \(3 and 2\)"),
        (
            lambda t: t.update({QKV.replace("2.", "3."): torch.ones(8, 7).bfloat16()}),
            r"number of layers of decoder\.layers\.self_attention\.linear_qkv\.weight \(3 and 4\)",
        ),
    ],
)
def test_differences_are_named(tmp_path, change, message):
    refused(changed(tmp_path, change), message)


def test_experts_are_counted(tmp_path, monkeypatch):
    base = checkpoints.write(tmp_path / "base", spellings.stacked(spellings.model(0)))
    monkeypatch.setattr(spellings, "EXPERTS", 5)
    other = checkpoints.write(tmp_path / "other", spellings.singleton(spellings.model(1)))
    refused(settings([base, other], tmp_path / "out", weights=[1.0]), r"number of experts of .* \(4 and 5\)")


def test_half_an_expert_is_named(tmp_path):
    settings = changed(tmp_path, lambda t: t.pop(FC1 + "_v"), spellings.singleton, spellings.singleton)
    refused(settings, rf"other lacks {FC1}_v of .*base")
    (tmp_path / "again").mkdir()
    settings = changed(tmp_path / "again", lambda t: t.pop(FC1 + "_v"), spellings.stacked, spellings.singleton)
    refused(settings, r"holds 805 of the 840 elements of decoder\.layers\.mlp\.experts\.experts\.linear_fc1\.weight")


def test_one_layer_dense_in_one_source_only(tmp_path):
    paths = [
        checkpoints.write(tmp_path / "base", spellings.by_layer(spellings.model(0, dense=1))),
        checkpoints.write(tmp_path / "other", spellings.by_layer(spellings.model(1))),
    ]
    refused(
        settings(paths, tmp_path / "out", weights=[1.0]), r"other lacks decoder\.layers\.0\.mlp\.linear_fc1\.weight"
    )


def test_a_norm_under_both_names_is_refused(tmp_path):
    both = {f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": torch.ones(7).bfloat16() for layer in range(3)}
    refused(changed(tmp_path, lambda t: t.update(both)), "hold the same weights: remove one of them")


@pytest.mark.parametrize(
    "key, shape, name, origin",
    [
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (3, 4, 6, 5), "=", (0, 0, 0, 0)),
        ("decoder.layers.2.mlp.shared_experts.linear_fc1.weight_v", (5, 6),
         "decoder.layers.mlp.shared_experts.linear_fc1.weight", (2, 5, 0)),
        ("mtp.layers.0.eh_proj.weight", (6, 12), "mtp.layers.eh_proj.weight", (0, 0, 0)),
        ("mtp.layers.1.mtp_model_layer.mlp.router.weight", (4, 6),
         "mtp.layers.transformer_layer.mlp.router.weight", (1, 0, 0)),
        ("mtp.layers.0.transformer_layer.mlp.experts.experts.2.linear_fc1.weight_v", (5, 6),
         "mtp.layers.transformer_layer.mlp.experts.experts.linear_fc1.weight", (0, 2, 5, 0)),
        ("decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight", (6,),
         "decoder.layers.self_attention.kv_layernorm.weight", (1, 0)),
        ("model.language_model.layers.1.mlp.experts.3.down_proj.weight", (6, 5),
         "model.language_model.layers.mlp.experts.down_proj", (1, 3, 0, 0)),
        ("model.layers.1.mlp.experts.gate_up_proj.weight", (4, 10, 6),
         "model.layers.mlp.experts.gate_up_proj", (1, 0, 0, 0)),
        ("decoder.layers.scale", (), "=", ()),
    ],
)  # fmt: skip
def test_places(key, shape, name, origin):
    found = canonical_box(key, shape)
    assert (found.name, found.origin) == (key if name == "=" else name, origin)


def test_layers_of_multi_token_prediction_are_counted_apart():
    assert canonical_box("mtp.layers.0.eh_proj.weight", (6, 12)).layers is None
    assert canonical_box("decoder.layers.mlp.router.weight", (3, 4, 6)).layers == range(3)


@pytest.mark.parametrize("fused", [0, 1])
def test_transformers_loads_what_was_merged_from_fused_and_separate_experts(tmp_path, fused):
    """A Qwen3-MoE saved as transformers saves it and as it holds it, in other files and another dtype than the base."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[0], dtype=torch.float32,
    )  # fmt: skip
    models, paths = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Qwen3MoeForCausalLM(config).eval())
        paths.append(tmp_path / str(seed))
        if seed == fused:
            write_hf(paths[-1], models[-1].state_dict(), models[-1].config.to_json_string())
        else:
            models[-1].save_pretrained(paths[-1])
    merge_verb.run(Config(merge=settings(paths, tmp_path / "out", weights=[1.0], alpha=0.5, dtype="bfloat16")))
    keys = checkpoints.read(tmp_path / "out")
    assert ("model.layers.1.mlp.experts.gate_up_proj" in keys) == (fused == 0)
    merged = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.dtype == torch.bfloat16, "as config.json says"
    found = merged.state_dict()
    for name, a in models[0].state_dict().items():
        mean = (a.float() * 0.5 + models[1].state_dict()[name].float() * 0.5).bfloat16()
        assert torch.equal(found[name], mean), name


METHODS = {
    "slerp": dict(t=0.3, alpha=None, weights=[]),
    "ties": dict(density=0.4, alpha=None, weights=[]),
    "dare": dict(drop_rate=0.5, seed=3, alpha=None, weights=[]),
}


def unstacked(tensors: checkpoints.Tensors) -> spellings.Model:
    """The parameters of a checkpoint spelled by `spellings.stacked`."""
    found = {}
    for kind, layer, expert in spellings.model(0):
        name = spellings._name(kind, expert is not None, local=False)
        tensor = tensors[spellings.NAMES[kind] if layer is None else f"decoder.layers.{name}"]
        found[kind, layer, expert] = tensor[() if layer is None else (layer,) if expert is None else (layer, expert)]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_whole_parameters_do_not_see_how_these_are_spelled(tmp_path, method):
    """Angles, thresholds and random choices are those of one expert's matrix, in one piece or in two halves."""

    def merge(name: str, spells) -> checkpoints.Tensors:
        (tmp_path / name).mkdir()
        paths = write_three(tmp_path / name, spells)
        merge_verb.run(Config(merge=settings(paths, tmp_path / f"{name}-out", method=method, **METHODS[method])))
        return checkpoints.read(tmp_path / f"{name}-out")

    found = unstacked(merge("all-stacked", [spellings.stacked] * 3))
    for i, base in enumerate(spellings.MEGATRON):
        members = spellings.MEGATRON[i - 1], spellings.MEGATRON[i - 2]
        assert same(merge(str(i), [base, *members]), base(found)), base.__name__
    spells = spellings.hf_fused, spellings.hf
    fused, separate = (merge(spell.__name__, [spell, *spells]) for spell in spells)
    for layer, expert in ((0, 0), (2, 3)):
        both = fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert].chunk(2)
        for half, name in zip(both, ("gate_proj", "up_proj")):
            assert torch.equal(half, separate[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"])


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_padding_of_the_vocabulary_is_in_no_measure(tmp_path, method):
    key, rows = "embedding.word_embeddings.weight", spellings.TOKENS
    out = []
    for padding in (0, 3):
        paths = []
        for seed in range(3):
            tensors = spellings.stacked(spellings.model(seed))
            for name in (key, "output_layer.weight"):
                filler = torch.full((padding, spellings.HIDDEN), 100.0 * (seed + 1), dtype=torch.bfloat16)
                tensors[name] = torch.cat([tensors[name], filler])
            paths.append(checkpoints.write(tmp_path / f"{padding}-{seed}", tensors, checkpoints.rows))
        target = tmp_path / f"{padding}-out"
        merge_verb.run(Config(merge=settings(paths, target, method=method, vocab_size=rows, **METHODS[method])))
        out.append(checkpoints.read(target)[key])
    assert torch.equal(out[0], out[1][:rows])
    assert bool((out[1][rows:] == 100).all()), "the base's"
