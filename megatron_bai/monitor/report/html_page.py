"""The HTML shell of a report: one file, plotly's own JavaScript inside it, charts drawn by the reader's browser.

A chart is a dictionary of plain data: `title`, `traces`, `log`, `legend`, `map` for a heat map over layers, and `floor`
where zeros are drawn on a log axis.
`_SCRIPT` gives it the colours of the page: light and dark follow the reader's setting, also while the page is open.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from megatron_bai.monitor.report import reader_page

Chart = dict[str, Any]


@dataclass(frozen=True)
class ChartSection:
    """Charts under a heading. Those of nothing but zero are named in a line that unfolds.

    Attributes:
        title: heading, HTML.
        intro: a sentence, HTML.
        charts: in their order; without any the section is not shown.
    """

    title: str
    intro: str
    charts: list[Chart]

    @property
    def drawn(self) -> list[Chart]:
        """The charts that have a figure, in the order of the figures."""
        return [chart for chart in self.charts if not _is_all_zero(chart)]

    def format_html(self) -> str:
        """Return the section with a figure for each chart that is drawn; the page's script fills them."""
        if not self.charts:
            return ""
        figures = "".join(_figure_html(chart) for chart in self.drawn)
        names = [escape(chart["title"]) for chart in self.charts if _is_all_zero(chart)]
        count = f"{len(names)} chart{'s' if len(names) > 1 else ''} of nothing but zero"
        folded = f"<details><summary>{count}</summary><p>{'<br>'.join(names)}</p></details>" if names else ""
        return f'<h2>{self.title}</h2><p>{self.intro}</p><div class="charts">{figures}</div>{folded}'


# plotly's names of line styles, of a chart's first metric, the second, …, and CSS's
DASHES = {"solid": "2px solid", "dot": "2px dotted", "dash": "2px dashed", "dashdot": "4px double"}

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1d1f23; --soft: #62676f; --line: #e3e4e6;
  --mark: #fdf3d8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #131518; --card: #1b1e22; --text: #e6e7ea; --soft: #9aa0a8; --line: #2e3238; --mark: #3a3320 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0 0 .25rem }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.75rem 0 .25rem }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .75rem; overflow-wrap: anywhere }
p { margin: .25rem 0 1rem; color: var(--soft); max-width: 70ch }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  margin: 0 0 1rem; min-width: 0 }
.card h3 i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .9rem 1.25rem; margin: 0 }
dt { color: var(--soft); font-size: .78rem }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
dd.big { font-size: 1.3rem }
.line { grid-column: 1 / -1; display: grid; grid-template-columns: minmax(6rem, 9.5rem) 1fr; align-items: baseline;
  font-size: .88rem }
.line + .line { margin-top: -.6rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
.headline { font-size: 1.12rem; color: var(--text); max-width: none; margin: .75rem 0 1.25rem }
.discrepancy { border-left: 3px solid var(--soft); padding-left: .75rem }
figure { margin: 0; padding: .85rem .5rem .25rem }
figcaption { font-size: .88rem; font-weight: 600; padding: 0 .6rem }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .25rem .6rem 0; font-size: .78rem; color: var(--soft) }
.legend span { min-width: 0; overflow-wrap: anywhere }
.legend i { display: inline-block; width: 1.3rem; margin-right: .4rem; vertical-align: middle }
.plot { height: 17rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line) }
td { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere }
th { font-weight: 500; color: var(--soft) }
.prose td { font: inherit }
.prose p { margin: .75rem 0 0 } .prose :is(th, td) { overflow-wrap: break-word }
tr.differs { background: var(--mark) }
summary { cursor: pointer; color: var(--soft) }
.charts + details { margin-top: .9rem }
@media (max-width: 36rem) { body { padding: 1.25rem .75rem 3rem } .plot { height: 14rem } }
"""

_SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// On a log axis over more than one decade 1, 2 and 5 of each, or every n-th decade: all nine digits would crowd.
// With a format every tick has its whole number; without, plotly writes 2 and 5 where it means 2e-5 and 5e-5.
function ticks(chart) {
  const logs = chart.traces.flatMap(trace => trace.y).filter(y => y > 0).map(Math.log10);
  const high = logs.reduce((a, b) => Math.max(a, b), -400), low = logs.reduce((a, b) => Math.min(a, b), 400);
  const decades = high - low;
  if (chart.floor === undefined)
    return { tickformat: high < -1 ? ".3~e" : ".3~g",
      dtick: decades > 2 ? Math.ceil(decades / 6) : decades > 1 ? "D2" : "D1" };
  const every = Math.max(1, Math.ceil(decades / 6)), values = [chart.floor];  // where zeros are drawn
  for (let exponent = Math.round(Math.log10(chart.floor)) + 1; exponent <= Math.ceil(high); exponent += every)
    values.push(10 ** exponent);
  const text = value => value < .01 ? value.toExponential(0) : String(+value.toPrecision(1));
  return { tickvals: values, ticktext: values.map((value, i) => i ? text(value) : "0") };
}
// Of few steps plotly would mark halves.
function wholeSteps(chart) {
  const steps = chart.traces.flatMap(trace => trace.x);
  const span = steps.reduce((a, b) => Math.max(a, b), -Infinity) - steps.reduce((a, b) => Math.min(a, b), Infinity);
  return span <= 8 ? { dtick: 1 } : {};
}
function layout(chart) {
  const line = colour("--line");
  const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true,
    fixedrange: !matchMedia("(pointer: fine)").matches };  // a finger scrolls the page, a mouse may select to zoom
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--soft"), size: 12 },
    margin: { l: 48, r: 14, t: 10, b: 34 }, hovermode: chart.map ? "closest" : "x unified",
    barmode: "stack", bargap: .25,
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    showlegend: false,  // the page's own wraps below the title and leaves the plot its height
    xaxis: { ...axis, title: { text: "global step", standoff: 6 }, ...wholeSteps(chart) },
    yaxis: { ...axis, type: chart.map ? "category" : chart.log ? "log" : "linear", rangemode: "tozero",
      exponentformat: "e", ...(chart.log ? ticks(chart) : {}) },
  };
}
const plots = document.querySelectorAll(".plot");  // in the order of the charts
const draw = () => charts.forEach((chart, i) =>
  Plotly.react(plots[i], chart.traces, layout(chart), { responsive: true, displayModeBar: false }));
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def _is_all_zero(chart: Chart) -> bool:
    """Return whether a chart has numbers, and each is 0."""
    rows = [row for trace in chart["traces"] for row in (trace["z"] if "z" in trace else [trace["y"]])]
    values = [value for row in rows for value in row if value is not None]
    return bool(values) and not any(values)


def _figure_html(chart: Chart) -> str:
    """Return the figure of a chart, with title and legend; the script draws its traces."""
    keys = "".join(_legend_entry(t) for t in chart["traces"] if "unnamed" not in t) if chart["legend"] else ""
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    title = f"<figcaption>{escape(chart['title'])}</figcaption>"
    return f'<figure>{title}{legend}<div class="plot"></div></figure>'


def _legend_entry(trace: dict[str, Any]) -> str:
    """Return a trace's mark and its name, which is escaped already, as plotly needs it."""
    if trace.get("mode") == "markers":
        return f'<span><b style="color:{trace["marker"]["color"]}">▼</b> {trace["name"]}</span>'
    line = trace.get("line")
    if "fillcolor" in trace:
        return f'<span><i style="border-top:8px solid {trace["fillcolor"]}"></i>{trace["name"]}</span>'
    style = f"{DASHES[line['dash']]} {line['color']}" if line else f"8px solid {trace['marker']['color']}"
    return f'<span><i style="border-top:{style}"></i>{trace["name"]}</span>'


def facts_html(items: list[tuple[str, str]], big: int = 0) -> str:
    """Return a list of named values: the first `big` of them large and side by side, the others one a line.

    Args:
        items: (name, value) as plain text, which is escaped here.
        big: number of large ones, 0 for none.
    """
    cells = (
        f"<div{'' if i < big else ' class=line'}><dt>{escape(name)}</dt>"
        f"<dd{' class=big' if i < big else ''}>{escape(value)}</dd></div>"
        for i, (name, value) in enumerate(items)
    )
    return f"<dl>{''.join(cells)}</dl>"


def table_html(header: list[str], rows: list[list[str]], compare: bool = True) -> str:
    """Return a table.

    Args:
        header: titles of the columns.
        rows: cells, the first of which is the row's name.
        compare: whether rows whose values differ are marked.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = (
        f"<tr{' class=differs' if compare and len(set(row[1:])) > 1 else ''}><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render_page(title: str, sections: Sequence[str | ChartSection], samples: list[dict[str, Any]] | None = None) -> str:
    """Return the whole document, which loads nothing from outside.

    Args:
        title: text.
        sections: HTML, or charts.
        samples: shown by the reader, whose section is in `sections`; None or none: there is no reader.
    """
    body = "".join(part if isinstance(part, str) else part.format_html() for part in sections)
    charts = [chart for part in sections if isinstance(part, ChartSection) for chart in part.drawn]
    reader = f"{_data_html('samples', samples)}<script>{reader_page.SCRIPT}</script>" if samples else ""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{reader_page.STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>{body}"
        f"{_data_html('charts', charts)}<script>{_SCRIPT}</script>{reader}</body></html>\n"
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # a path may have bytes that are no text


def _data_html(name: str, data: Any) -> str:
    """Return an element whose text is JSON in ASCII, for a script to parse."""
    # A browser ends a script element at "</", wherever it stands: no "<" is left in the data.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
