"""The table of metrics against the code that writes and reads them, the runs that are kept, and the documentation."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from run_metrics import find_metrics_without_row, list_records

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import metrics_page  # noqa: E402

from megatron_bai import config  # noqa: E402
from megatron_bai.monitor.detectors import held_out, hockey_stick, run_monitor  # noqa: E402
from megatron_bai.monitor.metrics import metric_names  # noqa: E402
from megatron_bai.monitor.metrics.table.metric import Metric  # noqa: E402
from megatron_bai.monitor.metrics.table.sections import METRICS, PHASES, SECTIONS, find_metric  # noqa: E402
from megatron_bai.monitor.report.html_page import DASHES  # noqa: E402

PACKAGE = ROOT / "megatron_bai"
# Statistics that end in other numbers: of a model's layers, not of a step.
OTHER_STATISTICS = {"rl/route_probe.py"}


def written_name(metric: Metric) -> str:
    """A name that a run may write."""
    return re.sub("/[A-Z]+$", "/0", metric.name.replace("/NAME", "/part"))


def pattern_of(node: ast.expr) -> str:
    """The names that an expression makes, as a regular expression; an empty text where it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.Name(id=name) | ast.FormattedValue(value=ast.Name(id=name)):
            shared = getattr(metric_names, name, None)
            return re.escape(shared) if isinstance(shared, str) else ""
        case ast.JoinedStr(values=parts) if any(map(pattern_of, parts)):
            return "".join(pattern_of(part) or "(.*)" for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right) if pattern_of(left):
            return f"{pattern_of(left)}{pattern_of(right) or '(.*)'}"
    return ""


@cache
def parse(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse((PACKAGE / module).read_text())))


@cache
def patterns_of(module: str) -> set[str]:
    return {pattern_of(node) for node in parse(module) if isinstance(node, ast.expr)} - {""}


def makes(module: str, name: str) -> bool:
    """Whether a text in a module is or becomes the name; a beginning that is filled in must be in the module, too."""
    for pattern in patterns_of(module):
        match = re.fullmatch(pattern, name)
        if match and (not pattern.startswith("(") or re.escape(match[1]) in patterns_of(module)):
            return True
    return False


def recorded_patterns(module: str) -> Iterator[str]:
    """The names under which a module adds to statistics, where it has them as text."""
    for node in parse(module):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=stats), attr=method), args=[name, *_]) if (
                "stats" in stats and method in ("mean", "ratio", "max", "sample_size") and pattern_of(name)
            ):
                yield pattern_of(name)


def test_every_row_says_what_people_ask_of_a_metric() -> None:
    assert len(METRICS) == sum(len(section.metrics) for section in SECTIONS)  # no name twice
    for metric in METRICS.values():
        assert metric.formula and re.fullmatch(r"[A-ZR][^\n]+\.", metric.about), metric.name
        assert metric.chart or metric.place or metric.detectors, f"{metric.name}: nobody sees it"
        assert not metric.label or metric.chart, metric.name
        assert metric.family or not re.search("[A-Z]", metric.name), metric.name
        assert find_metric(written_name(metric)) is metric


def test_a_chart_has_a_line_style_for_each_of_its_metrics() -> None:
    for section in SECTIONS:
        for chart, metrics in section.charts.items():
            lines = [metric for metric in metrics if metric.label]
            assert lines and (chart.kind != "lines" or len(lines) <= len(DASHES)), chart.title


def test_the_producers_of_a_row_have_its_name() -> None:
    for metric in METRICS.values():
        assert any(makes(producer, written_name(metric)) for producer in metric.producers), metric.name
        assert all((PACKAGE / producer).is_file() for producer in metric.producers), metric.name


def test_what_the_package_adds_to_statistics_has_a_row() -> None:
    names = [written_name(metric) for metric in METRICS.values()]
    modules = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "stats." in path.read_text()]
    recorded = [(module, pattern) for module in modules for pattern in recorded_patterns(module)]
    assert len(recorded) > 50
    for module, pattern in recorded:
        assert module in OTHER_STATISTICS or any(re.fullmatch(pattern, name) for name in names), f"{module}: {pattern}"


def test_the_phases_are_those_that_the_trainer_times() -> None:
    timed = [
        node.args[0].value
        for node in parse("rl/trainer.py")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "clock"
        if isinstance(node.args[0], ast.Constant)
    ]
    assert sorted(timed) == sorted(PHASES)


def test_the_detectors_of_a_row_are_those_that_read_it() -> None:
    rules = [drift.rule for drift in run_monitor.Monitor(config.Monitor())._drifts]
    read = {(name, rule.detector) for rule in rules for name in (rule.metric, rule.count_metric) if name}
    read |= {(name, "entropy_collapse") for name in held_out.METRIC_NAMES}
    buckets = (metric_names.REWARD_PREFIX, metric_names.COUNT_PREFIX)
    read |= {(f"{prefix}LOW", hockey_stick.DETECTOR) for prefix in buckets}
    assert read == {(metric.name, detector) for metric in METRICS.values() for detector in metric.detectors}


@pytest.mark.parametrize("record", sorted(ROOT.glob("tests/data/head-*/*/metrics.jsonl")), ids=lambda p: p.parent.name)
def test_the_runs_that_are_kept_have_no_other_metrics(record: Path) -> None:
    assert len(record.read_text()) > 1000 and find_metrics_without_row(record) == set()


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ("objective: {name: minirl}", {"made_up", "route_mismatch/x", "seconds_lunch"}),
        ("", {"made_up", "route_mismatch/x", "seconds_lunch"}),
        ("objective: {name: reinforce}", set()),  # from outside: it may log what it likes
    ],
)
def test_a_metric_without_a_row_is_found(tmp_path: Path, settings: str, missing: set[str]) -> None:
    record = dict.fromkeys(("step", "kl_k3_live", "route_mismatch/3", "reward_by_length/100", *missing), 0.5)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 2, "torn')
    (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "metrics.jsonl").symlink_to("nothing")
    assert list_records(tmp_path) == {tmp_path / "metrics.jsonl"}
    assert find_metrics_without_row(tmp_path / "metrics.jsonl") == missing


def test_the_tables_of_the_page_are_what_the_rows_say() -> None:
    page = metrics_page.PAGE.read_text()
    assert page == metrics_page.make_page(page), "run: python tools/metrics_page.py"
    tables = page.partition("<!-- metrics:")[2].partition("<!-- end of metrics -->")[0]
    for metric in METRICS.values():
        assert f"`{metric.name}`" in tables or f"`{metric.name.removeprefix(metric.stem)}`" in tables, metric.name
