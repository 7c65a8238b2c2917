"""The report of a run, or of several side by side, as one self-contained HTML file."""

from html import escape
from pathlib import Path

from megatron_bai.errors import UserError, os_errors_as_user_errors
from megatron_bai.monitor.metrics.metric_names import MERGE_ROUTING
from megatron_bai.monitor.metrics.table.sections import METRICS, PHASES, SECTIONS
from megatron_bai.monitor.metrics.table.speed import PHASE_PREFIX
from megatron_bai.monitor.report import html_page
from megatron_bai.monitor.report.charts import COLOURS, own_charts, section_charts
from megatron_bai.monitor.report.headline import describe_discrepancy, describe_run, format_change
from megatron_bai.monitor.report.html_page import ChartSection
from megatron_bai.monitor.report.reader import read_samples
from megatron_bai.monitor.report.reader_page import reader_html
from megatron_bai.monitor.report.run_data import RunData, load_run, run_names
from megatron_bai.utils import atomic_file
from megatron_bai.utils.flatten import flatten

_OWN_INTRO = "The runs' own metrics, such as those of an objective from outside: they are none of megatron_bai's."


def write_report(run_dirs: list[Path], output: Path) -> None:
    """Read the runs and write the report, replacing an earlier one in a single move.

    Args:
        run_dirs: directories of runs, in the order of the report; each has a `metrics.jsonl`.
        output: the HTML file; its directory is made if it is missing.

    Raises:
        UserError: there is no run, a directory has no usable metrics, a file in it cannot be read, or the report
            cannot be written.
    """
    if not run_dirs:
        raise UserError("there is no run to report: name run directories in report.runs")
    names = run_names(run_dirs)
    runs = [
        load_run(d, name, COLOURS[i % len(COLOURS)]) for i, (d, name) in enumerate(zip(run_dirs, names, strict=True))
    ]
    samples = read_samples([(run.name, run.directory, [alarm.step for alarm in run.alarms()]) for run in runs])
    sections: list[str | ChartSection] = [
        _headlines(runs),
        _summary_cards(runs),
        _alarm_section(runs),
        reader_html(samples),
        *(ChartSection(section.title, section.intro, section_charts(section, runs)) for section in SECTIONS),
        ChartSection("Other", _OWN_INTRO, own_charts(runs)),
        _merge_section(runs),
        _config_section(runs),
    ]
    page = html_page.render_page("megatron-bai · " + ", ".join(names), sections, samples.samples)
    with os_errors_as_user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_file.write_text(output, page)


def _headlines(runs: list[RunData]) -> str:
    """Return the sentences on each run, the one on its discrepancy set off from the other."""
    texts = [(describe_run(run), describe_discrepancy(run)) for run in runs]
    return "".join(
        f'<p class="headline">{escape(text)}</p>'
        + (f'<p class="headline discrepancy">{escape(discrepancy)}</p>' if discrepancy else "")
        for text, discrepancy in texts
    )


def _summary_cards(runs: list[RunData]) -> str:
    cards = (
        f'<div class="card"><h3><i style="background:{run.colour}"></i>{escape(run.name)}</h3>'
        f"{_summary_card(run)}</div>"
        for run in runs
    )
    note = "<p>Every chart has the global step on its x axis.</p>" if any(run.records for run in runs) else ""
    return "".join(cards) + note


def _alarm_section(runs: list[RunData]) -> str:
    """Return the section of the alarms; an empty text where there are none."""
    cards = []
    for run in runs:
        alarms = run.alarms()
        # The advice of several alarms of a detector is shown once.
        for detector, advice in dict.fromkeys((alarm.detector, alarm.advice) for alarm in alarms):
            same = [alarm for alarm in alarms if (alarm.detector, alarm.advice) == (detector, advice)]
            rows = [[str(a.step), f"{a.evidence} ({a.deviations:.0f} standard errors)", a.action] for a in same]
            name = f"{escape(run.name)}: {escape(detector.replace('_', ' '))}"
            title = f'<h3><i style="background:{run.colour}"></i>{name}</h3>'
            table = html_page.table_html(["step", "evidence", "action"], rows, compare=False)
            cards.append(f'<div class="card prose">{title}{table}<p>{escape(advice)}.</p></div>')
    return "<h2>Alarms</h2><p>Marked ▼ on the curves below.</p>" + "".join(cards) if cards else ""


def _summary_card(run: RunData) -> str:
    """Return first and last reward and accuracy, time, slowest phase, layout and versions, as far as known."""
    items = []
    for metric in (METRICS["reward_mean"], METRICS["eval_accuracy"]):
        values = [v for v in run.series(metric.name)[1] if v is not None]
        if values:
            items.append((f"{metric.short.capitalize()}, first → last", format_change(values)))
    items.append(("Steps", str(len(run.records))))
    seconds = {phase: sum(v or 0.0 for v in run.series(PHASE_PREFIX + phase)[1]) for phase in (*PHASES, "step")}
    total = seconds.pop("step")
    if total > 0:
        slowest = max(seconds, key=seconds.__getitem__)
        items.append(("Seconds in all", f"{total:.0f}"))
        items.append(("Slowest phase", f"{slowest.replace('_', ' ')}, {seconds[slowest] / total:.0%}"))
    if run.records and "weight_version" in run.records[-1]:
        items.append(("Weight version", str(run.records[-1]["weight_version"])))
    big = len(items)
    if resumed := run.summary.get("resumed"):
        items.append(("Resumed after step", ", ".join(map(str, resumed))))
    if run.summary.get("complete") is False:
        items.append(("State", "not finished"))
    layout = run.summary.get("layout") or run.config.get("parallel")
    for label, group in (("Layout", layout), ("Versions", run.summary.get("versions"))):
        if isinstance(group, dict):
            items.append((label, " · ".join(f"{key} {value}" for key, value in flatten(group).items() if value)))
    return html_page.facts_html(items, big)


def _merge_section(runs: list[RunData]) -> str:
    """Return the sources and coefficients of the merge that the actor began as; an empty text without one."""
    cards = []
    for run in (run for run in runs if run.provenance):
        sources = [s for s in run.provenance.get("sources", []) if isinstance(s, dict)]
        kept = _routing_kept(run, len(sources))
        rows = [
            [str(s.get("path")), str(s.get("coefficient")), *shares, str(s.get("digest", ""))[:12]]
            for s, shares in zip(sources, kept, strict=True)
        ]
        recipe = flatten({key: run.provenance.get(key) for key in ("recipe", "created")})
        for name, label in (("experts_effective", "Experts in use, a layer"), ("route_margin", "Margin of its routes")):
            if value := _first_value(run, f"merge_{name}", ".3g"):
                recipe[label] = value
        recipe.pop("recipe.terms", None)  # the table below
        cards.append(f'<div class="card"><h3>{escape(run.name)}</h3>{html_page.facts_html(list(recipe.items()))}<br>')
        header = ["checkpoint", "coefficient", "its routes kept", "its experts kept", "digest"]
        cards.append(html_page.table_html(header, rows, compare=False) + "</div>")
    return "<h2>Merge</h2><p>The weights that training started from.</p>" + "".join(cards) if cards else ""


def _routing_kept(run: RunData, count: int) -> list[list[str]]:
    """Return what the merge keeps of each source's routing, as measured before the first step (`rl/merge_routing`).

    Dashes where that was not measured, or of other sources than these `count`: one without a coefficient was not read.
    """
    keys = [run.numbered_metrics(prefix) for prefix in MERGE_ROUTING]
    if any(len(of_prefix) != count for of_prefix in keys):
        return [["–"] * len(keys)] * count
    return [[_first_value(run, key, ".1%") for key in of_source] for of_source in zip(*keys, strict=True)]


def _first_value(run: RunData, key: str, form: str) -> str:
    """Return a metric of a run's first steps alone; an empty text without one."""
    return next((format(value, form) for value in run.series(key)[1] if value is not None), "")


def _config_section(runs: list[RunData]) -> str:
    """Return the settings in which runs differ, and all settings of all runs."""
    settings = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    if not keys:
        return ""
    rows = [[key, *(one.get(key, "–") or "(empty)" for one in settings)] for key in keys]
    header, differing = ["setting", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1]
    diff = f"<div class=card>{html_page.table_html(header, differing, compare=False)}</div>" if differing else ""
    table = f"<div class=card>{html_page.table_html(header, rows)}</div>"
    everything = f"<details><summary>{len(keys)} settings</summary>{table}</details>"
    intro = ""
    if len(runs) > 1:
        intro = (
            f"<p>The runs differ in {len(differing)} settings.</p>" if differing else "<p>The runs do not differ.</p>"
        )
    return f"<h2>Configuration</h2>{intro}{diff}{everything}"
