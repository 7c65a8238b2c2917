"""Ask SGLang servers for samples with log-probabilities and routes."""
