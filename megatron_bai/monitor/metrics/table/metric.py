"""A row of the table of metrics, and the charts and sections that rows belong to."""

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class MetricChart:
    """A chart of a report: it has the metrics whose rows name it.

    Attributes:
        title: above the chart.
        kind: `lines` has a line for each run and metric; the others are a chart for each run: `phases` stacked bars,
            `buckets` a line for each length bucket, `layers` a heat map of layers.
        log: whether the axis is logarithmic.
    """

    title: str
    kind: Literal["lines", "phases", "buckets", "layers"] = "lines"
    log: bool = False


@dataclass(frozen=True)
class Metric:
    """A metric that a run may write, or a family of them.

    Attributes:
        name: in `metrics.jsonl`. That of a family ends in `/` and a word in capitals, which stands for digits, or for a
            name where it is `NAME`.
        unit: of the values; `fraction` is a share from 0 to 1, an empty text a number without a unit.
        formula: how the values are computed.
        producers: modules that compute them, as paths below the package.
        about: one sentence for people. It may name pages as `docs/rollout.md`.
        chart: of a report; None: no chart has it.
        label: of its line in the chart; empty: it has none of its own, the chart uses it otherwise.
        place: what of a report has it beside the chart or in its stead.
        detectors: that read it.
        short: what the first sentence of a report calls it; empty: it is not there.
        form: format of its numbers in that sentence.
        stem: the metric that this one measures in another way; empty: itself.
    """

    name: str
    unit: str
    formula: str
    producers: tuple[str, ...]
    about: str
    chart: MetricChart | None = None
    label: str = ""
    place: str = ""
    detectors: tuple[str, ...] = ()
    short: str = ""
    form: str = ".4g"
    stem: str = ""

    @property
    def family(self) -> str:
        """What the names of a family have before the `/`; empty for a single metric."""
        match = re.fullmatch(r"(.+)/[A-Z]+", self.name)
        return match[1] if match else ""

    def matches(self, name: str) -> bool:
        """Return whether a name of a run's record is this metric's, or of this family."""
        if not self.family:
            return name == self.name
        family, _, member = name.rpartition("/")
        is_member = member.isidentifier() if self.name.endswith("/NAME") else member.isdigit()
        return family == self.family and is_member

    def in_other_way(self, suffix: str, chart: MetricChart, label: str) -> "Metric":
        """Return the row of this metric measured in another way.

        Args:
            suffix: of the other's name.
            chart: that draws it.
            label: of its line there.
        """
        return replace(
            self, name=self.name + suffix, chart=chart, label=label, place="", detectors=(), short="", stem=self.name
        )


@dataclass(frozen=True)
class MetricSection:
    """Rows that a report and the documentation show together.

    Attributes:
        title: heading.
        intro: the question that its charts answer, a sentence.
        metrics: in the order of the charts and of the lines in a chart.
    """

    title: str
    intro: str
    metrics: tuple[Metric, ...]

    @property
    def charts(self) -> dict[MetricChart, tuple[Metric, ...]]:
        """The charts in the order of the rows, with all their metrics."""
        charts = dict.fromkeys(metric.chart for metric in self.metrics if metric.chart)
        return {chart: tuple(metric for metric in self.metrics if metric.chart == chart) for chart in charts}
