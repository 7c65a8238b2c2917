"""Compute the metrics of responses, routers and the discrepancy between the engines."""
