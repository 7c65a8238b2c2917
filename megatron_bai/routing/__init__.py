"""Record, replay, slice and store the experts that tokens are routed to."""
