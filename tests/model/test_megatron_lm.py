"""Megatron-LM's save directories are taken as they stand, and its `--load` takes what is written here."""

import argparse
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from moe import MODEL
from processes import TESTS, launch
from safetensors.torch import load_file, save_file

from megatron_bai import config
from megatron_bai.checkpoint import formats, iterations, manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.torch_dist import DistcpFileWriter, write_index
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import differences, read_architecture
from megatron_bai.model.megatron_lm import arguments, megatron_lm_state

TRACKER = "latest_checkpointed_iteration.txt"


def save_directory(path: Path, tracker: str | None, *names: str) -> Path:
    for name in names:
        (path / name).mkdir(parents=True)
    if tracker is not None:
        (path / TRACKER).write_text(tracker)
    return path


@pytest.mark.parametrize(
    ("tracker", "found"),
    [("123\n", "iter_0000123"), (" 7", "iter_0000007"), ("release", "release"), ("12345678", "iter_12345678")],
)
def test_a_save_directory_stands_for_the_checkpoint_that_its_tracker_names(
    tracker: str, found: str, tmp_path: Path
) -> None:
    path = save_directory(tmp_path, tracker, "iter_0000123", "iter_0000007", "release", "iter_12345678")
    assert iterations.resolve_iteration(path) == path / found


@pytest.mark.parametrize(
    ("tracker", "names", "said"),
    [
        ("", ["iter_0000005"], "holds '', which is neither .* the directory of that, .*/iter_0000005$"),
        ("12x", ["iter_0000012"], "holds '12x', which is neither an iteration's number nor 'release'"),
        ("9" * 99, [], "which is neither"),
        ("6", ["iter_0000005"], "names 6, and there is no iter_0000006 beside it: .*, .*/iter_0000005$"),
        ("release", [], "names release, and there is no release beside it"),
        (None, ["iter_0000005", "iter_0000006"], "holds iterations of a run: give the directory of one, .*_0000006"),
        ("5", ["iter_0000005/mp_rank_00"], r"iter_0000005 is a checkpoint in Megatron-LM's legacy format"),
        ("5", ["iter_0000005"], "iter_0000005 holds neither .*: it is empty"),
    ],
)
@pytest.mark.parametrize("take", [open_checkpoint, formats.checkpoint_format, formats.require_model])
def test_an_iteration_that_cannot_be_taken_is_named(
    take: Callable[[Path], object], tracker: str | None, names: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        take(save_directory(tmp_path, tracker, *names))


def test_settings_that_name_checkpoints_name_iterations_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_directory(tmp_path / "save", "3", "iter_0000003")
    found = str(path / "iter_0000003")
    settings = config.Config(
        init=config.CheckpointInit(checkpoint=str(path)),
        objective=config.Ppo(critic_checkpoint=str(path)),
        merge=config.Merge(pretrained=str(path), members=[str(path), "elsewhere"], output=str(path)),
        convert=config.Convert(source=str(path), target=str(path)),
        inspect=config.Inspect(path=str(path), other=str(path)),
        serve=config.Serve(checkpoint=str(path)),
    )
    caplog.set_level("INFO")
    settings = iterations.resolve_settings(settings)
    init, objective = asdict(settings.init), asdict(settings.objective)
    assert init["checkpoint"] == objective["critic_checkpoint"] == settings.serve.checkpoint == found
    assert (settings.merge.pretrained, settings.merge.members) == (found, [found, "elsewhere"])
    assert (settings.convert.source, settings.inspect.path, settings.inspect.other) == (found, found, found)
    assert settings.convert.target == settings.merge.output == str(path), "what is written is not resolved"
    assert f"init.checkpoint: {path} is at iter_0000003" in caplog.text
    (path / TRACKER).write_text("4")
    with pytest.raises(UserError, match=r"^init\.checkpoint: .*names 4"):
        iterations.resolve_settings(config.Config(init=config.CheckpointInit(checkpoint=str(path))))


# What Megatron-LM's arguments are of a model here, and what of them makes another model.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "no norms of queries": ({"qk_layernorm": False}, "qk_layernorm is False, not True"),
    "biases": ({"add_bias_linear": True}, "add_bias_linear is True"),
    "shared expert": ({"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size is 8"),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
    "latent attention": ({"multi_latent_attention": True}, "multi_latent_attention is True"),
    "partly rotated": ({"rotary_percent": 0.5}, "rotary_percent is 0.5"),
    "not said": ({"kv_channels": None}, "do not say kv_channels"),
    "vocabulary": ({"vocab_size": None, "padded_vocab_size": None}, "do not say padded_vocab_size"),
    "tied": ({"untie_embeddings_and_output_weights": None}, "do not say untie_embeddings_and_output_weights"),
    "layers": ({"moe_layer_freq": [1, 0]}, r"moe_layer_freq \[1, 0\] for 4 layers"),
    "sizes": ({"num_query_groups": 3}, "is not a multiple of"),
}


def write_arguments(path: Path, **changes: Any) -> Path:
    """As Megatron-LM saves them, with what no plain value is among them."""
    values = arguments(read_architecture(path)) | {"exit_signal": signal.SIGTERM} | changes
    torch.save({"args": argparse.Namespace(**values), "iteration": 3}, path / "common.pt")
    (path / "config.json").unlink()
    return path


@pytest.fixture
def described(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(published.read("qwen3_moe_dense_mix")))
    return tmp_path


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_dense_mix"])
def test_arguments_tell_the_architecture(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read(name)))
    wanted = read_architecture(tmp_path)
    assert differences(read_architecture(write_arguments(tmp_path)), wanted) == {}


def test_a_frequency_counts_from_the_first_layer(described: Path) -> None:
    found = read_architecture(write_arguments(described, moe_layer_freq=2))
    assert found.moe_layers == (0, 2)


@pytest.mark.parametrize(("given", "rows"), [(50, 50), (None, 72)])
def test_padding_is_no_token_where_the_arguments_say_so(given: int | None, rows: int, described: Path) -> None:
    assert read_architecture(write_arguments(described, vocab_size=given)).vocab_size == rows


@pytest.mark.parametrize("name", OTHERS)
def test_arguments_of_another_model_are_named(name: str, described: Path) -> None:
    changes, said = OTHERS[name]
    with pytest.raises(UserError, match=said):
        read_architecture(write_arguments(described, **changes))


def test_what_is_written_has_what_megatron_lm_asks_for(described: Path) -> None:
    state = megatron_lm_state(read_architecture(described), "/save/iter_0000012")
    assert (state["iteration"], state["checkpoint_version"]) == (12, 3.0)
    assert megatron_lm_state(read_architecture(described), "/save/mine")["iteration"] == 0
    # `check_checkpoint_args` and the layout that older releases compare; not add_position_embedding, whose default
    # is that of the command line
    names = {"num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"}
    names |= {"tensor_model_parallel_size", "pipeline_model_parallel_size", "no_save_optim", "no_save_rng"}
    assert names <= vars(state["args"]).keys() and not hasattr(state["args"], "add_position_embedding")


def test_what_gpt_oss_has_is_said_by_the_names_of_their_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read("gpt_oss")))
    found = arguments(read_architecture(tmp_path))
    wanted = {
        "swiglu": False, "quick_geglu": True, "add_bias_linear": True, "softmax_type": "learnable",
        "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0, "window_size": (7, 0),
        "window_attn_skip_freq": [1, 0, 1, 0], "position_embedding_type": "yarn",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted and "activation_func" not in found
    with pytest.raises(UserError, match="are not a Qwen3-MoE's"):
        read_architecture(write_arguments(tmp_path))


@pytest.mark.parametrize("name", ["release", "iter_0000012", "step-12"])
def test_a_tracker_names_what_has_the_name_of_an_iteration(name: str, tmp_path: Path) -> None:
    for weights in ("model.safetensors", "__0_0.distcp"):
        stage = manifest.make_staging_dir(tmp_path / name)
        (stage / weights).write_text("x")
        manifest.finalize(stage, tmp_path / name, {})
        tracker = tmp_path / TRACKER
        if weights == "model.safetensors" or name == "step-12":
            assert not tracker.exists()
        else:
            assert tracker.read_text() == {"release": "release", "iter_0000012": "12"}[name]


def test_what_another_tool_completed_is_complete(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, hf / "model.safetensors")
    path = tmp_path / "save" / "iter_0000004"
    path.mkdir(parents=True)
    with DistcpFileWriter(path, "__0_0") as file:
        file.write_tensor("embedding.word_embeddings.weight", (0, 0), torch.ones(2, 2))
        written = file.written_items
    torch.save({}, path / "common.pt")
    write_index(path, [("embedding.word_embeddings.weight", torch.float32, (2, 2))], written)
    with pytest.raises(UserError, match=r"iter_0000004 has no manifest\.json"):
        formats.require_complete(path)
    (path.parent / TRACKER).write_text("4")
    assert formats.require_complete(path) == formats.require_complete(path.parent) == formats.require_complete(hf) == {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron_lm")
    launch(TESTS / "model" / "megatron_lm_worker.py", directory)
    return directory


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as reader:
        return {key: reader.read(key, (0,) * len(e.shape), e.shape).clone() for key, e in reader.tensors.items()}


@pytest.mark.distributed
@pytest.mark.long
def test_training_starts_from_megatron_lms_directory_as_from_the_published_weights(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "theirs", tmp_path / "actor")
    shutil.copytree(made / "hf", tmp_path / "hf")
    for directory in (tmp_path / "actor" / "iter_0000300", tmp_path / "hf"):
        build_tokenizer(config.Arithmetic(), MODEL.vocab_size).save_pretrained(directory)
    tune = ["train", "objective=sft", "init=checkpoint", "supervised.rows=4", "supervised.length=48", "trainer.steps=3"]
    tune += ["trainer.micro_batch_size=4", "trainer.eval_every=0", "backend.kind=cpu"]
    cases = {
        name: [*tune, f"init.checkpoint={tmp_path}/{name}", f"run.dir={tmp_path}/run_{name}", f"trainer.save={target}"]
        for name, target in (("actor", tmp_path / "tuned" / "iter_0000003"), ("hf", tmp_path / "tuned_hf"))
    }
    members = [f"merge.pretrained={tmp_path}/actor", f"merge.members=[{tmp_path}/tuned]", "merge.alpha=0.5"]
    cases["merged"] = ["merge", *members, f"merge.output={tmp_path}/merged"]
    launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(cases))
    said = {name: (tmp_path / f"{name}.err").read_text() for name in cases}
    assert not any(json.loads((tmp_path / "codes.json").read_text()).values()), said
    assert (tmp_path / "tuned" / TRACKER).read_text() == "3"
    before, after, published_too, merged = map(
        read, (made / "ours", tmp_path / "tuned", tmp_path / "tuned_hf", tmp_path / "merged")
    )
    assert before.keys() == after.keys() == published_too.keys() == merged.keys()
    for key, value in after.items():
        assert torch.equal(value, published_too[key]) and not torch.equal(value, before[key]), key
        rows = slice(MODEL.vocab_size if value.shape[0] == MODEL.vocab_size else None)  # the base's padding stays
        torch.testing.assert_close(merged[key][rows], (before[key] + value) / 2)

    launch(TESTS / "model" / "megatron_lm_run_worker.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{run}.pt", weights_only=False) for run in ("first", "second"))
    weights = load_file(made / "hf" / "model.safetensors")
    for found, wanted in ((first["actor"], weights), (second["actor"], weights), (second["critic"], first["trained"])):
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert [step["route_coverage"] for run in (first, second) for step in run["steps"]] == [1.0] * 4
    assert first["steps"][0]["value_mean"] == 0 != second["steps"][0]["value_mean"]


@pytest.mark.distributed
def test_megatron_lms_checkpoint_is_taken_and_ours_is_loaded_by_its_names(made: Path, tmp_path: Path) -> None:
    found = torch.load(made / "found.pt")
    assert found["same"] and found["common"]["args"]["num_layers"] == MODEL.num_layers
    assert (found["common"]["iteration"], found["common"]["checkpoint_version"]) == (12, 3.0)
    assert (made / "ours" / TRACKER).read_text() == "12"
    theirs, ours = made / "theirs", made / "ours"
    merge = [f"merge.pretrained={theirs}", f"merge.members=[{ours}]", "merge.alpha=0.5"]
    dtype = ["backend.kind=cpu", "backend.dtype=float32"]
    cases = {
        "converted": ["convert", f"convert.source={theirs}", f"convert.target={tmp_path}/converted", *dtype],
        "compared": ["inspect", f"inspect.path={theirs}", f"inspect.other={ours}"],
        "merged": ["merge", *merge, f"merge.output={tmp_path}/merged/release"],
        "planned": [
            "plan",
            "experiment=demo",
            "init=checkpoint",
            f"init.checkpoint={theirs}",
            "rollout.max_new_tokens=32",
        ],
    }
    launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(cases))
    codes = json.loads((tmp_path / "codes.json").read_text())
    said = {name: (tmp_path / f"{name}.out").read_text() + (tmp_path / f"{name}.err").read_text() for name in cases}
    assert (codes["converted"], codes["compared"], codes["merged"]) == (0, 0, 0), said
    assert "holds no tokenizer.json" in said["planned"] and "iter_0000300" in said["planned"], "that is all it lacks"
    wanted, converted = (
        load_file(made / "hf" / "model.safetensors"),
        load_file(tmp_path / "converted" / "model.safetensors"),
    )
    assert wanted.keys() == converted.keys() and all(torch.equal(wanted[key], converted[key]) for key in wanted)
    assert read_architecture(tmp_path / "converted").vocab_size == MODEL.vocab_size
    assert (tmp_path / "merged" / TRACKER).read_text() == "release"
