"""A numbering of the sets of k out of E experts, fast and nearly without gaps.

The combinatorial number system gives the set {c₁ < … < c_k} the number Σᵢ Bᵢ(cᵢ) with Bᵢ(c) = C(c, i), the count of
i-subsets of {0 … c − 1} (Knuth, The Art of Computer Programming 4A, 7.2.1.3). Reading it back searches, from the
largest element down, for the last c with Bᵢ(c) ≤ remainder, which is slow in arrays. Here the counts are rounded up,

    Bᵢ(c + 1) = Bᵢ(c) + ⌈Bᵢ₋₁(c)⌉ to a multiple of 2^sᵢ,    B₀ = 1,

so that the remainder's upper bits alone, remainder >> sᵢ, decide c: one table look-up. The rounding leaves numbers
unused: for 8 of 128 experts 0.2 bits' worth beside 40.4, within the 41 that a word has anyway.
"""

from functools import lru_cache
from math import comb, log2

import numpy as np

# The numbers follow from these four: to change one is to change what an envelope means, and so the codec's version.
MAX_EXPERTS, MAX_TOPK = 1024, 16
LOW_WORD_BITS = 58  # bits of the low word where a number has two
_ONE_WORD_BITS = 62  # the most bits that are stored in one int64 word
_TABLE_BITS = (15, 17, 19)  # log₂ of a table's entries: more where rounding to fewer would cost too much
_CLOSE = 1.03  # of the bound: a length that is accepted


def min_bits(experts: int, topk: int) -> float:
    """Compute log₂ C(E, k): no fixed-length code of sets is shorter.

    Args:
        experts: E.
        topk: k, at most E.

    Returns:
        Bits of one set, not rounded up.
    """
    return log2(comb(experts, topk))


class SetCode:
    """The numbering of `topk` of `experts`; `set_code` makes it.

    Attributes:
        count: numbers in use lie in `[0, count)`.
        group: sets that share a word, as digits in base `count`: one set of 6 possible ones needs 3 bits, 5 need 13.
        bits: of a word.
        dtype: of experts' ids.
        wide: a number does not fit one int64; words are then pairs (low `LOW_WORD_BITS` bits, the others).
    """

    def __init__(self, experts: int, topk: int):
        self.experts, self.topk = experts, topk
        for bits in _TABLE_BITS:
            starts, shifts = _starts(experts, topk, bits)
            self.count = starts[topk][experts]
            self.wide = self.count.bit_length() > _ONE_WORD_BITS
            self.group, self.bits = self._grouping()
            if self._is_close(self.bits / self.group):
                break
        mask = (1 << LOW_WORD_BITS) - 1
        self._shifts = shifts
        self._narrow = [row[-1].bit_length() <= _ONE_WORD_BITS for row in starts]
        self._starts = [
            np.array(row if fits else [], dtype=np.int64) for row, fits in zip(starts, self._narrow, strict=True)
        ]
        self._limbs = [
            (np.array([start & mask for start in row]), np.array([start >> LOW_WORD_BITS for start in row]))
            for row in starts
        ]
        self.dtype = np.uint8 if experts <= 256 else np.int16
        self._largest = [self._table(row, shift) for row, shift in zip(starts, shifts, strict=True)]

    @property
    def fields(self) -> tuple[int, ...]:
        """Number of bits of each of a word's arrays."""
        return (LOW_WORD_BITS, self.bits - LOW_WORD_BITS) if self.wide else (self.bits,)

    def encode(self, columns: np.ndarray) -> list[np.ndarray]:
        """Compute the numbers of sets.

        Args:
            columns: `[topk, layers, rows]`, ascending along the first axis.

        Returns:
            int64 `[layers, ⌈rows / group⌉]`, one array a field.
        """
        shape = columns.shape[1:]
        sums = [np.zeros(shape, dtype=np.int64) for _ in self.fields]
        start = np.empty(shape, dtype=np.int64)
        for i, column in enumerate(columns, 1):
            for table, total in zip(self._limbs[i] if self.wide else (self._starts[i],), sums, strict=True):
                total += np.take(table, column, out=start, mode="clip")
        if self.wide:
            sums[1] += sums[0] >> LOW_WORD_BITS
            sums[0] &= (1 << LOW_WORD_BITS) - 1
        elif self.group > 1:
            sums = [self._join_group(sums[0])]
        return sums

    def decode(self, words: list[np.ndarray], rows: int) -> np.ndarray:
        """Return the sets with these numbers.

        Args:
            words: int64 `[layers, ⌈rows / group⌉]`, one array a field.
            rows: number of sets of each layer.

        Returns:
            `[topk, layers, rows]`, ascending along the first axis.

        Raises:
            ValueError: a number that no set has.
        """
        low, *others = words
        if self._has_unused_number(low, *others):
            raise ValueError("a number that no set of experts has")
        high = others[0] if others else None
        if self.group > 1:
            low = self._split_group(low, rows)
        columns = np.empty((self.topk, *low.shape), dtype=self.dtype)
        remainder = low.copy()
        index, start = np.empty_like(remainder), np.empty_like(remainder)
        for i in range(self.topk, 0, -1):
            shift = self._shifts[i]
            if self._narrow[i]:
                if high is not None:  # what is left fits one word; a larger remainder has no set, and is found below
                    remainder += np.minimum(high, 1 << (_ONE_WORD_BITS - LOW_WORD_BITS)) << LOW_WORD_BITS
                    high = None
                np.right_shift(remainder, shift, out=index)
            else:
                assert high is not None, "what is left has both words until it fits one"
                if shift >= LOW_WORD_BITS:
                    np.right_shift(high, shift - LOW_WORD_BITS, out=index)
                else:
                    np.bitwise_or(high << (LOW_WORD_BITS - shift), remainder >> shift, out=index)
            np.take(self._largest[i], index, out=columns[i - 1], mode="clip")
            if high is None:
                remainder -= np.take(self._starts[i], columns[i - 1], out=start, mode="clip")
                continue
            below, above = self._limbs[i]
            remainder -= np.take(below, columns[i - 1], out=start, mode="clip")
            borrow = remainder >> LOW_WORD_BITS  # 0 or −1
            high = high - np.take(above, columns[i - 1], out=start, mode="clip") + borrow
            remainder &= (1 << LOW_WORD_BITS) - 1
        # An unused number leaves a remainder too large for the elements below, and the first of them is not smaller.
        if (columns[1:] <= columns[:-1]).any():
            raise ValueError("a number that no set of experts has")
        return columns

    def _grouping(self) -> tuple[int, int]:
        """Choose the sets to a word and its bits: the fewest sets close to the bound, or those that come closest."""
        size = {group: max(1, (self.count**group - 1).bit_length()) for group in range(1, 17)}
        size = {group: bits for group, bits in size.items() if group == 1 or bits <= _ONE_WORD_BITS}
        close = [group for group, bits in size.items() if self._is_close(bits / group)]
        group = min(close) if close else min(size, key=lambda group: size[group] / group)
        return group, size[group]

    def _is_close(self, bits: float) -> bool:
        """Return whether this many bits a set are close to the bound."""
        return bits <= _CLOSE * min_bits(self.experts, self.topk)

    def _table(self, row: list[int], shift: int) -> np.ndarray:
        """Make the table of a set's largest element, by the upper bits of its number."""
        upper = np.array([start >> shift for start in row], dtype=np.int64)
        return np.repeat(np.arange(self.experts, dtype=self.dtype), upper[1:] - upper[:-1])

    def _has_unused_number(self, low: np.ndarray, high: np.ndarray | None = None) -> bool:
        """Return whether a number is beyond those in use."""
        if not low.size:
            return False
        if high is None:
            return bool(int(low.max()) >= self.count**self.group)
        top, bottom = self.count >> LOW_WORD_BITS, self.count & ((1 << LOW_WORD_BITS) - 1)
        return bool(((high > top) | ((high == top) & (low >= bottom))).any())

    def _join_group(self, numbers: np.ndarray) -> np.ndarray:
        """Join the numbers of each group of sets to one word."""
        layers, rows = numbers.shape
        digits = np.zeros((layers, -(-rows // self.group) * self.group), dtype=np.int64)
        digits[:, :rows] = numbers
        digits = digits.reshape(layers, -1, self.group)
        joined = digits[..., 0].copy()
        for j in range(1, self.group):
            joined *= self.count
            joined += digits[..., j]
        return joined

    def _split_group(self, joined: np.ndarray, rows: int) -> np.ndarray:
        """Split words into the numbers of their sets."""
        digits = np.empty((*joined.shape, self.group), dtype=np.int64)
        for j in range(self.group - 1, 0, -1):
            upper = joined // self.count
            digits[..., j] = joined - upper * self.count
            joined = upper
        digits[..., 0] = joined
        return digits.reshape(len(joined), -1)[:, :rows]


@lru_cache(maxsize=8)
def set_code(experts: int, topk: int) -> SetCode:
    """Return the numbering of `topk` of `experts`, whose tables are built once.

    Args:
        experts: E, at most `MAX_EXPERTS`.
        topk: k, from 1 to the smaller of E and `MAX_TOPK`.

    Raises:
        ValueError: more experts or a larger set than a number of two words is made for.
    """
    if not 1 <= topk <= min(experts, MAX_TOPK) or experts > MAX_EXPERTS:
        raise ValueError(
            f"{topk} of {experts} experts: sets are numbered up to {MAX_TOPK} of {MAX_EXPERTS}; use the plain encoding"
        )
    return SetCode(experts, topk)


def _starts(experts: int, topk: int, table_bits: int) -> tuple[list[list[int]], list[int]]:
    """Compute Bᵢ(c) for c in [0, experts], and sᵢ, for i in [0, topk]."""
    starts, shifts = [[1] * (experts + 1)], [0]
    for i in range(1, topk + 1):
        shift = max(0, comb(experts, i).bit_length() - table_bits)
        row = [0]
        for c in range(experts):
            below = starts[-1][c] if c >= i - 1 else 0
            row.append(row[-1] + (-(-below >> shift) << shift))
        starts.append(row)
        shifts.append(shift)
    return starts, shifts
