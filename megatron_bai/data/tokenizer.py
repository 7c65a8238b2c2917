"""A small byte-pair tokenizer trained on the task's own text, in the form that transformers and SGLang load.

Digits and signs stay single tokens, words are learned, and nothing is added or removed: decoding an encoding gives the
text back. A character that the task never uses becomes `<unk>`.
"""

from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Arithmetic
from megatron_bai.data.arithmetic_text import ASSISTANT, USER, make_document, validate_arithmetic
from megatron_bai.errors import UserError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_TEXTS = 2000  # documents to train on: enough to meet every word and sign


def build_tokenizer(data: Arithmetic, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the task's tokenizer; the same settings give the same ids on every machine.

    `save_pretrained(folder)` writes what `AutoTokenizer.from_pretrained(folder)` reads. `<pad>` is id 0, `<eos>` id 1.

    Args:
        data: settings of the task.
        vocab_size: ids the model has; the tokenizer's vocabulary is this large or smaller.

    Raises:
        UserError: the task's letters, digits and signs do not fit into `vocab_size`.
    """
    validate_arithmetic(data)
    rng = Random("tokenizer")
    texts = [make_document(data, "pretrained", rng) for _ in range(_TEXTS)]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, UNKNOWN, USER, ASSISTANT], show_progress=False
    )
    # Special tokens have their ids already: in the training text their letters would only be mistaken for words.
    bodies = (f"{t.prompt.removeprefix(USER).removesuffix(ASSISTANT)}\n{t.response}" for t in texts)
    tokenizer.train_from_iterator((line for body in bodies for line in body.splitlines()), trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}: the task's signs and letters alone need {tokenizer.get_vocab_size()}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
