"""Start, supervise and update SGLang servers."""
