"""Settings of the data: `data=NAME` chooses a source (docs/data.md)."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_bai.config.limits import number, path, setting


@dataclass
class Data:
    """A source of prompts and texts: `data=NAME` chooses one with its own settings (docs/data.md)."""

    name: str = setting(MISSING, "set by the choice")
    eval_prompts: int = number(64, "held out: never trained on; 0 takes all, of data=dataset", at_least=0)


@dataclass
class Generated(Data):
    """Problems that a program draws; they bring their tokenizer."""


@dataclass
class Arithmetic(Generated):
    """The generated arithmetic task (sums of several numbers), its styles of text and the tokenizer trained on them."""

    name: str = "arithmetic"
    style: str = setting(
        "reasoning",
        "of supervised text: pretrained (mixed), instruct (short), reasoning, checked (longest)",
        choices=("pretrained", "instruct", "reasoning", "checked"),
    )
    min_terms: int = number(3, "numbers in one problem, at least", at_least=3)
    max_terms: int = number(5, "… and at most", at_least=3)
    max_number: int = number(9, "numbers are 1 … max_number", at_least=2)


@dataclass
class Tools(Generated):
    """Generated calculations for env=calculator, as chats, and texts that call the tool or answer directly."""

    name: str = "tools"
    max_number: int = number(999, "numbers are 1 … max_number", at_least=2)
    call_fraction: float = number(0.5, "of supervised texts: those that call the tool", at_least=0, at_most=1)

    chat_template = True  # no setting: that of the tokenizer it brings


@dataclass
class Dataset(Data):
    """Rows on local disk: a .jsonl or .parquet file, or a directory that `datasets.save_to_disk` wrote."""

    name: str = "dataset"
    train: str = path("", "the rows trained on")
    eval: str = path("", "the rows evaluated on, which are taken out of train; empty holds some of train out")
    hold_out: float = number(
        0.05, "the share of prompts that a hash holds out where data.eval is empty", at_least=0, below=1
    )
    prompt: str = setting("prompt", "column: a text, which becomes a user's message, or a list of chat messages")
    answer: str = setting("answer", "column: what the reward compares with; empty where it needs none")
    response: str = setting("response", "column of objective=sft: what is learned")
    system: str = setting("", "the system message of prompts that have none")
    chat_template: bool = setting(True, "the tokenizer's; false takes the prompts, which must be texts, as they are")
    template_options: dict[str, Any] = setting(dict, "+data.template_options.enable_thinking=false")
    max_prompt_tokens: int = number(1024, "rows whose prompt is longer are left out", at_least=1)
