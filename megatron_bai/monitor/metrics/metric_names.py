"""Names of metrics that are written in one place and read in others, which then need no torch."""

REWARDS = "reward_by_length/"  # and the least length of a bucket
COUNTS = "responses_by_length/"  # likewise
TOKENS = "response_tokens"
