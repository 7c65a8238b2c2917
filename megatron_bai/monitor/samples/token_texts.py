"""The characters that each token adds to a text, whatever the tokenizer does with bytes and spaces."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]  # ids to text, special tokens included
_REPLACEMENT = "\ufffd"  # for bytes that are no whole character
_LONGEST = 16  # tokens that one character is waited for: bytes that never become one are let go


def token_lengths(ids: Sequence[int], decode: Decode) -> tuple[str, list[int]]:
    """Decode a response, and count the characters that each token adds to it.

    A character of several tokens belongs to the last of them.

    Args:
        ids: of the response.
        decode: the tokenizer's.

    Returns:
        The text, and `[len(ids)]` numbers of its characters, which sum to its length.
    """
    text, ids = decode(list(ids)), list(ids)
    single = {token: decode([token]) for token in set(ids)}
    if "".join(single[token] for token in ids) == text and not any(_REPLACEMENT in single[token] for token in ids):
        return text, [len(single[token]) for token in ids]
    # Decoded with the tokens before it, as far back as the last whole character: what a token adds depends on them.
    lengths, before, start, position = [0] * len(ids), 0, 0, 0
    for i in range(len(ids)):
        prefix, longer = decode(ids[before:start]), decode(ids[before : i + 1])
        if longer.endswith(_REPLACEMENT) and i + 1 - start < _LONGEST:
            continue
        lengths[i] = min(max(len(longer) - len(prefix), 0), len(text) - position)
        position += lengths[i]
        before, start = start, i + 1
    if ids:
        lengths[-1] += len(text) - position
    return text, lengths
