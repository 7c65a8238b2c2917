"""More held-out prompts than there are is refused as the task is made: before a model is built or a server started."""

import json
from pathlib import Path

import pytest
from processes import TESTS

from megatron_bai import config
from megatron_bai.cli.compose import compose
from megatron_bai.errors import UserError
from megatron_bai.rl.run_task import make_task

CHECKPOINT = TESTS / "data" / "head-2fa74aa" / "converted"


def settings(tmp_path: Path, eval_every: int, own_file: bool) -> config.Config:
    config.register_schema()
    rows = [{"prompt": str(i), "answer": "1"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    words = ["data=dataset", f"data.train={tmp_path}/rows.jsonl", "data.hold_out=0.3", "data.chat_template=false"]
    words += [f"data.eval={tmp_path}/eval.jsonl"] if own_file else []
    return compose(
        [*words, "data.eval_prompts=64", f"trainer.eval_every={eval_every}", "init=checkpoint", "model=tiny"]
    )


@pytest.mark.parametrize("own_file", [False, True])
def test_too_few_held_out_prompts_are_refused_with_the_task(own_file: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.eval_prompts is 64, and .* only .* prompts"):
        make_task(settings(tmp_path, 1, own_file), CHECKPOINT, print)
    make_task(settings(tmp_path, 0, own_file), CHECKPOINT, print)  # nothing evaluates
