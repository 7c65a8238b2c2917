"""Detect collapse in a run's metrics."""
