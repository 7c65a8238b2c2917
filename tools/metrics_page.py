"""Write the tables of metrics in docs/monitoring.md from `megatron_bai/monitor/metrics/table`.

python tools/metrics_page.py
"""

import re
from pathlib import Path

from megatron_bai.monitor.metrics.table.metric import Metric, MetricSection
from megatron_bai.monitor.metrics.table.sections import SECTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "monitoring.md"
_MARKS = "<!-- metrics: written by tools/metrics_page.py -->", "<!-- end of metrics -->"
_COLUMNS = ("metric", "unit", "what it is", "formula", "computed by", "in the report", "detector")
_HEADER = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def make_page(page: str) -> str:
    """Return the text of the page with new tables between its marks."""
    head, rest = page.split(_MARKS[0])
    tables = "\n\n".join(_make_table(section) for section in SECTIONS)
    return f"{head}{_MARKS[0]}\n\n{tables}\n\n{_MARKS[1]}{rest.split(_MARKS[1])[1]}"


def _make_table(section: MetricSection) -> str:
    """Make a section: a metric and what measures it in another way are one row."""
    others: dict[str, list[Metric]] = {}
    for metric in section.metrics:
        if metric.stem:
            others.setdefault(metric.stem, []).append(metric)
    rows = [_make_row(metric, others.get(metric.name, [])) for metric in section.metrics if not metric.stem]
    return "\n".join([f"### {section.title}\n\n{section.intro}\n", _HEADER, *rows])


def _make_row(metric: Metric, others: list[Metric]) -> str:
    names = [f"`{metric.name}`", *(f"`{other.name.removeprefix(metric.name)}`" for other in others)]
    titles = dict.fromkeys(one.chart.title for one in (metric, *others) if one.chart)
    cells = (
        ", ".join(names),
        metric.unit,
        metric.about.removesuffix("."),
        metric.formula,
        ", ".join(f"`{path}`" for path in metric.producers),
        "; ".join((*titles, *filter(None, ["first sentence" if metric.short else "", metric.place]))),
        ", ".join(f"`{detector}`" for detector in metric.detectors),
    )
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    """Return a cell's text, with links for the pages that it names."""
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
