"""The whole table: what runs write, from which charts, phases, the first sentence and `docs/monitoring.md` are made.

A metric of this package has a row here, or a test fails. Metrics without one are the run's own: those of an objective
from outside, which a report shows in a section for themselves.
"""

from megatron_bai.monitor.metrics.table.critic import CRITIC
from megatron_bai.monitor.metrics.table.learning import LEARNING
from megatron_bai.monitor.metrics.table.metric import Metric
from megatron_bai.monitor.metrics.table.routing import ROUTING
from megatron_bai.monitor.metrics.table.speed import PHASE_CHART, PHASE_PREFIX, SPEED
from megatron_bai.monitor.metrics.table.stability import STABILITY

SECTIONS = (LEARNING, STABILITY, ROUTING, CRITIC, SPEED)
METRICS: dict[str, Metric] = {metric.name: metric for section in SECTIONS for metric in section.metrics}
PHASES = tuple(m.name.removeprefix(PHASE_PREFIX) for m in SPEED.metrics if m.chart == PHASE_CHART and m.label)
_FAMILIES = {metric.family: metric for metric in METRICS.values() if metric.family}


def find_metric(name: str) -> Metric | None:
    """Return the row of a metric by the name that a run wrote; None: it is not one of this package's."""
    metric = METRICS.get(name) or _FAMILIES.get(name.rpartition("/")[0])
    return metric if metric and metric.matches(name) else None
