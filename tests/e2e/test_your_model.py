"""The commands of docs/your-model.md, as printed, on a small model of another family than Qwen3."""

import itertools
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, succeeded
from fake_judge import serve_judge
from outside import EXAMPLES, install_example
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/your-model.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def publish(directory: Path) -> None:
    """Write a random Mixtral with a tokenizer of bytes."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)
    sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, initializer_range=0.1)
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=264, **sizes, **heads, **experts, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    MixtralForCausalLM(config).save_pretrained(directory)
    whole.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which all commands ran, one after the other."""
    place = tmp_path_factory.mktemp("yours")
    publish(place / "my-model")
    shutil.copy(EXAMPLES / "rows.jsonl", place)
    for number, command in enumerate(COMMANDS):
        succeeded(Command(place / "logs" / str(number), *shlex.split(command), cwd=place))
    return place


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_there_are_ten() -> None:
    assert len(COMMANDS) == 10 and all(command.startswith("megatron-bai ") for command in COMMANDS)


def test_the_run_replayed_every_route(place: Path) -> None:
    steps = steps_of(place / "runs/mine")
    assert [step["step"] for step in steps] == [1, 2, 3] and "eval_accuracy" in steps[-1]
    assert all(step["route_coverage"] == 1.0 and step["sync_gap"] < 1e-4 for step in steps)
    assert "<html" in (place / "runs/mine/report.html").read_text()[:1000].lower()


def test_what_comes_out_is_what_went_in_with_other_weights(place: Path) -> None:
    found, given = (load_file(place / name / "model.safetensors") for name in ("trained-hf", "my-model"))
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in given.items()}
    assert any(not torch.equal(found[key], given[key]) for key in given)
    model = AutoModelForCausalLM.from_pretrained(place / "trained-hf")
    tokenizer = AutoTokenizer.from_pretrained(place / "trained-hf")
    assert model.config.model_type == "mixtral" and tokenizer.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "What is 3+4?"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all()


def test_it_learns_from_a_judge_with_the_objective_of_a_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples together; a judge that has no mark for some costs their samples."""
    (train,) = (command for command in COMMANDS if " torchrun " in command)
    run, words = place / "runs" / "judged", [word for word in shlex.split(train) if "trainer.eval_every" not in word]
    words += ["objective=weighted_reinforce", "reward=function", "reward.function=llm_judge:judge", "trainer.steps=1"]
    for path in (EXAMPLES, install_example(place / "site")):
        monkeypatch.setenv("PYTHONPATH", str(path), prepend=os.pathsep)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    number = itertools.count()

    def mark(message: str) -> tuple[int, str]:
        mine = next(number)
        return 200, f"Mark: {mine % 11}" if mine % 4 else "no mark"

    with serve_judge(mark) as (url, requests):
        monkeypatch.setenv("JUDGE_URL", url)
        succeeded(Command(place / "logs" / "judged", *words, f"run.dir={run}", "trainer.save=''", cwd=place))
    (step,) = steps_of(run)
    assert len(requests) == 16 and step["reward_failed_fraction"] == 0.25
    assert step["grad_norm"] > 0 and 0 < step["positive_fraction"] < 1 and step["reward_mean"] > 0
