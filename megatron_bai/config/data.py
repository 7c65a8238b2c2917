"""Settings of the data: `data=NAME` chooses a source (docs/data.md)."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_bai.config.limits import choice, number, path


@dataclass
class Data:
    """A source of prompts and texts: `data=NAME` chooses one with its own settings (docs/data.md)."""

    name: str = MISSING  # set by the choice
    eval_prompts: int = number(64, at_least=0)  # held out: never trained on; 0 takes all, of data=dataset


@dataclass
class Arithmetic(Data):
    """The generated arithmetic task (sums of several numbers), its styles of text and the tokenizer trained on them."""

    name: str = "arithmetic"
    # of supervised text: pretrained (mixed), instruct (short), reasoning, checked (longest)
    style: str = choice("reasoning", "pretrained", "instruct", "reasoning", "checked")
    min_terms: int = number(3, at_least=3)  # numbers in one problem
    max_terms: int = number(5, at_least=3)
    max_number: int = number(9, at_least=2)  # numbers are 1 … max_number


@dataclass
class Dataset(Data):
    """Rows on local disk: a .jsonl or .parquet file, or a directory that `datasets.save_to_disk` wrote."""

    name: str = "dataset"
    train: str = path("")  # the rows trained on
    eval: str = path("")  # the rows evaluated on, which are taken out of train; empty holds some of train out
    # the share of prompts that a hash holds out where data.eval is empty
    hold_out: float = number(0.05, at_least=0, below=1)
    prompt: str = "prompt"  # column: a text, which becomes a user's message, or a list of chat messages
    answer: str = "answer"  # column: what the reward compares with; empty where it needs none
    response: str = "response"  # column of objective=sft: what is learned
    system: str = ""  # the system message of prompts that have none
    chat_template: bool = True  # the tokenizer's; false takes the prompts, which must be texts, as they are
    template_options: dict[str, Any] = field(default_factory=dict)  # +data.template_options.enable_thinking=false
    max_prompt_tokens: int = number(1024, at_least=1)  # rows whose prompt is longer are left out
