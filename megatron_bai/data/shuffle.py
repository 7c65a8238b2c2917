"""A shuffled order without memory: a permutation computed at one index."""

from hashlib import blake2b

_ROUNDS = 6


def permute_index(index: int, size: int, key: str) -> int:
    """Apply a pseudo-random permutation of `range(size)` to `index`; another key is another permutation.

    A Feistel network over the smallest even number of bits that holds `size`; a value outside the range goes through it
    again until it is inside (cycle walking; Black and Rogaway, CT-RSA 2002), four times on average at worst. It is a
    function of its arguments alone: unlike a generator's shuffle it is the same in every release of Python and numpy.

    Args:
        index: in `range(size)`.
        size: at least 1.
        key: any text.

    Returns:
        An element of `range(size)`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for number in range(_ROUNDS):
            digest = blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        value = left << half | right
        if value < size:
            return value


def shuffled_index(position: int, size: int, key: str) -> int:
    """Return the element at a position of an endless stream: `range(size)` in another order each epoch.

    Args:
        position: in the stream, from 0.
        size: of an epoch, at least 1.
        key: any text; another key is another stream.
    """
    epoch, index = divmod(position, size)
    return permute_index(index, size, f"{key}/{epoch}")
