"""Sample from SGLang servers, with log-probabilities and routes."""
