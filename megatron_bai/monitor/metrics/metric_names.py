"""Names of metrics that are written in one place and read in others, which then need no torch."""

REWARD_PREFIX = "reward_by_length/"  # and the least length of a bucket
COUNT_PREFIX = "responses_by_length/"  # likewise
TOKENS_METRIC = "response_tokens"
