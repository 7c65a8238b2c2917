"""Sinks of SGLang's attention on a CPU beside their formula in float64."""

import pytest
import torch

from megatron_bai.compat.sglang_attention_sinks import attend


@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize("new", [1, 5, 12])
def test_a_sink_stands_beside_the_scores_and_for_nothing(new: int, window: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(new, 6, 8, dtype=torch.float64, generator=draw)
    keys = torch.randn(12, 2, 8, dtype=torch.float64, generator=draw)
    values = torch.randn(12, 2, 4, dtype=torch.float64, generator=draw)
    sinks = torch.randn(6, dtype=torch.float32, generator=draw)
    found = attend(query, keys, values, sinks, 0.3, window)
    for row in range(new):
        last = 12 - new + row
        first = 0 if window is None else max(0, last - window)
        for head in range(6):
            scores = 0.3 * keys[first : last + 1, head // 3] @ query[row, head]
            weights = torch.softmax(torch.cat([scores, sinks[head : head + 1].double()]), 0)[:-1]
            torch.testing.assert_close(found[row, head], weights @ values[first : last + 1, head // 3])
