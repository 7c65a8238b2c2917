"""The report: what it reads, what it refuses, and that nothing in a run's files becomes markup."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bai.cli import report as report_verb
from megatron_bai.config import Config, Report, Run
from megatron_bai.errors import UserError
from megatron_bai.monitor.report.report import load_run, write_report
from megatron_bai.monitor.report.run_data import run_names


def make_run(directory: Path, records: list[dict[str, Any]], tail: str = "", config: str = "", **summary: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    if config:
        (directory / "config.yaml").write_text(config)
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def section_charts(html: str) -> dict[str, dict[str, Any]]:
    """The charts in a report by title."""
    data = html.split('<script type="application/json" id="charts">')[1].split("</script>")[0]
    return {chart["title"]: chart for chart in json.loads(data)}


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


def test_unknown_metrics_are_shown(tmp_path):
    run = make_run(tmp_path, [{"step": 0, "made_up": 0.5, "note": "text", "flag": True}])
    write_report([run], tmp_path / "report.html")
    assert set(section_charts((tmp_path / "report.html").read_text())) == {"made_up"}


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
    assert "recipe.alpha" in html and "<th>ckpt/i</th><td>0.25</td>" in html


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
