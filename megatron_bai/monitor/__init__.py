"""Measure a run, watch it for collapse, log it and report it."""
