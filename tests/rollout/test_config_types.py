"""A server reads the `config.json` of a model that transformers lacks without the code of its checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model.families import published

SCRIPT = """
import json, sys
from transformers import AutoConfig
from megatron_bai.rollout.served_models import config_types
config_types.register()
config_types.register()  # a second time in the same process
found = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
rope, part = found.rope_parameters, found.partial_rotary_factor
print(json.dumps([rope, part, found.num_experts, found.head_dim, found.architectures, found.use_qk_norm]))
"""


@pytest.mark.parametrize("name", ["bailing_moe", "bailing_moe_v2"])
def test_ling_is_known_without_its_code(name: str, tmp_path: Path) -> None:
    described = published.read(name)
    (tmp_path / "config.json").write_text(json.dumps(described))
    for file in ("configuration_bailing_moe.py", "configuration_bailing_moe_v2.py"):
        (tmp_path / file).write_text("raise SystemExit('it ran')\n")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    rope, part, experts, head_dim, architectures, norms = json.loads(done.stdout.splitlines()[-1])
    assert rope["rope_type"] == "default" and rope["rope_theta"] == described["rope_theta"]
    assert part == described.get("partial_rotary_factor", 1.0)
    assert experts == described["num_experts"] and architectures == described["architectures"]
    assert head_dim == described.get("head_dim") and norms == described.get("use_qk_norm", False)
