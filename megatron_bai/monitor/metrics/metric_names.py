"""Names of metrics that one module writes and others read, which then need no torch."""

REWARD_PREFIX = "reward_by_length/"  # followed by the least length of a bucket
PART_PREFIX = "reward_part/"  # followed by the name of a part of reward=several
COUNT_PREFIX = "responses_by_length/"  # likewise
MERGE_ROUTING = ("merge_routes_kept", "merge_routes_overlap")  # followed by the number of a merge's source
TOKENS_METRIC = "response_tokens"
