"""A checkpoint that a model could not be filled from, or settings contradict, is refused before anything starts."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import tiered
from whole_models import Tensors, copy_tokenizer, hf_tensors, megatron_tensors, write_hf, write_megatron

from megatron_bai import config
from megatron_bai.cli import convert, entry_point, inspect_verb, plan, serve, train
from megatron_bai.cli.compose import compose
from megatron_bai.config import Config
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.rl.run_architecture import plain_settings, resolve_architecture

TOKENIZER = Path(__file__).parent.parent / "data" / "head-2fa74aa" / "pretrained"
Write = Callable[[Path, Tensors], Path]


def changed(tensors: Tensors, change: str) -> Tensors:
    """With one of the router's tensors less, another shape of it, or one more."""
    key = next(key for key in tensors if key.endswith(("mlp.gate.weight", "mlp.router.weight")))
    if change == "less":
        return {name: tensor for name, tensor in tensors.items() if name != key}
    if change == "more":
        return tensors | {key.replace("weight", "bias"): torch.ones(3)}
    return tensors | {key: tensors[key][..., 1:].clone()}


MODELS: dict[str, tuple[Write, Callable[[], Tensors], str]] = {
    "hf less": (write_hf, hf_tensors, r"first model.layers.0.mlp.gate.weight \(missing\)"),
    "hf more": (write_hf, hf_tensors, r"first model.layers.0.mlp.gate.bias \(unknown\)"),
    "hf reshaped": (write_hf, hf_tensors, r"mlp.gate.weight has shape \(8, 47\), the model needs \(8, 48\)"),
    "megatron less": (write_megatron, megatron_tensors, "has no decoder.layers.mlp.router.weight: it is"),
    "megatron more": (write_megatron, megatron_tensors, "has decoder.layers.mlp.router.bias, which no model"),
    "megatron reshaped": (write_megatron, megatron_tensors, r"router.weight has shape \(4, 8, 47\), the model"),
}


def run_of(words: list[str]) -> Config:
    config.register_schema()
    return compose([*words, "run.dir=run", "rollout.max_new_tokens=8"])


def merged(given: Path, other: Path) -> list[str]:
    return [
        "init=merge", f"merge.pretrained={given}", f"merge.members=[{other}]", "merge.weights=[1.0]",
        "merge.alpha=0.5", "merge.output=out",
    ]  # fmt: skip


# verb → how it is called on what is given and a whole checkpoint of the same format, and the setting that is named
VERBS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "plan": (lambda p, _: plan.run(run_of(["init=checkpoint", f"init.checkpoint={p}"])), "init.checkpoint: "),
    "train": (lambda p, _: train.run(run_of(["init=checkpoint", f"init.checkpoint={p}"])), "init.checkpoint: "),
    "train sft": (
        lambda p, _: train.run(run_of(["objective=sft", "trainer.save=x", "init=checkpoint", f"init.checkpoint={p}"])),
        "init.checkpoint: ",
    ),
    "plan merge": (lambda p, other: plan.run(run_of(merged(p, other))), ""),
    "plan merged": (lambda p, other: plan.run(run_of([*merged(other, other), f"merge.output={p}"])), "init=merge: "),
    "plan member": (lambda p, other: plan.run(run_of(merged(other, p))), "members"),
    "train merge": (lambda p, other: train.run(run_of(merged(p, other))), "init=merge: "),
    "convert": (lambda p, _: convert.run(Config(convert=config.Convert(source=str(p), target="converted"))), ""),
    "serve": (lambda p, _: serve.run(run_of([f"serve.checkpoint={p}"])), ""),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("something is started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "init_backend", start)
    monkeypatch.setattr(serve, "SGLangServer", start)


PAIRS = [(kind, verb) for kind in MODELS for verb in VERBS]
# Each kind by a third of the verbs, and each verb by two kinds.
QUICK = {pair for i, pair in enumerate(PAIRS) if (i % len(VERBS) + i // len(VERBS)) % 3 == 0}


@pytest.mark.parametrize("pair", tiered(PAIRS, QUICK), ids=": ".join)
def test_what_is_wrong_with_a_model_is_named_before_anything_starts(pair: tuple[str, str], tmp_path: Path) -> None:
    kind, verb = pair
    write, tensors, said = MODELS[kind]
    call, setting = VERBS[verb]
    given = copy_tokenizer(TOKENIZER, write(tmp_path / "given", changed(tensors(), kind.split()[1])))
    other = copy_tokenizer(TOKENIZER, write(tmp_path / "other", tensors()))
    if verb in ("plan merge", "plan member"):  # the sources do not agree, or else the tensors are those of no model
        said = "|".join([said, "router", "gate"])
    with pytest.raises(UserError, match=said) as caught:
        call(given, other)
    assert "\n" not in str(caught.value) and (verb == "plan member" or str(caught.value).startswith(setting))
    assert {path.name for path in tmp_path.iterdir()} == {"given", "other"}


@pytest.mark.parametrize("kind", MODELS)
def test_inspect_says_that_other_verbs_refuse_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, tensors, said = MODELS[kind]
    write(tmp_path / "given", changed(tensors(), kind.split()[1]))
    inspect_verb.run(Config(inspect=config.Inspect(path="given")))
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(f"refused by other verbs: .*{said}", out)


@pytest.mark.parametrize("verb", [plan, train])
@pytest.mark.parametrize(
    ("critic", "said"),
    [
        (lambda p: write_megatron(p, megatron_tensors()), "given has no value_head.weight"),
        (lambda p: write_hf(p, hf_tensors()), "given is no torch_dist checkpoint: a critic's is"),
        (
            lambda p: write_megatron(p, megatron_tensors(critic=True), num_experts_per_tok=3),
            "given has moe_topk 3, the configured model.moe_topk is 2",
        ),
    ],
)
def test_a_critic_of_another_kind(verb: Any, critic: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    actor = copy_tokenizer(TOKENIZER, write_megatron(tmp_path / "actor", megatron_tensors()))
    given = critic(tmp_path / "given")
    words = ["init=checkpoint", f"init.checkpoint={actor}", "objective=ppo", f"objective.critic_checkpoint={given}"]
    with pytest.raises(UserError, match=f"^objective.critic_checkpoint: .*{said}"):
        verb.run(run_of(words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.norm_epsilon=1e-6"], r"model.norm_epsilon is 1e-06, and given has 1e-05: leave it out"),
        (["model.norm_epsilon=0"], r"model.norm_epsilon is 0.0, and given has 1e-05"),
        (["model.rope_theta=1e4"], r"model.rope_theta is 10000.0, and given has 5000.0"),
        (["model.num_layers=2"], r"model.num_layers is 2, and given has 4"),
        (["model=tiny"], r"model.hidden_size is 64, and given has 48"),
    ],
)
def test_what_is_typed_of_a_model_is_compared_also_where_random_weights_have_the_same(
    verb: str, words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    copy_tokenizer(TOKENIZER, write_megatron(tmp_path / "given", megatron_tensors(), rms_norm_eps=1e-5))
    monkeypatch.setattr(entry_point.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["megatron-bai", verb, "init=checkpoint", "init.checkpoint=given", *words])
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and re.search(said, error)


def test_what_is_left_out_is_the_checkpoints_or_with_random_weights_qwens(tmp_path: Path) -> None:
    write_megatron(tmp_path / "given", megatron_tensors(), rms_norm_eps=1e-5)
    for words, numbers in ((["init=checkpoint", "init.checkpoint=given"], (5000.0, 1e-5)), ([], (1e4, 1e-6))):
        settings = resolve_architecture(run_of([*words, "model.num_layers=4"]))
        for model in (settings.model, plain_settings(settings).model):
            assert (model.rope_theta, model.norm_epsilon) == numbers
    assert resolve_architecture(run_of(["model.norm_epsilon=0"])).model.norm_epsilon == 0
