"""`python fixed_run.py`: one SHA-256 of what a short pipeline computes, to show that two trees compute the same.

It trains two checkpoints, merges them by two methods, and goes on from a merge with MiniRL and R3 (two mini-batches of
packed rows) and with PPO and R2, in float32 and one process, through the command line and `recorded_sglang.py`. In the
hash are all tensors (weights, moments, merges, the form of Hugging Face), metrics and stores of routes, but no times.
The package is the first on the path:

    PYTHONPATH=$PWD python tests/compatibility/fixed_run.py

On one machine two trees that compute the same print the same; another processor may round otherwise, so no test knows
the hash. The parts' own hashes go to stderr.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from make_head import BAI, ROLLOUTS, SUPERVISED, URL, answering, package, verb

INITIAL = ["init=checkpoint", "init.checkpoint=merged", "trainer.steps=3", "trainer.eval_every=2"]
COMMANDS = [
    ["train", *SUPERVISED, "data.style=pretrained", "trainer.save=pretrained"],
    [
        "train", *SUPERVISED, "init=checkpoint", "init.checkpoint=pretrained", "data.style=reasoning",
        "trainer.save=reasoning",
    ],
    ["merge", *BAI, "merge.output=merged"],
    [
        "merge", "merge.method=ties", "merge.pretrained=pretrained", "merge.members=[reasoning,merged]",
        "merge.weights=[1.0,0.5]", "merge.density=0.4", "merge.output=ties",
    ],
    [
        "train", *ROLLOUTS, *INITIAL, "run.dir=minirl", "objective=minirl", "objective.kl_penalty=0.01",
        "replay.mode=r3", "replay.store=minirl/routes", "trainer.mini_batches=2", "trainer.tokens_per_micro_batch=64",
        "trainer.save=minirl/result", "trainer.save_every=3",
    ],
    [
        "train", *ROLLOUTS, *INITIAL, "run.dir=ppo", "objective=ppo", "objective.correction=token_truncate",
        "replay.mode=r2", "replay.store=ppo/routes",
        "trainer.mini_batches=2", "rollout.partial_tokens=4", "rollout.overlap=true", "trainer.save_every=3",
        "objective.critic_save=critic",
    ],
    ["convert", "backend.kind=cpu", "convert.source=minirl/result", "convert.target=hf"],
]  # fmt: skip
CHECKPOINTS = (
    "pretrained", "reasoning", "merged", "ties", "minirl/result", "minirl/checkpoints/step-00003",
    "ppo/checkpoints/step-00003", "critic", "hf",
)  # fmt: skip


def of_tensors(checkpoint: Path) -> bytes:
    """The bytes of all tensors of a checkpoint, in either form, with their names, types and shapes."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {key: value for file in checkpoint.glob("*.safetensors") for key, value in load_file(file).items()}
    if not state:
        _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    tensors = sorted((key, value) for key, value in state.items() if isinstance(value, torch.Tensor))
    assert tensors, checkpoint
    return b"".join(f"{k} {v.dtype} {v.shape}\n".encode() + v.numpy().tobytes() for k, v in tensors)


def of_metrics(run: Path) -> bytes:
    """A run's metrics without times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in record.items() if not k.startswith("seconds_") and k != "tokens_per_second"}
        for record in records
    ]
    assert len(kept) == 3, run
    return json.dumps(kept, sort_keys=True).encode()


def main() -> None:
    print(f"the package in {package()}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with answering(directory) as url:
            for words in COMMANDS:
                process = verb(directory, [word.replace(URL, url) for word in words])
                if process.wait():
                    raise SystemExit(f"it ended with {process.returncode}")
        parts = {path: of_tensors(directory / path) for path in CHECKPOINTS}
        parts |= {f"{run}/metrics": of_metrics(directory / run) for run in ("minirl", "ppo")}
        for run in ("minirl", "ppo"):
            parts[f"{run}/routes"] = b"".join(p.read_bytes() for p in sorted((directory / run / "routes").iterdir()))
    hashes = {path: hashlib.sha256(part).hexdigest() for path, part in parts.items()}
    for path, digest in hashes.items():
        print(f"{digest[:16]} {path}", file=sys.stderr)
    print(hashlib.sha256(json.dumps(hashes).encode()).hexdigest())


if __name__ == "__main__":
    main()
