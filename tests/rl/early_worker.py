"""`python early_worker.py DIRECTORY CASES`: starts of runs that cannot work, all in one process; what each one began.

CASES is a JSON file of lists of words of the command line, in which `DIR` is the directory. found.json gets, for each,
what it was refused with and what had been started until then.
"""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.cli import train
from megatron_bai.cli.compose import compose
from megatron_bai.cli.verbs import VERBS
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.rl import init_weights, run_architecture
from megatron_bai.rollout.servers.sglang_server import SGLangServer

CONFIG = {  # of `model=tiny`
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 4, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 256, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip

started: list[str] = []


class StartedError(Exception):
    """The run went as far as this."""


def record(what: str) -> Any:
    def start(*_: object, **__: object) -> None:
        started.append(what)
        raise StartedError(what)

    return start


def make_checkpoint(directory: Path, template: str | None) -> None:
    """Write what is read of a checkpoint before a model is built: architecture, tokenizer, and that it is complete."""
    stage = manifest.make_staging_dir(directory)
    (stage / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = build_tokenizer(config.Arithmetic(), 64)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(stage)
    manifest.finalize(stage, directory, {})


def make_runs(directory: Path) -> None:
    """Write what earlier starts left, each with one thing that cannot be used."""
    for name in ("summary", "config", "checkpoint", "link"):
        (directory / name).mkdir(parents=True)
    (directory / "summary" / "summary.json").write_text("[1]")
    (directory / "config" / "config.yaml").write_text("a: [1")
    (directory / "checkpoint" / "checkpoints").write_text("")
    (directory / "link" / "metrics.jsonl").symlink_to("nothing")
    damaged = directory / "damaged" / "checkpoints" / "step-00001"
    make_checkpoint(damaged, None)
    (damaged / "tokenizer.json").write_bytes(bytes(3))


def main(directory: Path, cases: list[list[str]]) -> None:
    make_checkpoint(directory / "model", "{% for m in messages %}{{ m.content }}{% endfor %}")
    make_checkpoint(directory / "failing", "{{ raise_exception('no such role') }}")
    make_checkpoint(directory / "cut", None)
    (directory / "cut" / "tokenizer.json").write_text("{")
    (directory / "unreadable").mkdir()
    (directory / "unreadable" / "tokenizer.json").write_text("{")
    (directory / "unreadable" / "config.json").write_text(json.dumps(CONFIG))
    manifest.finalize(manifest.make_staging_dir(directory / "empty"), directory / "empty", {})
    shutil.copy(directory / "empty" / "manifest.json", directory / "unreadable")
    make_runs(directory / "runs")
    rows = [{"prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(60)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "file").write_text("")
    sources = init_weights.list_sources
    init_weights.list_sources = lambda settings: [
        each for each in sources(settings) if each.setting != "init.checkpoint"
    ]  # which asks for weights, and these checkpoints have none
    run_architecture.require_tensors = lambda *_: None  # likewise
    build.init_parallel = record("model")  # type: ignore[assignment]
    SGLangServer.launch = record("server")  # type: ignore[method-assign]
    config.register_schema()
    busy = socket.create_server(("127.0.0.1", 0))
    found = []
    for number, words in enumerate(cases):
        started.clear()
        words = [
            f"run.dir={directory}/run-{number}",
            *(word.replace("DIR", str(directory)).replace("BUSY", str(busy.getsockname()[1])) for word in words),
        ]
        said = "nothing"
        try:
            train.run(compose(words, VERBS["train"]))
        except UserError as error:
            said = str(error)
        except BaseException as error:
            said = f"not refused: {error!r}"
        found.append([said, list(started)])
        print(words[1:], found[-1], flush=True)
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
