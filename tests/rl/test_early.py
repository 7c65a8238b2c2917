"""What can be checked of a run is checked before a model is built or a server is started."""

import json
from pathlib import Path

import pytest
from processes import TESTS, launch

pytestmark = pytest.mark.distributed

DATA = ["data=dataset", "data.train=DIR/rows.jsonl", "data.eval_prompts=2"]
MODEL = ["init=checkpoint", "init.checkpoint=DIR/model"]
SFT = ["objective=sft", "trainer.save=DIR/out"]
REFUSED = [
    ([*MODEL, *DATA, "data.train=DIR/none.jsonl"], "data.train=DIR/none.jsonl: there is no such file"),
    ([*MODEL, *DATA, "data.eval=DIR/none.jsonl"], "data.eval=DIR/none.jsonl: there is no such file"),
    ([*MODEL, *DATA, "data.eval=DIR/rows.jsonl"], "leaves 0 rows to train on and 60 held out"),
    ([*MODEL, *DATA, "data.max_prompt_tokens=1"], "leaves 0 rows to train on and 0 held out"),
    ([*MODEL, *DATA, "data.prompt=question"], "there is no 'question', only 'prompt', 'answer'"),
    (["init=checkpoint", "init.checkpoint=DIR/none", *DATA], "no checkpoint at DIR/none"),
    (["init=checkpoint", "init.checkpoint=DIR/failing", *DATA], "chat template refuses this prompt: no such role"),
    (["init=checkpoint", "init.checkpoint=DIR/unreadable", *DATA], "the tokenizer in DIR/unreadable cannot be read"),
    (["init=checkpoint", "init.checkpoint=DIR/cut", *DATA], "DIR/cut/tokenizer.json has 1 bytes instead of"),
    (["data.eval_prompts=1000000"], "data.eval_prompts is 1000000, and the task has 66339 problems"),
    (["data.max_terms=400"], "a prompt of data.max_terms=400 numbers has"),
    (["model.vocab_size=8"], "model.vocab_size is 8"),
    (["run.dir=DIR/file/run"], "run.dir=DIR/file/run cannot be written: Not a directory"),
    (["trainer.save=DIR/file"], "trainer.save=DIR/file cannot be written"),
    (["replay.store=DIR/file"], "replay.store=DIR/file cannot be written"),
    (["reward=function", "reward.function=nonsense"], "reward.function is 'nonsense': name it as module:function"),
    (
        ["rollout.sync=group", "rollout.sync_host=no.invalid"],
        "rollout.sync_host=no.invalid is no address of this machi",
    ),
    (
        ["rollout.sync=group", "rollout.sync_host=192.0.2.1"],
        "rollout.sync_host=192.0.2.1 is no address of this machine",
    ),
    (["rollout.port=BUSY"], "is in use by another run or program"),
    (["rollout.tensor=3"], "model.num_attention_heads (4) is not a multiple of rollout.tensor (3)"),
    (["rollout.max_total_tokens=64"], "leaves no room for a prompt in rollout.max_total_tokens (64)"),
    (["rollout.max_total_tokens=80"], "a prompt of data.max_terms=5 numbers has"),
    (["trainer.tokens_per_micro_batch=66"], "a prompt of data.max_terms=5 numbers has"),
    (["trainer.prompts_per_step=15"], "trainer.prompts_per_step (15) is not a multiple of trainer.mini_batches (2)"),
    (["trainer.micro_batch_size=256"], "data-parallel ranks 1); choose a divisor of 64"),
    ([*SFT, "supervised.rows=33"], "supervised.rows (33) is not a multiple of trainer.micro_batch_size (16)"),
    ([*SFT, "supervised.length=257"], "supervised.length (257) is more than model.max_position_embeddings (256)"),
    (["parallel.expert=3"], "model.num_experts (8) is not a multiple of parallel.expert (3)"),
    (
        ["objective=ppo", "objective.critic_checkpoint=DIR/none"],
        "objective.critic_checkpoint: no checkpoint at DIR/none",
    ),
    (["run.dir=DIR/runs/summary"], "DIR/runs/summary/summary.json is not what a run wrote"),
    (["run.dir=DIR/runs/config"], "DIR/runs/config/config.yaml cannot be read"),
    (["run.dir=DIR/runs/checkpoint"], "DIR/runs/checkpoint/checkpoints is no directory"),
    (["run.dir=DIR/runs/damaged"], "The run cannot go on from DIR/runs/damaged/checkpoints/step-00001"),
    (["run.dir=DIR/runs/link"], "DIR/runs/link/metrics.jsonl is no file"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list]]:
    directory = tmp_path_factory.mktemp("early")
    cases = directory / "cases.json"
    cases.write_text(json.dumps([["trainer.steps=1"], *(words for words, _ in REFUSED)]))
    launch(TESTS / "rl" / "early_worker.py", directory, cases)
    return directory, json.loads((directory / "found.json").read_text())


def test_what_is_right_is_started(found: tuple[Path, list[list]]) -> None:
    assert found[1][0][1] == ["model"]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[" ".join(words[-1:]) for words, _ in REFUSED])
def test_what_is_wrong_is_refused_before_anything_is_started(found: tuple[Path, list[list]], number: int) -> None:
    directory, outcomes = found
    said, started = outcomes[number + 1]
    assert REFUSED[number][1].replace("DIR", str(directory)) in said and "\n" not in said
    assert started == []
