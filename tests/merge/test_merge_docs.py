"""The commands of docs/merge.md, as printed."""

import json
import re
import shlex
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from megatron_bai.checkpoint.hf_files import SINGLE
from megatron_bai.cli import entry_point

PAGE = (Path(__file__).parents[2] / "docs/merge.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("megatron-bai merge")
]


def write(path: Path, seed: int, rope_theta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [
        "self_attn.q_proj",
        "mlp.gate",
        *(f"mlp.experts.{e}.{p}" for e in (0, 1) for p in ("up_proj", "gate_proj")),
    ]
    keys = ["model.embed_tokens", "lm_head", *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names)]
    tensors = {f"{key}.weight": torch.randn(8, 8, generator=generator) for key in keys}
    path.mkdir(parents=True)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"vocab_size": 8, "rope_theta": rope_theta}))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_runs(tmp_path, monkeypatch, capsys, command):
    members = 1e7 if "allow_different" in command else 1e6
    for seed, name in enumerate(("base", "instruct", "reasoning", *(f"run/checkpoints/step-{s:05}" for s in (9, 10)))):
        write(tmp_path / name, seed, members if seed else 1e6)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", words)
    entry_point.main()
    output = Path(next(word for word in words if word.startswith("merge.output=")).partition("=")[2])
    if "merge.dry_run=true" in words:
        assert not output.exists() and capsys.readouterr().out.startswith(str(tmp_path / output))
        return
    targets = sorted(output.glob("alpha-*")) or [output]
    assert len(targets) == (3 if "sweep" in command else 1)
    recipes = [checkpoints.provenance(target)["recipe"] for target in targets]
    if "alpha_for" in command:
        assert recipes[0]["alpha_for"] == {"experts": 0.9, r"layers\.0\.": 0.3}
        assert recipes[0]["weights_for"] == {"embeddings": [1.0, 0.0]}


def test_there_are_such_commands():
    assert {"alpha_for", "weights_for", "t_for", "sweep", "ema", "average", "allow_different", "dry_run"} <= set(
        re.findall(r"alpha_for|weights_for|t_for|sweep|ema|average|allow_different|dry_run", " ".join(COMMANDS))
    )
