"""Collect what a step trains on: rollouts, rewards, routes, staleness, evaluation."""
