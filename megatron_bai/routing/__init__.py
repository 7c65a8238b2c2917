"""Record, replay, cut and store the experts that tokens are routed to."""
