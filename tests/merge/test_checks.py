"""Records proven from the parts that threads and ranks read of them."""

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bai.checkpoint.record_crcs import RecordCrcs
from megatron_bai.distributed.rank_group import RankGroup

DATA = bytes(range(256)) * 4
PLACE = ("file", 7)


def part(begin: int, end: int) -> tuple[int, int, int]:
    return begin, end - begin, zlib.crc32(DATA[begin:end])


class Gathered(RankGroup):
    """One of several ranks whose shares are known: `run_on_all` returns them beside this one's result."""

    others: list[RecordCrcs]

    def __init__(self, others: list[RecordCrcs]):
        super().__init__(0, 1)
        object.__setattr__(self, "others", others)

    def run_on_all(self, function):
        mine = function()
        return [mine, *((c._complete, c._partial) for c in self.others)] if isinstance(mine, tuple) else [mine]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, len(DATA) - 1), max_size=9), st.randoms(use_true_random=False), st.integers(1, 3))
def test_parts_in_any_order_on_any_rank_make_up_the_record(cuts, random, ranks):
    ends = sorted(cuts) + [len(DATA)]
    parts = [part(a, b) for a, b in zip([0, *ends], ends)]
    random.shuffle(parts)
    checks = [RecordCrcs() for _ in range(ranks)]
    found = [checks[i % ranks].add_range(PLACE, p, len(DATA)) for i, p in enumerate(parts)]
    whole = zlib.crc32(DATA)
    assert [crc for crc in found if crc is not None] == [whole] * (ranks == 1 or len(parts) == 1)
    seen = []
    settled = checks[0].resolve_all([PLACE], Gathered(checks[1:]), lambda place, crc, touched: seen.append(crc) or crc)
    assert settled == {PLACE: whole}
    assert seen == [] if ranks == 1 or len(parts) == 1 else seen == [whole]


def test_parts_that_overlap_or_leave_gaps_prove_nothing():
    for parts in ([part(0, 600), part(400, 1024)], [part(0, 500), part(524, 1024)], [part(0, 624), part(0, 400)]):
        checks, asked = RecordCrcs(), []
        assert all(checks.add_range(PLACE, p, len(DATA)) is None for p in parts)
        checks.resolve_all(
            [PLACE], RankGroup(), lambda place, crc, touched, asked=asked: asked.append((crc, touched)) or 1
        )
        assert asked == [(None, True)], "the record must be read again"


def test_what_nobody_read_is_asked_for():
    asked = []
    found = RecordCrcs().resolve_all(
        [PLACE], RankGroup(), lambda place, crc, touched: asked.append((crc, touched)) or 5
    )
    assert found == {PLACE: 5} and asked == [(None, False)]
