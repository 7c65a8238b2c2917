"""`python make_head.py TARGET`: what a head leaves on disk, for the tests of later heads to read and to go on with.

Run it with the head's package first on the path, from anywhere (see the README that it writes). It uses the command
line alone, so it can make the files of heads older than itself.

    pretrained, reasoning   supervised checkpoints, Megatron torch_dist
    merged                  their merge by BAI, and .again.unfinished the same one, killed before its provenance is
                            written; its units are finished
    converted               merged, in Hugging Face's form
    split                   pretrained in Hugging Face's form, as others publish it: several files, no manifest
    .again-hf.unfinished    a merge of those two, killed before its manifest is written
    run                     MiniRL and R3 from merged, killed in its third step of four; its rollouts are
                            partial and a step ahead, so the checkpoint holds samples; run/routes: a store
    finished                one step of PPO and R2; finished/routes: a store in the plain encoding
    critic                  its critic
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import rmtree

from recorded_sglang import Recorded, serve

HERE = Path(__file__).parent
URL = "http://127.0.0.1:1"  # in `commands.json`, in place of the server that answers
LAYERS, EXPERTS, TOPK, VOCABULARY = 2, 3, 2, 64
MODEL = [
    f"model.num_layers={LAYERS}", "model.hidden_size=8", "model.num_attention_heads=2", "model.num_query_groups=1",
    "model.head_dim=4", f"model.num_experts={EXPERTS}", f"model.moe_topk={TOPK}", "model.moe_ffn_hidden_size=8",
    f"model.vocab_size={VOCABULARY}", "model.max_position_embeddings=64", "model.init_std=0.1", "backend.kind=cpu",
]  # fmt: skip
SUPERVISED = [
    *MODEL, "run.dir=supervised", "objective=sft", "supervised.rows=4", "supervised.length=48", "trainer.steps=2",
    "trainer.micro_batch_size=4", "monitor.tensorboard=false",
]  # fmt: skip
BAI = ["merge.pretrained=pretrained", "merge.members=[reasoning]", "merge.weights=[1.0]"]
HF = ["merge.method=linear", "merge.pretrained=split", "merge.members=[split,converted]", "merge.weights=[0.5,0.5]"]
ROLLOUTS = [
    *MODEL, f"rollout.urls=[{URL}]", "rollout.sync=tensors", "rollout.sync_tolerance=1000", "rollout.max_new_tokens=16",
    "trainer.prompts_per_step=4", "trainer.group_size=2", "trainer.micro_batch_size=4", "monitor.tensorboard=false",
    "data.eval_prompts=4",
]  # fmt: skip
COMMANDS = {
    "pretrained": ["train", *SUPERVISED, "data.style=pretrained", "trainer.save=pretrained"],
    "reasoning": [
        "train", *SUPERVISED, "init=checkpoint", "init.checkpoint=pretrained", "data.style=reasoning",
        "trainer.save=reasoning",
    ],
    "merged": ["merge", *BAI, "merge.output=merged"],
    "again": ["merge", *BAI, "merge.output=again"],
    "converted": ["convert", "backend.kind=cpu", "convert.source=merged", "convert.target=converted"],
    "split": ["convert", "backend.kind=cpu", "convert.source=pretrained", "convert.target=split"],
    "again-hf": ["merge", *HF, "merge.output=again-hf"],
    "run": [
        "train", *ROLLOUTS, "init=merge", *BAI, "merge.output=merged", "run.dir=run", "objective=minirl",
        "objective.kl_penalty=0.01", "replay.mode=r3", "replay.store=run/routes", "rollout.partial_tokens=4",
        "rollout.overlap=true", "trainer.steps=4", "trainer.mini_batches=2", "trainer.tokens_per_micro_batch=64",
        "trainer.save=run/result", "trainer.save_every=1", "trainer.keep=1",
    ],
    "finished": [
        "train", *ROLLOUTS, "init=checkpoint", "init.checkpoint=merged", "run.dir=finished", "objective=ppo",
        "objective.critic_save=critic", "replay.mode=r2", "replay.store=finished/routes", "replay.store_encoding=plain",
        "trainer.steps=1", "trainer.mini_batches=1",
    ],
}  # fmt: skip
KILLED = {"again": ("*/provenance.json", 1), "again-hf": ("*/manifest.json", 1)}


def answering(directory: Path, seen: Callable[[str], None] = lambda version: None) -> AbstractContextManager[str]:
    """The server that the commands' URL stands for; gives its own."""
    return serve(Recorded(directory / "merged" / "tokenizer.json", LAYERS, EXPERTS, TOPK, VOCABULARY, seen))


def main(target: Path) -> None:
    target.mkdir(parents=True)
    for name in COMMANDS:
        if name == "run":
            _run_and_kill(target)
            continue
        die = KILLED.get(name)
        with answering(target) as url:
            _ended(_start(target, name, url, *(("--die", die[0], str(die[1])) if die else ())), -9 if die else 0)
        if name == "split":
            _split(target / "split")
    for file in [*target.glob("*/report.html"), *target.glob(".*.lock")]:
        file.unlink()  # what each head writes anew
    rmtree(target / "supervised")
    (target / "commands.json").write_text(json.dumps(COMMANDS, indent=1) + "\n")
    (target / "README.md").write_text(_readme())


def verb(directory: Path, words: Sequence[str], *how: str) -> subprocess.Popen:
    """Start the command line in a directory; `how` goes to `timeless.py`. What it prints goes to stderr."""
    command = [sys.executable, str(HERE / "timeless.py"), *how, *words]
    return subprocess.Popen(command, cwd=directory, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)


def _start(target: Path, name: str, url: str, *how: str) -> subprocess.Popen:
    print(f"{name} …", file=sys.stderr)
    return verb(target, [word.replace(URL, url) for word in COMMANDS[name]], *how)


def _ended(process: subprocess.Popen, code: int) -> None:
    if process.wait() != code:
        raise SystemExit(f"it ended with {process.returncode} and not with {code}")


def _run_and_kill(target: Path) -> None:
    """Kill it when it brings the weights of its third step to the server: two steps are done."""
    started: list[subprocess.Popen] = []
    with answering(target, lambda version: started[0].kill() if version == "3" else None) as url:
        started.append(_start(target, "run", url))
        _ended(started[0], -signal.SIGKILL)


def _split(directory: Path) -> None:
    """Cut a Hugging Face checkpoint into four files, as transformers does with large ones."""
    from safetensors.numpy import load_file, save_file

    (whole,) = directory.glob("*.safetensors")
    tensors = load_file(whole)
    names, places = sorted(tensors), {}
    for number in range(4):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        own = names[number::4]
        save_file({name: tensors[name] for name in own}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    whole.unlink()
    (directory / "manifest.json").unlink()


def _readme() -> str:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=package())
    kills = {"run": "killed in its third step"} | {
        name: f"killed before it opens file {count} of `{pattern}` to write"
        for name, (pattern, count) in KILLED.items()
    }
    commands = [
        f"# {name}{f' ({kills[name]})' if name in kills else ''}\nmegatron-bai {' '.join(words)}"
        for name, words in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"# Written by head {head.stdout.strip()}",
            "",
            "What that head leaves on disk; `tests/compatibility/test_older_heads.py` reads it and goes on with it, on",
            "every later head. Nothing here is ever changed. It was made so, in a checkout of the head:",
            "",
            "    PYTHONPATH=$PWD python …/tests/compatibility/make_head.py TARGET",
            "",
            "which runs these commands in the target, against `recorded_sglang.py` at the URL, and cuts `split` into"
            " files:",
            "",
            "```sh",
            "\n\n".join(commands),
            "```",
            "",
        ]
    )


def package() -> Path:
    import megatron_bai

    return Path(megatron_bai.__file__).parent


if __name__ == "__main__":
    where = Path(sys.argv[1]).absolute()
    if where.exists():
        rmtree(where)
    main(where)
