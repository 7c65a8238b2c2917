"""The report: what it reads, what it refuses, and that nothing in a run's files becomes markup."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from monitor.kept import NASTY, conversation, kept

from megatron_bai.cli import report as report_verb
from megatron_bai.config import Config, Report, Run
from megatron_bai.errors import UserError
from megatron_bai.monitor.metrics.table.sections import METRICS, PHASES, SECTIONS
from megatron_bai.monitor.report.charts import own_charts
from megatron_bai.monitor.report.reader import read_samples
from megatron_bai.monitor.report.report import load_run, write_report
from megatron_bai.monitor.report.run_data import run_names
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.monitor.samples.printable import make_printable
from megatron_bai.utils import terminal_logging


def make_run(directory: Path, records: list[dict[str, Any]], tail: str = "", config: str = "", **summary: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    if config:
        (directory / "config.yaml").write_text(config)
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def embedded(html: str, name: str) -> Any:
    """The data of a page under a name; None where it has none."""
    start = f'<script type="application/json" id="{name}">'
    return json.loads(html.split(start)[1].split("</script>")[0]) if start in html else None


def reported(run: Path) -> str:
    write_report([run], run / "report.html")
    return (run / "report.html").read_text()


def headline(html: str) -> str:
    """The first sentence after the title."""
    return html.split("</h1>")[1].removeprefix('<p class="headline">').split("</p>")[0]


def section_charts(html: str) -> dict[str, dict[str, Any]]:
    """The charts in a report by title."""
    return {chart["title"]: chart for chart in embedded(html, "charts")}


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    return [
        {
            "step": s,
            "weight_version": str(s),
            "reward_mean": 0.25 * s,
            "kl_k3": 1e-9,
            "kl_k3_live": 1e-5,
            "seconds_rollout": 3.0,
            "seconds_update": 1.0,
            "seconds_step": 5.0,
        }
        for s in range(3)
    ]


def test_one_file_with_headlines_and_charts(tmp_path, steps):
    run = make_run(
        tmp_path / "demo",
        steps,
        config="trainer: {steps: 3}",
        versions={"torch": "2.13.0", "apex": None},
        layout={"tensor": 2},
    )
    write_report([run], tmp_path / "out" / "report.html")
    html = (tmp_path / "out" / "report.html").read_text()
    assert (
        "0.000 → 0.500" in html
        and "rollout, 60%" in html
        and "torch 2.13.0<" in html
        and "tensor 2" in html
        and "trainer.steps" in html
    )
    assert "<script src" not in html and "<link" not in html  # opens offline
    charts = section_charts(html)
    kl = charts["Training–inference KL (k3)"]
    assert kl["log"] and [t["y"][0] for t in kl["traces"]] == [1e-9, 1e-5]
    rest = next(t for t in charts["Seconds per step: demo"]["traces"] if t["name"] == "rest")
    assert rest["y"] == [1.0, 1.0, 1.0]
    assert "Entropy, nats per token" not in charts  # no data, no chart
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_every_metric_of_every_chart_is_drawn_at_once(tmp_path: Path) -> None:
    members = [name.replace("/NAME", "/part_N") for name in METRICS]
    names = [re.sub("(?<=[/_])[A-Z]+$", str(number), name) for name in members for number in (0, 1)]
    steps = [dict.fromkeys(names, 0.5) | {"step": s, "alarms": []} for s in (1, 2)]
    shown = section_charts(html := reported(make_run(tmp_path / "all", steps)))
    captions = [unescape(caption) for caption in re.findall("<figcaption>(.*?)</figcaption>", html)]
    assert captions == list(shown) and html.count('<div class="plot">') == len(captions)  # the script fills them so
    charts = {chart: metrics for section in SECTIONS for chart, metrics in section.charts.items()}
    per_run = {"lines": "", "phases": ": all", "buckets": ": all", "layers": ": all"}
    assert shown.keys() == {chart.title + per_run[chart.kind] for chart in charts}
    for chart, metrics in charts.items():
        traces = shown[chart.title + per_run[chart.kind]]["traces"]
        assert chart.kind == "layers" or len(traces) >= len(metrics), chart.title


def test_every_phase_is_named_in_the_bars_and_in_what_took_longest(tmp_path: Path) -> None:
    steps = [{"step": s, **{f"seconds_{phase}": 1.0 for phase in PHASES}, "seconds_step": 20.0} for s in (1, 2)]
    for phase in PHASES:
        longest = [record | {f"seconds_{phase}": 5.0} for record in steps]
        html = reported(make_run(tmp_path / phase, longest))
        bars = section_charts(html)[f"Seconds per step: {phase}"]["traces"]
        assert [bar["name"] for bar in bars] == [*(name.replace("_", " ") for name in PHASES), "rest"]
        assert len({bar["marker"]["color"] for bar in bars}) == len(bars)
        assert bars[-1]["y"] == [pytest.approx(20 - 5 - (len(PHASES) - 1))] * 2
        assert f">Slowest phase</dt><dd class=big>{phase.replace('_', ' ')}, 25%<" in html
    assert "ahead" in PHASES


def test_runs_side_by_side(tmp_path, steps):
    first = make_run(tmp_path / "a" / "demo", steps, config="replay: {mode: r3}\nseed: 1")
    second = make_run(tmp_path / "b" / "demo", steps[:2], config="replay: {mode: none}\nseed: 1")
    write_report([first, second], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    traces = section_charts(html)["Reward, mean over the batch"]["traces"]
    assert [len(t["x"]) for t in traces] == [3, 2]
    assert all(f"</i>{trace['name']}</span>" in html for trace in traces)  # the legend
    assert len({t["name"] for t in traces}) == 2 and len({t["line"]["color"] for t in traces}) == 2
    assert html.count("<tr class=differs>") == 1  # replay.mode, not seed


def test_what_no_run_has_is_in_no_legend(tmp_path, steps):
    for record in steps:
        record["eval_accuracy"] = 0.5
    runs = [make_run(tmp_path / name, steps) for name in ("a", "b")]
    write_report(runs, tmp_path / "report.html")
    charts = section_charts((tmp_path / "report.html").read_text())
    accuracy = charts["Mean reward on held-out problems, and its 95 % interval"]
    assert [trace["name"] for trace in accuracy["traces"]] == ["a", "b"]


def test_a_run_in_progress(tmp_path, steps):
    """A half-written last line is left out, a repeated step counts once, a number that is not finite is a gap."""
    run = make_run(tmp_path, [*steps, {"step": 2, "reward_mean": float("nan"), "loss": None}], tail='{"step": 3, "rew')
    data = load_run(run, "run", "#000")
    assert data.series("reward_mean") == ([0, 1, 2], [0.0, 0.25, None])
    assert data.series("loss") == ([2], [None])
    write_report([run], tmp_path / "report.html")
    assert (
        section_charts((tmp_path / "report.html").read_text())["Reward, mean over the batch"]["traces"][0]["y"][2]
        is None
    )


def test_metrics_of_the_runs_own_are_shown_as_such(tmp_path):
    run = make_run(tmp_path, [{"step": 0, "made_up": 0.5, "note": "text", "flag": True}])
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert set(section_charts(html)) == {"made_up"}
    assert "<h2>Other</h2><p>The runs' own metrics" in html


def test_text_from_files_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script>"
    record = {"step": 0, "weight_version": evil, "reward_mean": 1.0, evil: 1.0}
    (tmp_path / "provenance.json").write_text(
        json.dumps({"recipe": {"method": evil}, "sources": [{"path": evil, "coefficient": 0.5, "digest": evil}]})
    )
    run = make_run(tmp_path, [record], config=f"name: '{evil}'", versions={evil: evil}, provenance="provenance.json")
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "alert(1)" in html and "<script>alert" not in html


def test_merge_recipe(tmp_path, steps):
    sources = [{"path": f"ckpt/{name}", "coefficient": c, "digest": name} for name, c in (("base", 0.5), ("i", 0.25))]
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "provenance.json").write_text(json.dumps({"recipe": {"alpha": 0.5}, "sources": sources}))
    run = make_run(tmp_path, steps, provenance=str(tmp_path / "actor" / "provenance.json"))
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "recipe.alpha" in html and "<th>ckpt/i</th><td>0.25</td><td>–</td>" in html


@pytest.mark.parametrize(("count", "cells"), [(2, "<td>72.6%</td><td>90.1%</td>"), (3, "<td>–</td><td>–</td>")])
def test_what_a_merge_keeps_of_its_sources_routing_is_in_its_table(tmp_path, steps, count, cells):
    """Of as many sources as the table names: of others the numbers would stand beside the wrong one."""
    sources = [{"path": f"ckpt/{name}", "coefficient": 0.5, "digest": name} for name in ("base", "i")]
    (tmp_path / "provenance.json").write_text(json.dumps({"sources": sources}))
    kept = {f"merge_routes_kept/{i}": value for i, value in enumerate((0.861, 0.726, 0.5)[:count])}
    kept |= {f"merge_routes_overlap/{i}": value for i, value in enumerate((0.951, 0.901, 0.7)[:count])}
    steps[0] |= kept | {"merge_experts_effective": 4.125, "merge_route_margin": 0.25}
    run = make_run(tmp_path, steps, provenance=str(tmp_path / "provenance.json"))
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert f"<th>ckpt/i</th><td>0.5</td>{cells}" in html and "4.12" in html
    assert own_charts([load_run(run, "demo", "")]) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "does not exist"),
        ("", "no step yet"),
        ('{"step": 0', "no step yet"),
        ('nonsense\n{"step": 1}\n', "record 1"),
        ('[1]\n{"step": 1}\n', "record 1"),
        ('{"loss": 1}\n{"step": 1}\n', "record 1"),
    ],
)
def test_refuses_what_is_no_run(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message) as error:
        write_report([tmp_path], tmp_path / "report.html")
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("name", "text"), [("summary.json", "{"), ("summary.json", "[]"), ("config.yaml", "a: [")])
def test_refuses_damaged_companions(tmp_path, name, text):
    run = make_run(tmp_path, [{"step": 0}])
    (run / name).write_text(text)
    with pytest.raises(UserError, match=name):
        write_report([run], tmp_path / "report.html")


def test_runs_are_named_by_what_tells_them_apart():
    assert run_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert run_names([Path("/s/bai/seed-0"), Path("/s/alone/seed-0")]) == ["bai/seed-0", "alone/seed-0"]
    assert run_names([Path("/s/run"), Path("/s/run")]) == ["run", "run"]


def test_the_verb(tmp_path, steps, capsys):
    run = make_run(tmp_path / "demo", steps)
    report_verb.run(Config(run=Run(dir=str(run))))
    assert (run / "report.html").is_file() and str(run / "report.html") in capsys.readouterr().out
    report_verb.run(Config(report=Report(runs=[str(run), str(run)], output=str(tmp_path / "two.html"))))
    assert len(section_charts((tmp_path / "two.html").read_text())["Reward, mean over the batch"]["traces"]) == 2


def test_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="report.runs"):
        write_report([], tmp_path / "report.html")


def test_alarms_are_told_and_marked_on_their_curves(tmp_path, steps):
    alarm = {
        "step": 1, "detector": "length_collapse", "metric": "response_length_mean", "deviations": 7.4, "since": 0,
        "evidence": "fell <b>far</b>", "advice": "start from a merge", "action": "warn", "facts": {},
    }  # fmt: skip
    for number, record in enumerate(steps):
        record |= {"response_length_mean": 10.0 - number, "reward_by_length/0": 0.5, "reward_by_length/100": 0.25}
        record |= {"route_mismatch/0": 0.1, "route_mismatch/1": 0.2 + number}
    steps[1]["alarms"] = [alarm]
    run = make_run(tmp_path, steps)
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    charts = section_charts(html)
    mark = charts["Response length, tokens"]["traces"][-1]
    assert (mark["x"], mark["y"], mark["mode"]) == ([1], [9.0], "markers") and "fell &lt;b&gt;far" in mark["text"][0]
    assert f"▼</b> alarm · {tmp_path.name}</span>" in html  # the legend has the mark itself
    assert "fell &lt;b&gt;far&lt;/b&gt; (7 standard errors)" in html and "start from a merge" in html
    buckets = next(chart for title, chart in charts.items() if title.startswith("Reward by response length"))
    assert [trace["name"] for trace in buckets["traces"]] == ["from 0 tokens", "from 100 tokens"]
    layers = next(chart for title, chart in charts.items() if title.startswith("Routes that differ, by MoE layer"))
    assert layers["map"] and layers["traces"][0]["z"] == [[0.1] * 3, [0.2, 1.2, 2.2]]
    assert not [title for title in charts if "/" in title]  # none of them again among the other metrics


def test_alarms_that_are_none_are_refused(tmp_path, steps):
    steps[0]["alarms"] = [{"what": "ever"}]
    with pytest.raises(UserError, match="alarms of run"):
        write_report([make_run(tmp_path, steps)], tmp_path / "report.html")


ALARM = {
    "step": 3, "detector": "length_collapse", "metric": "response_length_mean", "deviations": 7.4, "since": 0,
    "evidence": "it fell", "advice": "merge", "action": "stop", "facts": {},
}  # fmt: skip
LEARNING = [
    {"step": s, "reward_mean": 0.25 * s, "response_length_mean": 10.0 - s, "kl_k3": 1e-5 * s, "loss": 1.0 / s}
    for s in (1, 2, 3)
]
NUMBERS = "reward 0.250 → 0.750, response length in tokens 9.0 → 7.0, KL between the engines (k3) 1.0e-05 → 3.0e-05"


@pytest.mark.parametrize(
    ("records", "summary", "sentence"),
    [
        (LEARNING, {"complete": True}, f"run finished after 3 steps: {NUMBERS}; no alarm."),
        (LEARNING, {"complete": False}, f"run is not finished, after 3 of 9 steps: {NUMBERS}; no alarm."),
        (LEARNING, {}, f"run has 3 of 9 steps: {NUMBERS}; no alarm."),
        (
            [*LEARNING[:2], LEARNING[2] | {"alarms": [ALARM]}],
            {"complete": False},
            f"run was stopped by an alarm after 3 of 9 steps: {NUMBERS}; 1 alarm: length collapse at step 3.",
        ),
        (
            [*LEARNING[:2], LEARNING[2] | {"alarms": [ALARM | {"action": "warn"}] * 6}],
            {"complete": True},
            f"run finished after 3 steps: {NUMBERS}; 6 alarms: {'length collapse at step 3, ' * 4}and 2 more.",
        ),
        (LEARNING[:1], {"complete": True}, "run finished after 1 step: reward 0.250, response length in tokens 9.0, "
            "KL between the engines (k3) 1.0e-05; no alarm."),
        ([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}], {"complete": True},
            "run finished after 2 steps: loss 3 → 1.5; no alarm."),
        ([{"step": 1, "reward_mean": 0.0, "eval_accuracy": -2e-5},
            {"step": 2, "reward_mean": 4e37, "eval_accuracy": 6e-4}], {"complete": True},
            "run finished after 2 steps: reward 0.000 → 4e+37, held-out reward -2e-05 → 0.0006; no alarm."),
    ],
)  # fmt: skip
def test_the_first_sentence_says_how_the_run_went(
    tmp_path: Path, records: list[dict[str, Any]], summary: dict[str, Any], sentence: str
) -> None:
    run = make_run(tmp_path / "run", records, config="trainer: {steps: 9}", **summary)
    assert headline(reported(run)) == sentence


def discrepancy(html: str) -> str:
    """The sentences on the discrepancy, which stand before the summary cards; empty where there are none."""
    top = html.split("</h1>")[1].split('<div class="card">')[0]
    return unescape(top.partition('<p class="headline discrepancy">')[2].split("</p>")[0])


R3_FP8 = "replay: {mode: r3}\nrollout: {quantize: fp8}"
MEASURED = [  # means weighted by tokens: 4e-4 with R3, 1e-3 without; those of steps would be 5e-4 and 8.75e-4
    {"step": 1, "response_tokens": 300, "kl_k3": 3e-4, "kl_k3_live": 1.125e-3},
    {"step": 2, "response_tokens": 100, "kl_k3": 7e-4, "kl_k3_live": 6.25e-4},
]
WITH_R3 = "Discrepancy between the engines (KL k3) with R3 4.0e-04 against 1.0e-03 without, on the same tokens: "
QUANTIZED = (
    "The server's weights are rounded to fp8 values on purpose (rollout.quantize=fp8), so this discrepancy is larger "
    "than the engines' own."
)


@pytest.mark.parametrize(
    ("records", "config", "text"),
    [
        (MEASURED, R3_FP8, f"{WITH_R3}ratio 0.40, lower with R3 in 1 of 2 steps. {QUANTIZED}"),
        (MEASURED, "replay: {mode: r3}\nrollout: {quantize: ''}",
            f"{WITH_R3}ratio 0.40, lower with R3 in 1 of 2 steps."),
        # R2 and no replay: the two are one number
        (MEASURED, "replay: {mode: r2}", ""),
        (MEASURED, "replay: {mode: none}\nrollout: {quantize: fp8}", QUANTIZED),
        # not measured, not a number, of other tokens
        ([{"step": 1, "kl_k3": 3e-4}], R3_FP8, QUANTIZED),
        ([*MEASURED, {"step": 3, "response_tokens": 9, "kl_k3": None, "kl_k3_live": 1.0}], R3_FP8,
            f"{WITH_R3}ratio 0.40, lower with R3 in 1 of 2 steps. {QUANTIZED}"),
        ([*MEASURED, MEASURED[0] | {"step": 3, "stale_fraction": 0.5, "kl_k3": 1.0}], R3_FP8,
            f"{WITH_R3}ratio 0.40, lower with R3 in 1 of 2 steps. {QUANTIZED}"),
        # two engines that agree, as with rollout.exact
        ([MEASURED[0] | {"kl_k3": 0.0, "kl_k3_live": 0.0}], "replay: {mode: r3}",
            "No discrepancy between the engines (KL k3 is 0), with R3 and without, in all of 1 step."),
        ([each | {"kl_k3_live": 0.0} for each in MEASURED], "replay: {mode: r3}",
            "Discrepancy between the engines (KL k3) with R3 4.0e-04 against 0.0e+00 without, on the same tokens: "
            "lower with R3 in 0 of 2 steps."),
        (MEASURED, "", ""),
        (MEASURED, "replay: r3", ""),
    ],
)  # fmt: skip
def test_the_first_screen_says_what_r3_leaves_and_that_a_server_is_quantised(
    tmp_path: Path, records: list[dict[str, Any]], config: str, text: str
) -> None:
    assert discrepancy(reported(make_run(tmp_path / "run", records, config=config))) == text


def test_each_run_has_its_own_sentence_on_the_discrepancy(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / mode, MEASURED, config=f"replay: {{mode: {mode}}}") for mode in ("none", "r3")]
    write_report(runs, tmp_path / "report.html")
    top = (tmp_path / "report.html").read_text().split("</h1>")[1].split('<div class="card">')[0]
    assert top.count(WITH_R3) == 1 and top.index("none has") < top.index("r3 has") < top.index(WITH_R3)


def test_numbers_beyond_three_digits_keep_their_exponent_in_the_summary(tmp_path: Path) -> None:
    page = reported(make_run(tmp_path / "run", [{"step": 1, "reward_mean": 2e-5}, {"step": 2, "reward_mean": -3e38}]))
    assert "<dd class=big>2e-05 → -3e+38</dd>" in page


def test_a_number_that_no_float_holds_is_no_number(tmp_path: Path) -> None:
    page = reported(make_run(tmp_path / "run", [{"step": 1, "reward_mean": 0.5, "loss": 10**400, "odd": -(10**400)}]))
    assert "reward 0.500" in headline(page) and "loss" not in headline(page)


def test_a_word_that_is_too_long_for_the_page_breaks(tmp_path: Path) -> None:
    """Runs are named by directories, often without a blank; a telephone would scroll sideways."""
    page = reported(make_run(tmp_path / ("run_" * 40), LEARNING))
    body = page[page.index("body {") :]
    assert "overflow-wrap: break-word" in body[: body.index("}")] and ".legend span { min-width: 0" in page


@pytest.mark.parametrize("tail", ["", '{"step": 1, "rew'])
def test_a_run_whose_first_step_is_in_work_says_its_phase(tmp_path: Path, tail: str) -> None:
    run = make_run(tmp_path / "run", [], tail, config="trainer: {steps: 9}")
    assert headline(reported(run)) == "run has no finished step yet: its first may be in work."
    (run / "progress.json").write_text('{"step": 1, "phase": "old_logprob", "since": 0}')
    sentence = "run has no finished step yet (step 1 is in work: old logprob since 1970-01-01 00:00:00 UTC)."
    assert headline(reported(run)) == sentence
    (run / "metrics.jsonl").unlink()
    assert headline(reported(run)) == sentence
    for damaged in ("{", "[]", '{"step": "x", "phase": 1}', '{"step": 1, "phase": "eval", "since": 1e999}'):
        (run / "progress.json").write_text(damaged)
        assert headline(reported(run)).startswith("run has no finished step yet")


def test_a_step_in_work_after_others_and_a_leftover_of_a_killed_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LEARNING, config="trainer: {steps: 9}", complete=False)
    (run / "progress.json").write_text('{"step": 4, "phase": "rollout", "since": 0}')
    assert "after 3 of 9 steps (step 4 is in work: rollout since" in headline(reported(run))
    (run / "progress.json").write_text('{"step": 3, "phase": "sync", "since": 0}')
    assert headline(reported(run)).startswith("run is not finished, after 3 of 9 steps: reward")


def test_zeros_are_drawn_on_a_log_axis(tmp_path: Path) -> None:
    values = [0.0, 2e-7, None, -1e-12, 3e-4]
    run = make_run(tmp_path, [{"step": s, "kl_k3": v, "grad_norm": 0.0} for s, v in enumerate(values)])
    charts = section_charts(html := reported(run))
    kl = charts["Training–inference KL (k3)"]
    (trace,) = kl["traces"]
    assert kl["floor"] == pytest.approx(1e-8)
    assert trace["y"] == [kl["floor"], 2e-7, None, kl["floor"], 3e-4] and trace["customdata"] == values
    assert "Gradient norm" not in charts  # nothing but zero
    assert "1 chart of nothing but zero</summary><p>Gradient norm</p>" in html


def test_charts_of_nothing_but_zero_fold_away(tmp_path: Path) -> None:
    zeros = {"truncated_fraction": 0.0, "route_mismatch/0": 0.0, "route_mismatch/1": 0.0, "reward_by_length/0": 0}
    run = make_run(tmp_path, [{"step": s, **zeros, "eval_truncated": 0.0, "eval_failed": 0.5} for s in (1, 2)])
    html = reported(run)
    assert set(section_charts(html)) == {"Held-out responses, fraction"}  # one of its two is not zero
    assert "2 charts of nothing but zero</summary><p>Responses cut off at the limit, fraction<br>Reward by" in html
    assert "1 chart of nothing but zero</summary><p>Routes that differ, by MoE layer" in html


@pytest.mark.parametrize(
    ("config", "best", "ends"),
    [
        ("", 1.0, (0.0, 1.0)),
        ("reward: {name: exact}", 1.0, (0.0, 1.0)),
        ("reward: {name: function}", 3.0, (-0.2, 1.1)),  # rewards of any size
    ],
)
def test_an_interval_is_a_band_that_ends_where_rewards_do(
    tmp_path: Path, config: str, best: float, ends: tuple[float, float]
) -> None:
    interval = {"eval_accuracy_low": -0.2, "eval_accuracy_high": 1.1}
    steps = [{"step": 1, "eval_accuracy": 0.5, "eval_best": best, **interval}, {"step": 2}]
    html = reported(make_run(tmp_path, steps, config=config))
    low, high, mean = section_charts(html)["Mean reward on held-out problems, and its 95 % interval"]["traces"]
    assert (low["y"], high["y"], mean["y"]) == ([ends[0]], [ends[1]], [0.5])
    assert high["fill"] == "tonexty" and low["line"]["width"] == high["line"]["width"] == 0
    assert html.count("95 % interval</span>") == 1
    assert not {"eval_accuracy_low", "eval_accuracy_high"} & set(section_charts(html))


def keep(run: Path, samples: dict[int, list[KeptSample]]) -> None:
    for step, kept_samples in samples.items():
        store.write_step(run, step, kept_samples, 1 << 30)


def test_the_reader_has_the_samples_with_the_numbers_of_each_token(tmp_path: Path) -> None:
    run = make_run(tmp_path, LEARNING)
    keep(run, {2: [kept(2, "ab", logprobs_training=[-1.5, None])], 1: [kept(1, split="eval", logprobs_training=[])]})
    first, second = embedded(html := reported(run), "samples")
    assert (first["step"], first["split"], first["training"]) == (1, "eval", [None] * 6)
    assert (second["texts"], second["training"], second["inference"]) == (["a", "b"], [-1.5, None], [-0.5, -0.5])
    assert (second["routes"], second["layers"]) == ([2, 0], 4)
    assert "<h2>Samples</h2>" in html and 'id="pick-shade"' in html and "Show more" in html


def test_the_reader_knows_what_an_environment_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, LEARNING)
    keep(run, {1: [conversation()]})
    (entry,) = embedded(reported(run), "samples")
    assert entry["given"] == [0, 0, 1, 1, 1, 1, 0, 0, 0] and entry["last_reply"] == "user: well done"
    assert "9 tokens in 2 turns" in entry["facts"] and entry["inference"][2:6] == [None] * 4


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_no_response_becomes_markup_or_turns_the_text_around_it(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, LEARNING)
    sample = kept(1, text, prompt=text, answer=text, failure=text, reward=None, kept_as=[text])
    keep(run, {1: [sample]})
    html = reported(run)
    (entry,) = embedded(html, "samples")
    assert entry["prompt"] == entry["answer"] == "".join(entry["texts"]) == make_printable(text)
    elements = Elements()
    elements.feed(html)
    assert elements.scripts == 5  # plotly, charts, their script, samples, theirs
    assert not set(html) & set("\u202e\u2066\ud800\x1b\x07")


class Elements(HTMLParser):
    """Counts the scripts of a page, and refuses what only a response has."""

    scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert tag != "b" or attributes, "markup of a response"


def test_a_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LEARNING)
    keep(run, {step: [kept(step, "a" * 3000, prompt="p" * 10_000)] for step in range(1, 41)})
    data = read_samples([("run", run, [7, 99])], 600_000)
    steps = [entry["step"] for entry in data.samples]
    assert {1, 7, 40} <= set(steps) and 5 < len(steps) < 20 and steps == sorted(steps)
    assert len(json.dumps(data.samples)) < 600_000
    (note,) = data.notes
    assert f"{len(steps)} of the 40 steps" in note and f"samples.run={run}" in note
    entry = data.samples[0]
    assert len(entry["texts"]) == 1500 and entry["left_out"] == 1500 and entry["head"] == 750
    assert "[… 4000 characters …]" in entry["prompt"]
    assert read_samples([("run", run, [])], 100).samples == []  # nothing fits


def test_a_torn_file_of_samples_is_a_line_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, LEARNING)
    keep(run, {1: [kept(1)], 2: [kept(2)], 3: [kept(3)]})
    store.step_path(run, 2).write_bytes(b"\x1f\x8b torn <b>")
    terminal_logging.setup()
    html = reported(run)
    assert [entry["step"] for entry in embedded(html, "samples")] == [1, 3]
    assert html.count("step-00002.jsonl.gz is damaged") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_keeps_no_samples_has_no_reader(tmp_path: Path) -> None:
    html = reported(make_run(tmp_path, LEARNING))
    assert "<h2>Samples</h2>" not in html and embedded(html, "samples") is None


def test_a_path_that_is_no_text_is_no_traceback(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ru\udcff", LEARNING)
    write_report([run], tmp_path / "report.html")
    assert "ru\\udcff has 3 steps" in (tmp_path / "report.html").read_text()
