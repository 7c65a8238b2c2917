"""The tokenizer: exact, the same everywhere, and loadable by transformers and SGLang."""

import pytest
from transformers import AutoTokenizer

from megatron_bai.config import Arithmetic
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError

TEXTS = (
    "<user>7+8+5<assistant>7+8=15;15+5=20;answer:20<eos>",
    "12 is more than 3",
    "7 is less than 30",
    "count:9 10 11 12",
    "27 is odd",
    "4 is even",
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(Arithmetic(), 64)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_digits_signs_and_words_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("12+3=15;answer:15<eos>") == [*"12+3=15;", "answer", *":15", "<eos>"]
    assert {"more", "less", "than", "even", "odd", "count", "is"} <= set(tokenizer.get_vocab())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_deterministic_and_small(tokenizer):
    assert build_tokenizer(Arithmetic(), 64).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 64 and max(tokenizer.get_vocab().values()) < 64


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_foreign_text_is_visible(tokenizer):
    assert tokenizer.unk_token_id in tokenizer.encode("Q")


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="model.vocab_size is 16"):
        build_tokenizer(Arithmetic(), 16)
