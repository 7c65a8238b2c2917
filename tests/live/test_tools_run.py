"""The short form of `experiment=tools`: a real server, SGLang's parser, the calculator's processes, R3."""

import gzip
import json
import os
import re
from pathlib import Path

import forking
import pytest

from megatron_bai.environments.expression import evaluate
from megatron_bai.monitor.samples.kept_sample import KeptSample

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
CALL = re.compile(r'<tool_call>\{"name":"calculator","arguments":\{"expression":"([^"]*)"\}\}</tool_call><eos><tool>')


def train(experiment: str, directory: Path, *overrides: str) -> None:
    command = ["-m", "megatron_bai", "train", f"experiment={experiment}", f"run.dir={directory}", *overrides]
    done = forking.run_script(command, os.environ | {"OMP_NUM_THREADS": "1"}, 900)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_model_calls_the_calculator_and_is_trained_on_its_own_tokens(tmp_path: Path) -> None:
    """Every supervised text calls, so that after 150 steps all but a few turns do; the digits need not be right."""
    train("tools_pretrained", tmp_path, "data.call_fraction=1", "trainer.steps=150")
    short = ["trainer.steps=2", "trainer.prompts_per_step=8", "trainer.eval_every=0", "trainer.micro_batch_size=16"]
    train("tools", tmp_path, *short)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        parts = step["reward_part/right"] + 0.1 * step["reward_part/calls"]
        assert step["reward_mean"] == pytest.approx(parts, abs=1e-6)
        assert step["route_coverage"] == 1 and step["turns_mean"] > 1 and step["env_failed_fraction"] == 0
    files = sorted((tmp_path / "samples").glob("*"))
    samples = [KeptSample.from_json(line) for file in files for line in gzip.open(file, "rt")]
    answered = [sample for sample in samples if len(sample.turns) > 1]
    assert answered
    for sample in answered:
        call = CALL.match(sample.response)
        if call is None:  # no call that can be read
            assert "<tool>error" in sample.response
            continue
        said = sample.response[call.end() :].partition("<assistant>")[0]
        assert said.startswith("error") or said == evaluate(call[1])
        assert sample.from_environment and not sample.from_environment[-1]
