"""Token ids of texts of several lengths, on which models are compared: more of them than a micro-batch has rows."""

import random

_RANDOM = random.Random(3)
SEQUENCES = [[_RANDOM.randrange(64) for _ in range(length)] for length in (5, 17, 1, 12, 9)]
