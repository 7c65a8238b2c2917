"""The main job, shortened: what it writes is whole, and doing it again changes nothing."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Result, succeeded
from pipeline import STEPS, Demo

from megatron_bai.monitor.report.charts import own_charts
from megatron_bai.monitor.report.run_data import load_run
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.show import select
from megatron_bai.routing.store.route_store import RouteStore

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.usefixtures("forked_servers")]

# What the record of a step holds at least (issue 2).
KEYS = {
    "step", "weight_version", "reward_mean", "response_length_mean", "entropy", "kl_k1", "kl_k3", "kl_k1_live",
    "kl_k3_live", "route_mismatch", "route_coverage", "clip_fraction", "is_weight_mean", "is_weight_max", "grad_norm",
    "f_1.5", "f_2", "f_5", "perplexity_ratio", "ess", "ess_discrepancy", "tokens_route_mismatch", "route_mismatch/0",
    "expert_entropy", "experts_effective", "clip_fraction_positive", "clip_fraction_negative", "group_variance",
    "response_length_p50", "truncated_fraction",
    "seconds_rollout", "seconds_old_logprob", "seconds_update", "seconds_sync", "tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def summary(demo: Demo, trained: Result) -> dict[str, Any]:
    return json.loads((demo.directory / "summary.json").read_text())


def test_the_summary_says_what_ran(summary: dict[str, Any], demo: Demo) -> None:
    assert summary["complete"] is True and summary["objective"] == "minirl" and summary["replay"] == "r3"
    assert summary["layout"] == {
        "processes": 2, "tensor": 2, "expert": 2, "pipeline": 1, "data": 1, "sequence_parallel": True
    }  # fmt: skip
    needed = {"torch", "megatron-core", "sglang", "transformers", "python", "megatron_bai"}
    assert needed <= {name for name, version in summary["versions"].items() if version}
    assert summary["mini_batches"] == 2 and Path(summary["init"]) == demo.actor
    assert Path(summary["provenance"]) == demo.actor / "provenance.json"


def test_it_starts_from_the_merge_that_is_there_already(trained: Result, demo: Demo) -> None:
    assert "nothing to do, the output holds this merge: 12 tensors" in trained.out


@pytest.mark.long
def test_merged_on_the_fly_by_two_ranks_it_starts_from_the_same_weights(demo: Demo, tmp_path: Path) -> None:
    unmoved = ["objective=sft", "trainer.steps=1", "trainer.learning_rate=0", f"trainer.save={tmp_path}/saved"]
    members = f"merge.members=[{demo.directory}/instruct,{demo.directory}/reasoning]"
    own = [f"merge.pretrained={demo.directory}/pretrained", members, f"merge.output={tmp_path}/actor", *unmoved]
    result = succeeded(demo.reinforce("on-the-fly", 2, *own, merged=True))
    assert "merged 12 tensors" in result.out
    inspect = ["inspect", f"inspect.path={demo.actor}"]
    cases = {name: [*inspect, f"inspect.other={tmp_path}/{name}"] for name in ("actor", "saved")}
    assert all("0 of 12 tensors differ" in found.out for found in demo.verbs("inspect-actors", cases).values())


def test_every_step_is_recorded_in_full(summary: dict[str, Any], demo: Demo) -> None:
    steps = summary["steps"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert KEYS <= step.keys()
        assert all(math.isfinite(value) for name, value in step.items() if name != "alarms")
        buckets = [int(name.split("/")[1]) for name in step if name.startswith("responses_by_length/")]
        assert buckets and all(low % 10 == 0 for low in buckets)  # the demo's monitor.bucket
        assert sum(step[f"responses_by_length/{low}"] for low in buckets) == 16 * 8
        pooled = sum(step[f"responses_by_length/{low}"] * step[f"reward_by_length/{low}"] for low in buckets)
        assert pooled / (16 * 8) == pytest.approx(step["reward_mean"])
    lines = (demo.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == steps
    assert ["eval_accuracy" in step for step in steps] == [True, True, False]


def test_every_step_replays_all_routes_with_the_newest_weights(summary: dict[str, Any]) -> None:
    steps = summary["steps"]
    assert [step["route_coverage"] for step in steps] == [1.0] * STEPS
    assert [step["weight_version"] for step in steps] == list(range(STEPS))
    for step in steps:
        assert 0 <= step["sync_gap"] <= 0.1  # the server's weights have fp8's values, in bfloat16
        assert 0 < step["kl_k3"] < 0.1 and 0 < step["kl_k3_live"] < 0.1 and abs(step["kl_k1"]) < 0.1
        assert 0 < step["route_mismatch"] < 0.3 and 0 <= step["clip_fraction"] <= 1
        assert step["is_weight_max"] >= step["is_weight_mean"] > 0.9 and step["entropy"] > 0


def test_rewards_move_the_weights(summary: dict[str, Any]) -> None:
    """There is a gradient just where the rewards of a group differ; whether they do is up to what was learned."""
    assert [step["grad_norm"] > 0 for step in summary["steps"]] == [step["reward_std"] > 0 for step in summary["steps"]]


class Links(HTMLParser):
    """What a page asks the outside for: addresses in attributes of its elements, and in its style sheets."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self._styles = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._styles = tag == "style"
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster") and not (value or "").startswith("data:"):
                self.found.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        if self._styles:
            self.found += re.findall(r"@import.*|url\((?!data:).*?\)", data)


def test_the_report_stands_alone(demo: Demo, trained: Result) -> None:
    page = (demo.directory / "report.html").read_text()
    assert Links(page).found == []
    assert "Training–inference KL" in page and "Route coverage" in page and len(page) > 1_000_000  # plotly is inside
    assert own_charts([load_run(demo.directory, "demo", "")]) == []  # every metric of ours has a row in the table


def test_the_first_screen_says_what_r3_leaves_of_the_gap_that_is_made_on_purpose(
    demo: Demo, summary: dict[str, Any], trained: Result
) -> None:
    """How much R3 leaves is up to what was learned: in three steps KL (k3) is that of a few tokens."""
    tokens = [step["response_tokens"] for step in summary["steps"]]
    with_r3, live = (np.average([s[key] for s in summary["steps"]], weights=tokens) for key in ("kl_k3", "kl_k3_live"))
    text = f"(KL k3) with R3 {with_r3:.1e} against {live:.1e} without, on the same tokens: ratio {with_r3 / live:.2f}, "
    first_screen = (demo.directory / "report.html").read_text().split("</h1>")[1].split('<div class="card">')[0]
    for place in (first_screen, trained.out):
        assert text in place and "rounded to fp8 values on purpose (rollout.quantize=fp8)" in place


def test_a_run_leaves_only_its_record(demo: Demo, trained: Result) -> None:
    found = {path.name for path in demo.directory.iterdir()}
    logs = {"pretrained-log", "instruct-log", "reasoning-log", "server.log"}
    events = {"tensorboard"} if find_spec("tensorboard") else set()
    models = {"pretrained", "instruct", "reasoning", "actor", "tokenizer"}
    assert (
        found
        == models | logs | {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "routes", "samples"} | events
    )


def test_the_routes_of_every_step_are_kept_and_described(demo: Demo, summary: dict[str, Any]) -> None:
    samples = 16 * 8
    with RouteStore(demo.directory / "routes") as store:
        kept = list(store.iter_records())
    assert [(entry.step, entry.sample) for entry, _ in kept] == [(s, i) for s in range(STEPS) for i in range(samples)]
    for number, step in enumerate(summary["steps"]):
        own = [recording for entry, recording in kept if entry.step == number]
        assert {span.version for recording in own for span in recording.spans} == {str(step["weight_version"])}
        rows = sum(int(recording.valid.sum()) for recording in own)
        assert rows == round(step["tokens_per_second"] * step["seconds_step"]) > samples
    found = succeeded(demo.verb("inspect-routes", "inspect", f"inspect.path={demo.directory}/routes"))
    assert f"{STEPS * samples} samples of {STEPS} steps (0 to {STEPS - 1}), r3" in found.out
    refused = demo.reinforce("again", 2, f"replay.store={demo.directory}/routes").wait()
    assert refused.code and "holds routes of another run" in refused.complaints[0] and not refused.tracebacks


def test_some_responses_of_every_step_are_kept_and_printed(demo: Demo, summary: dict[str, Any]) -> None:
    assert store.list_steps(demo.directory) == list(range(1, STEPS + 1))
    for step in summary["steps"]:
        samples = store.read_step(demo.directory, step["step"])
        assert Counter(s.split for s in samples) == {"train": 8} | ({"eval": 8} if "eval_accuracy" in step else {})
        train = [sample for sample in samples if sample.split == "train"]
        assert max(sample.length for sample in train) == step["response_length_max"]
        rewards = [sample.reward for sample in train]
        assert (min(rewards) < max(rewards)) == (0 < step["reward_mean"] < 1)  # the best and the worst are there
        for sample in train:
            # The arithmetic task's reward, from the text alone.
            assert sample.reward == float(
                sample.response == f"{sample.response.split('answer:')[0]}answer:{sample.answer}<eos>"
            )
            assert sample.versions == [[str(step["weight_version"]), 0, sample.length]]
            assert 0 < sample.discrepancy < 1 and sample.routes_differ is not None
            assert sample.discrepancy == pytest.approx(np.mean(sample.token_discrepancies), abs=2e-6)
    printed = succeeded(demo.verb("samples", "samples", f"samples.run={demo.directory}", "samples.step=2"))
    best = select(store.read_step(demo.directory, 2), "best", 3)
    assert all(sample.prompt in printed.out and sample.response in printed.out for sample in best)


@pytest.mark.long
def test_a_second_run_reuses_every_checkpoint(demo: Demo, trained: Result) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in demo.directory.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}

    before = state()
    assert all("nothing to do" in again.out for again in demo.make("again").values())
    assert state() == before
