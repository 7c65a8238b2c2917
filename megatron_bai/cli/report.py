"""The verb `report`: one HTML page about runs, finished or in progress."""

from pathlib import Path

from megatron_bai.config import Config
from megatron_bai.monitor.report.report import write_report


def run(config: Config) -> None:
    """Report `report.runs` (or this run) in `report.output` (or `report.html` in the first run's directory)."""
    run_dirs = [Path(name) for name in config.report.runs or [config.run.dir]]
    output = Path(config.report.output) if config.report.output else run_dirs[0] / "report.html"
    write_report(run_dirs, output)
    print(f"wrote {output}")
