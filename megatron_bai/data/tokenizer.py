"""A small byte-pair tokenizer trained on the task's own text, in the form that transformers and SGLang load.

Digits and signs stay single tokens, words are learned, and nothing is added or removed: decoding an encoding gives the
text back. A character that the task never uses becomes `<unk>`.
"""

from dataclasses import dataclass
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Arithmetic, Generated, Tools
from megatron_bai.data import tools_text
from megatron_bai.data.arithmetic_text import ASSISTANT, USER, make_document, validate_arithmetic
from megatron_bai.errors import UserError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_TEXTS = 2000  # documents to train on: enough to meet every word and sign


def build_tokenizer(data: Generated, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the task's tokenizer; the same settings give the same ids on every machine.

    `save_pretrained(folder)` writes what `AutoTokenizer.from_pretrained(folder)` reads. `<pad>` is id 0, `<eos>` id 1.

    Args:
        data: settings of the task.
        vocab_size: ids the model has; the tokenizer's vocabulary is this large or smaller.

    Raises:
        UserError: the task's letters, digits and signs do not fit into `vocab_size`.
    """
    language = _describe_language(data)
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(language.pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, UNKNOWN, *language.markers], show_progress=False
    )
    tokenizer.train_from_iterator(language.texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}: the task's signs and letters alone need {tokenizer.get_vocab_size()}"
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=language.markers,
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = language.template
    return found


@dataclass(frozen=True)
class _Language:
    """What a tokenizer is made for.

    Attributes:
        texts: to train on, without chat markers: these have their ids already, and their letters would only be
            mistaken for words.
        markers: of chats, special tokens.
        pieces: regular expression of what a token is at most.
        template: of chats; None: there is none.
    """

    texts: list[str]
    markers: list[str]
    pieces: str
    template: str | None = None


def _describe_language(data: Generated) -> _Language:
    """Return the language of a task.

    Raises:
        UserError: the settings allow no such texts.
    """
    rng = Random("tokenizer")
    if isinstance(data, Tools):
        tools_text.validate_tools(data)
        chats = [tools_text.make_messages(data, rng) for _ in range(_TEXTS)]
        contents = [message["content"] for chat in chats for message in chat]
        markers = [USER, ASSISTANT, tools_text.TOOL, tools_text.CALL, tools_text.END_CALL]
        bodies = [text.removeprefix(tools_text.CALL).removesuffix(tools_text.END_CALL) for text in contents]
        return _Language(bodies, markers, r"[0-9]|[-+*]|[^-+*0-9]+", tools_text.CHAT_TEMPLATE)
    assert isinstance(data, Arithmetic), "`validate_data` refuses others"
    validate_arithmetic(data)
    documents = [make_document(data, "pretrained", rng) for _ in range(_TEXTS)]
    texts = (f"{each.prompt.removeprefix(USER).removesuffix(ASSISTANT)}\n{each.response}" for each in documents)
    lines = [line for text in texts for line in text.splitlines()]
    return _Language(lines, [USER, ASSISTANT], r"[a-z]+|[^a-z]")
