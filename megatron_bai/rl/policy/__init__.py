"""Compute with the trained models: log-probabilities, forward and backward passes, updates, the critic."""
