"""Compute what a run holds on each GPU, from settings alone."""
