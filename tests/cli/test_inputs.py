"""What people give for a checkpoint, through every verb: each kind has a line of its own, and nothing is written."""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from tiers import tiered
from whole_models import write_torch_dist

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.formats import checkpoint_format, require_model
from megatron_bai.cli import compose, convert, entry_point, inspect_verb, merge, plan, serve, train
from megatron_bai.config import Config, Merge
from megatron_bai.errors import UserError
from megatron_bai.rl import init_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "num_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 4, "vocab_size": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
Files = dict[str, bytes | str]


def put(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def hf(path: Path, changes: dict[str, Any] | None = None, drop: str = "", **tensors: torch.Tensor) -> Path:
    """Enough of a Hugging Face checkpoint to be taken for a model."""
    weights = {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)} | tensors
    weights.pop(drop, None)
    described = {key: value for key, value in (CONFIG | (changes or {})).items() if value is not None}
    files: Files = {"config.json": json.dumps(described), "tokenizer.json": "{}"}
    put(path, files)
    save_file(weights, path / "model.safetensors")
    return path


def megatron(path: Path, described: bool = True, drop: str = "", **more: torch.Tensor) -> Path:
    """Likewise of one of Megatron-Core's."""
    tensors = {"embedding.word_embeddings.weight": torch.ones(8, 4), "output_layer.weight": torch.ones(8, 4)} | more
    tensors.pop(drop, None)
    path.mkdir(parents=True)
    write_torch_dist(path, tensors)
    return put(path, {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}"} if described else {})


def without(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).unlink()
    return path


def quantised(path: Path, method: str, **tensors: torch.Tensor) -> Path:
    return hf(path, {"quantization_config": {"quant_method": method}}, **tensors)


def packed(path: Path, dtype: str) -> Path:
    """A safetensors file whose header names a dtype that torch has not."""
    hf(path)
    header = json.dumps({"lm_head.weight": {"dtype": dtype, "shape": [8, 4], "data_offsets": [0, 16]}}).encode()
    return put(path, {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(16)})


def linked(path: Path) -> Path:
    path.symlink_to(path.parent / "gone")
    return path


Q = "model.layers.0.self_attn.q_proj"
F8, I32, U8, I8 = torch.float8_e4m3fn, torch.int32, torch.uint8, torch.int8
WEIGHTS = save({"x": torch.ones(1)})
# kind → what makes it at a path (returning what is given), and what the line says of it
NO_CHECKPOINT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, r"no checkpoint at .*given: give the directory of one"),
    "repository": (lambda p: Path("Qwen/Qwen3-30B-A3B"), r"`hf download Qwen/Qwen3-30B-A3B --local-dir DIR`"),
    "address": (lambda p: Path("https://huggingface.co/Qwen/Qwen3-30B-A3B"), "addresses are not read, download it"),
    "dangling link": (linked, "is a link to .*gone, which does not exist"),
    "file": (lambda p: hf(p) / "model.safetensors", "it is a file, give its directory .*given"),
    "a file alone": (lambda p: put(p, {"notes": "x"}) / "notes", "it is a file, give the directory of a checkpoint"),
    "a GGUF file": (lambda p: put(p, {"a.gguf": "x"}) / "a.gguf", "a file of GGUF weights, which are not read"),
    "archive": (lambda p: put(p, {"a.tar": "x"}) / "a.tar", "it is an archive, unpack it"),
    "empty": (lambda p: p.mkdir() or p, "holds neither .*: it is empty"),
    "adapter": (
        lambda p: put(
            p,
            {
                "adapter_config.json": '{"base_model_name_or_path": "Qwen/Q"}',
                "adapter_model.safetensors": WEIGHTS,
            },
        ),
        r"is a LoRA adapter of Qwen/Q \(adapter_config.json\), no model: merge it into its base first",
    ),
    "adapter.bin": (lambda p: put(p, {"adapter_model.bin": "x", "tokenizer.json": "{}"}), "is a LoRA adapter"),
    "GGUF": (lambda p: put(p, {"q-Q4_K_M.gguf": "GGUF", "config.json": "{}"}), r"GGUF weights \(q-Q4_K_M.gguf\)"),
    "bin": (
        lambda p: put(p, {"pytorch_model.bin": "x", "config.json": json.dumps(CONFIG), "tokenizer.json": "{}"}),
        r"pickled weights alone \(pytorch_model.bin\).*save_pretrained writes safetensors",
    ),
    "sharded bin": (
        lambda p: put(p, {"pytorch_model-00001-of-00002.bin": "x", "pytorch_model.bin.index.json": "{}"}),
        r"pickled weights alone \(pytorch_model-00001-of-00002.bin\)",
    ),
    "bin pointer": (lambda p: put(p, {"pytorch_model.bin": POINTER}), r"pytorch_model.bin, a git-LFS pointer\)"),
    "consolidated.pth": (lambda p: put(p, {"consolidated.00.pth": "x", "params.json": "{}"}), "pickled weights alone"),
    "flax": (lambda p: put(p, {"flax_model.msgpack": "x"}), "holds weights as flax_model.msgpack: only"),
    "weights pointer": (lambda p: put(hf(p), {"model.safetensors": POINTER}), "model.safetensors is a git-LFS pointer"),
    "index pointer": (
        lambda p: put(without(hf(p), "model.safetensors"), {"model.safetensors.index.json": POINTER}),
        "index.json is a git-LFS pointer",
    ),
    "shard pointer": (
        lambda p: put(
            without(hf(p), "model.safetensors"),
            {
                "model.safetensors.index.json": json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}),
                "model-00001-of-00001.safetensors": POINTER,
            },
        ),
        "model-00001-of-00001.safetensors is a git-LFS pointer",
    ),
    "tokenizer pointer": (lambda p: put(hf(p), {"tokenizer.json": POINTER}), "tokenizer.json is a git-LFS pointer"),
    "SentencePiece pointer": (lambda p: put(hf(p), {"tokenizer.model": POINTER}), "tokenizer.model is a git-LFS"),
    "distcp pointer": (lambda p: put(megatron(p), {"__0_0.distcp": POINTER}), "__0_0.distcp is a git-LFS pointer"),
    "config alone": (lambda p: put(p, {"config.json": "{}"}), "it has config.json and no weights"),
    "other name": (lambda p: put(p, {"model.fp16.safetensors": WEIGHTS}), "holds model.fp16.safetensors, and neither"),
    "cached repository": (
        lambda p: put(p, {"refs/main": "ab12", "snapshots/ab12/config.json": "{}", "snapshots/zz/config.json": "{}"}),
        "in Hugging Face's cache: give the directory of a revision, .*/snapshots/ab12$",
    ),
    "cache": (
        lambda p: put(p, {"models--Qwen--Q/refs/main": "ab12", "version.txt": "1"}),
        "is Hugging Face's cache: .*models--Qwen--Q/snapshots/REVISION",
    ),
    "diffusers": (
        lambda p: put(p, {"model_index.json": "{}", "unet/diffusion_pytorch_model.safetensors": WEIGHTS}),
        r"holds a diffusers model \(model_index.json\)",
    ),
    "diffusers part": (lambda p: put(p, {"diffusion_pytorch_model.safetensors": WEIGHTS}), "holds a diffusers model"),
    "legacy Megatron": (
        lambda p: put(p, {"mp_rank_00/model_optim_rng.pt": "x"}),
        r"legacy format \(mp_rank_00/\).*--ckpt-convert-format torch_dist",
    ),
    "DeepSpeed": (
        lambda p: put(p, {"global_step5/mp_rank_00_model_states.pt": "x", "latest": "global_step5"}),
        "is a checkpoint of DeepSpeed .*zero_to_fp32.py",
    ),
    "original DCP": (
        lambda p: without(megatron(p, described=False), "common.pt", "metadata.json"),
        "is a checkpoint of torch.distributed.checkpoint .*export it as safetensors",
    ),
    "unfinished": (lambda p: without(megatron(p, described=False), ".metadata", "metadata.json"), "was never finished"),
    "no .metadata": (lambda p: without(megatron(p), ".metadata"), "has no .metadata: it was never finished"),
    "no common.pt": (lambda p: without(megatron(p), "common.pt"), "has no common.pt: it was never finished"),
    "no metadata.json": (lambda p: without(megatron(p), "metadata.json"), "has no metadata.json: it was never"),
    "lost file": (lambda p: without(megatron(p), "__0_0.distcp"), "__0_0.distcp is missing: restore"),
    "zarr": (lambda p: put(megatron(p), {"metadata.json": '{"sharded_backend": "zarr"}'}), "in the format zarr"),
    "of a Trainer": (
        lambda p: put(p, {"checkpoint-5/model.safetensors": WEIGHTS, "trainer_state.json": "{}"}),
        "itself: give the directory of one, .*/checkpoint-5$",
    ),
    "something else": (lambda p: put(p, {"a": "", "b": "", "c": "", "d": ""}), "holds neither .*: it has a, b, c …"),
}  # fmt: skip
# Kinds that `inspect` describes, and says what is wrong; it compares the latter alone.
QUANTISED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "float8": (lambda p: hf(p, **{f"{Q}.weight": torch.ones(4, 4).to(F8)}), r"quantised tensors .*, float8_e4m3fn"),
    "fp8 blocks": (
        lambda p: quantised(
            p, "fp8", **{f"{Q}.weight": torch.ones(4, 4).to(F8), f"{Q}.weight_scale_inv": torch.ones(1)}
        ),
        "quantised tensors .*float8 in blocks",
    ),
    "GPTQ": (
        lambda p: quantised(p, "gptq", **{f"{Q}.qweight": torch.ones(4, 4, dtype=I32), f"{Q}.scales": torch.ones(4)}),
        "quantised tensors .*; GPTQ or AWQ",
    ),
    "AWQ without config": (lambda p: hf(p, **{f"{Q}.qweight": torch.ones(4, dtype=I32)}), "quantised tensors"),
    "bitsandbytes 8": (
        lambda p: hf(p, **{f"{Q}.weight": torch.ones(4, 4, dtype=I8), f"{Q}.SCB": torch.ones(4)}), "; bitsandbytes",
    ),
    "bitsandbytes 4": (
        lambda p: hf(p, **{f"{Q}.weight": torch.ones(8, 1, dtype=U8), f"{Q}.weight.absmax": torch.ones(4)}),
        "; bitsandbytes",
    ),
    "compressed": (lambda p: hf(p, **{f"{Q}.weight_packed": torch.ones(4, dtype=I32)}), "; compressed-tensors"),
    "int8": (lambda p: hf(p, **{f"{Q}.weight": torch.ones(4, 4, dtype=I8)}), "quantised tensors .*, int8"),
    "by config": (lambda p: quantised(p, "bitsandbytes"), r"quantised \(quantization_config, bitsandbytes\)"),
    "MLX": (lambda p: hf(p, {"quantization": {"bits": 4}}), r"the weights are quantised \(quantization"),
    "complex": (lambda p: hf(p, **{f"{Q}.weight": torch.ones(4, dtype=torch.complex64)}), "holds complex numbers"),
    "Megatron float8": (lambda p: megatron(p, **{"decoder.w": torch.ones(4).to(F8)}), r"quantised tensors .decoder.w,"),
    "Megatron int8": (lambda p: megatron(p, **{"decoder.w.weight": torch.ones(4, dtype=I8)}), "quantised tensors"),
}  # fmt: skip
LOST: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no lm_head": (lambda p: hf(p, drop="lm_head.weight"), "given has no lm_head.weight and is not tied"),
    "no lm_head, by default": (
        lambda p: hf(p, {"tie_word_embeddings": None}, "lm_head.weight"), "given has no lm_head.weight and is not tied",
    ),
    "no output layer": (
        lambda p: megatron(p, drop="output_layer.weight"), "given has no output_layer.weight and is not tied",
    ),
}  # fmt: skip
PACKED = {name: (lambda p, name=name: packed(p, name), "quantised tensors") for name in ("F4", "F6_E2M3")}
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = NO_CHECKPOINT | QUANTISED | LOST | PACKED


def merged(given: Path, base: bool) -> Merge:
    is_megatron = any((given / name).exists() for name in ("metadata.json", ".metadata"))
    other = (megatron if is_megatron else hf)(Path("other").absolute())
    first, second = (given, other) if base else (other, given)
    return Merge(pretrained=str(first), members=[str(second)], weights=[1.0], alpha=0.5, output="out")


@functools.cache
def defaults() -> Config:
    config.register_schema()
    return compose.compose([])


def run_of(**settings: Any) -> Config:
    return dataclasses.replace(defaults(), run=config.Run(dir="run"), **settings)


# verb → how it is called on what is given
VERBS: dict[str, Callable[[Path], None]] = {
    "merge": lambda p: merge.run(Config(merge=merged(p, True))),
    "merge member": lambda p: merge.run(Config(merge=merged(p, False))),
    "inspect": lambda p: inspect_verb.run(Config(inspect=config.Inspect(path=str(p)))),
    "inspect other": lambda p: inspect_verb.run(
        Config(inspect=config.Inspect(path=str(hf(Path("other"))), other=str(p)))
    ),
    "convert": lambda p: convert.run(Config(convert=config.Convert(source=str(p), target="out"))),
    "serve": lambda p: serve.run(run_of(serve=config.Serve(checkpoint=str(p)))),
    "train": lambda p: train.run(run_of(init=config.CheckpointInit(checkpoint=str(p)))),
    "train merge": lambda p: train.run(run_of(init=config.MergeInit(), merge=merged(p, False))),
    "train critic": lambda p: train.run(run_of(objective=config.Ppo(critic_checkpoint=str(p)))),
    "plan": lambda p: plan.run(run_of(init=config.CheckpointInit(checkpoint=str(p)))),
    "plan merge": lambda p: plan.run(run_of(init=config.MergeInit(), merge=merged(p, True))),
    "plan critic": lambda p: plan.run(run_of(objective=config.Ppo(critic_checkpoint=str(p)))),
}


def tree(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if "other" not in each.parts}


PAIRS = [(kind, verb) for kind in KINDS for verb in VERBS]
# Each kind by a third of the verbs, and each verb by a third of the kinds.
QUICK = {pair for i, pair in enumerate(PAIRS) if (i % len(VERBS) + i // len(VERBS)) % 3 == 0}


@pytest.mark.parametrize("pair", tiered(PAIRS, QUICK), ids=": ".join)
def test_each_kind_has_its_line_in_every_verb(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, verb = pair
    monkeypatch.chdir(tmp_path)
    make, said = KINDS[kind]
    given = make(tmp_path / "given")
    before = tree(tmp_path)
    if verb == "inspect" and kind in QUANTISED | LOST:
        VERBS[verb](given)
        assert re.search(said, " ".join(capsys.readouterr().out.split()))
        return
    if verb == "inspect other" and kind in LOST:
        VERBS[verb](given)
        return
    if verb.startswith("plan") and kind in ("missing", "dangling link"):
        said = "given does not exist"
    if kind == "dangling link" and "merge" in verb:
        said = "(does not exist|no checkpoint at .*gone)"  # it resolves paths first
    with pytest.raises(UserError, match=said) as caught:
        VERBS[verb](given)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("megatron_files", [True, False])
def test_of_iterations_without_a_tracker_one_is_named(megatron_files: bool, tmp_path: Path) -> None:
    for name in ("iter_0000500", "release"):
        megatron(tmp_path / name) if megatron_files else put(tmp_path / name, {"mp_rank_00/model_optim_rng.pt": "x"})
    said = "holds iterations of a run: give the directory of one, .*/release or .*/iter_0000500$"
    with pytest.raises(UserError, match=said):
        checkpoint_format(tmp_path)


@pytest.mark.parametrize(
    ("results", "steps", "said"),
    [
        ([], [], "holds none; trainer.save and trainer.save_every"),
        ([], [2, 10, 100000], "such as .*/checkpoints/step-100000, or another of 3$"),
        (["actor"], [4], "such as .*run/actor, or another of 2$"),
        (["actor"], [], "such as .*run/actor$"),
    ],
)
def test_of_a_runs_directory_its_checkpoints_are_named(
    results: list[str], steps: list[int], said: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    put(run, {"config.yaml": "", "metrics.jsonl": "", "checkpoints/.step-00200/x": "", "checkpoints/step-00300/x": ""})
    for name in (*results, *(f"checkpoints/step-{step:05}" for step in steps)):
        megatron(run / name)
    with pytest.raises(UserError, match=f"is the directory of a run, and no checkpoint: .*{said}"):
        checkpoint_format(run)
    if steps:
        with pytest.raises(UserError, match=f"give the directory of one, such as .*step-{steps[-1]:05}"):
            checkpoint_format(run / "checkpoints")


def test_a_model_is_taken(tmp_path: Path) -> None:
    assert require_model(hf(tmp_path / "hf")) == "hf"
    state = {"optimizer.state.exp_avg.weight": torch.ones(4, dtype=U8), "rng_state.weight": torch.ones(4, dtype=U8)}
    assert require_model(megatron(tmp_path / "megatron", **state, **{"decoder.table": torch.arange(3)})) == "megatron"
    put(tmp_path / "hf", {"pytorch_model.bin": POINTER, "q.gguf": "x", "adapter_config.json": "{}", "x.pth": "x"})
    assert require_model(tmp_path / "hf") == "hf"  # what lies beside a model is not taken for it
    tied = hf(tmp_path / "tied", {"tie_word_embeddings": True}, "lm_head.weight")
    assert require_model(tied) == "hf"


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: Path("Qwen/Qwen3-8B"), "`hf download Qwen/Qwen3-8B"),
        (lambda p: put(p, {"tokenizer.json": POINTER}), "tokenizer.json is a git-LFS pointer"),
        (lambda p: put(p, {"tokenizer.model": "x"}), "holds no tokenizer.json"),
        (lambda p: put(p, {"tokenizer.json": "{}"}) / "tokenizer.json", "it is a file, give"),
    ],
)
def test_a_rewards_tokenizer(
    make: Callable[[Path], Path], said: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward = config.RewardModel(url="http://127.0.0.1:1", send="chat", tokenizer=str(make(tmp_path / "given")))
    with pytest.raises(UserError, match=f"^reward.tokenizer.*{said}"):
        {"train": train, "plan": plan}[verb].run(run_of(reward=reward))
    assert not (tmp_path / "run").exists()


def test_a_commit_that_was_killed_is_completed_by_whoever_asks(tmp_path: Path) -> None:
    stage = manifest.make_staging_dir(tmp_path / "c")
    hf(stage)
    manifest.finalize(stage, tmp_path / "c", {})
    (tmp_path / "c").rename(stage)
    (tmp_path / ".c.replaced").mkdir()
    assert checkpoint_format(tmp_path / "c") == "hf"


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "convert.source=given", "convert.target=out"],
        ["inspect", "inspect.path=given"],
        ["serve", "serve.checkpoint=given", "run.dir=run"],
        ["train", "init=checkpoint", "init.checkpoint=given", "run.dir=run"],
        ["plan", "init=checkpoint", "init.checkpoint=given", "run.dir=run"],
        ["merge", "merge.pretrained=given", "merge.members=[given]", "merge.weights=[1]", "merge.output=out"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_ends_with_one_line_and_2(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-bai", *words])
    monkeypatch.setattr(entry_point.signal, "signal", lambda *args: None)
    put(tmp_path / "given", {"adapter_model.safetensors": WEIGHTS})
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "is a LoRA adapter" in said
    assert tree(tmp_path) == before


def test_what_a_run_starts_from_is_looked_at_before_ranks_meet(tmp_path: Path) -> None:
    settings = run_of(init=config.CheckpointInit(checkpoint=str(hf(tmp_path / "c", drop="lm_head.weight"))))
    with pytest.raises(UserError, match="^init.checkpoint: .*no lm_head.weight"):
        init_weights.require_sources(settings)
