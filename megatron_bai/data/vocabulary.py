"""Compare a tokenizer's ids with the rows of a model's embedding."""

from typing import Any

from megatron_bai.errors import UserError


def validate_vocabulary(tokenizer: Any, vocab_size: int, source: object) -> None:
    """Refuse a tokenizer with an id that the embedding has no row for. One with fewer ids than rows is common.

    Args:
        tokenizer: of transformers; added tokens and special tokens count.
        vocab_size: rows of the embedding.
        source: where the tokenizer is from, for the message.

    Raises:
        UserError: names the largest id and its token.
    """
    ids = dict(tokenizer.get_vocab())
    ids |= {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer in {source} gives {ascii(token)} the id {largest}, and the model's embedding has "
            f"{vocab_size} rows (model.vocab_size): take the checkpoint's own tokenizer, or lengthen its embedding"
        )
