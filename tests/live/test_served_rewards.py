"""A real reward model behind a real SGLang server: its scores are those of transformers."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import free_port
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from megatron_bai import config, rewards
from megatron_bai.data.task import Prompt
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.rewards import Item
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.sglang_server import _environment

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("forked_servers")]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}{% endfor %}<eos>"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with one output. SGLang's head has a bias, Hugging Face's none: without one in the file it would
    be whatever the head was initialised with."""
    path = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = dict(vocab_size=64, pad_token_id=0, eos_token_id=1, num_labels=1)
    settings = Qwen3Config(**sizes, **ids, head_dim=16, max_position_embeddings=256, initializer_range=0.2)
    Qwen3ForSequenceClassification(settings).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"score.bias": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = build_tokenizer(config.Arithmetic(), 64)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    port = free_port()
    options = ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags = ["--is-embedding", "--disable-radix-cache", "--disable-cuda-graph", "--sleep-on-idle"]
    sizes = ["--dtype", "float32", "--max-total-tokens", "8192", "--max-running-requests", "16"]
    where = ["--model-path", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "megatron_bai.rollout.servers.server_main", "--parent", str(os.getpid())]
    log = checkpoint.parent / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [*command, *where, *sizes, *options, *flags], stdout=out, stderr=out, env=_environment("cpu")
        )
    try:
        deadline = time.monotonic() + 900
        while not control.is_healthy(f"http://127.0.0.1:{port}"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()  # its workers end with it
        server.wait()


def test_scores_are_those_of_transformers(url: str, checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = Qwen3ForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    items = []
    for i in range(12):
        question, response = f"{i}+{i * 7}", f"answer:{i * 8}"
        text = f"<user>{question}<assistant>"
        prompt = Prompt(tokenizer.encode(text), text, "", ({"role": "user", "content": question},))
        items.append(Item(prompt, response, [*tokenizer.encode(response), tokenizer.eos_token_id]))

    def wanted(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits)

    open_end = [wanted([*item.prompt.ids, *item.ids[:-1]]) for item in items]
    with_end = [wanted([*item.prompt.ids, *item.ids]) for item in items]
    chat = {"send": "chat", "tokenizer": str(checkpoint)}
    for settings, expected in (({}, open_end), ({"send": "ids"}, with_end), (chat, with_end)):
        with rewards.open_scorer(config.RewardModel(url=url, concurrency=4, **settings), None, Path("no")) as scorer:
            found = scorer(items)
        assert [score.value for score in found] == pytest.approx(expected, abs=1e-4), settings
    assert len({round(value, 3) for value in with_end}) == len(items)


def test_what_the_server_refuses_costs_its_sample(url: str) -> None:
    good, bad = (Item(Prompt([3, 4], "", ""), "", ids) for ids in ([5, 1], [5] * 300))  # longer than the context
    with rewards.open_scorer(config.RewardModel(url=url, send="ids", retries=0), None, Path("no")) as scorer:
        first, second, third = scorer([good, bad, good])
    assert second.value is None
    assert first.value == pytest.approx(third.value, rel=1e-5)  # they may have shared a batch, or not
    assert "refused a request with 400" in second.failure, second.failure
