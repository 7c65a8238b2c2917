"""The table of metrics: every metric that a run of this package writes, for reports, documentation and tests."""
