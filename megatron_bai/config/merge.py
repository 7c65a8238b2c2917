"""Settings of the initial weights and of merges (docs/merge.md)."""

from dataclasses import dataclass

from omegaconf import MISSING

from megatron_bai.config.limits import checkpoint_path, number, path, setting


@dataclass
class Init:
    """The origin of the initial weights: `init=NAME` chooses (docs/training.md)."""

    name: str = setting(MISSING, "set by the choice")


@dataclass
class RandomInit(Init):
    """Random weights, drawn by `run.seed`, with a tokenizer trained on the task's text."""

    name: str = "random"


@dataclass
class CheckpointInit(Init):
    """A complete checkpoint, with its tokenizer."""

    name: str = "checkpoint"
    checkpoint: str = checkpoint_path("", "what `train`, `merge` or `convert` wrote")


@dataclass
class MergeInit(Init):
    """The merge that `merge.*` describes: run at the start unless `merge.output` holds it, then read from there."""

    name: str = "merge"
    routing_prompts: int = number(
        64,
        "prompts on which RL compares the routes of the merge with its sources' before it begins; 0: none",
        at_least=0,
    )


@dataclass
class Merge:
    """Merging checkpoints, by Balanced Actor Initialization unless `method` names another method.

    bai              α · pretrained + (1 − α) · Σ wᵢ·Mᵢ                          (arXiv 2509.00309)
    linear           Σ wᵢ·Mᵢ                                                     (arXiv 2203.05482)
    slerp            from the first of two members to the second, on an arc
    task_arithmetic  pretrained + λ · Σ wᵢ·τᵢ with τᵢ = Mᵢ − pretrained          (arXiv 2212.04089)
    ties             … τᵢ trimmed, averaged where they agree with a common sign  (arXiv 2306.01708)
    dare             … τᵢ with a random share dropped and the rest rescaled      (arXiv 2311.03099)
    dare_ties        … of those, the ones that agree with a common sign
    average          Σ Mᵢ / n, of one run's checkpoints for instance             (arXiv 2203.05482)
    ema              e₁ = M₁, eᵢ = d · eᵢ₋₁ + (1 − d) · Mᵢ: the newest member last

    A setting that the method does not use must be left out.
    """

    method: str = setting(
        "bai",
        "or linear, task_arithmetic, slerp, ties, dare, dare_ties, average, ema",
        choices=("bai", "linear", "task_arithmetic", "slerp", "ties", "dare", "dare_ties", "average", "ema"),
    )
    pretrained: str = checkpoint_path(
        "", "gives the layout, too; in linear, slerp, average and ema that alone: empty takes the first member's"
    )
    members: list[str] = checkpoint_path(
        list,
        "Mᵢ; slerp: two. A pattern such as run/checkpoints/step-* stands for the directories that match, by number",
    )
    weights: list[float] = number(
        list, "wᵢ; bai, linear: sum to 1, and may be left out with one member; task vectors: 1 each unless given"
    )
    normalize: bool = setting(
        False, "divide the weights by their sum (dare_ties: of those that agree); not for ties and slerp"
    )
    alpha: float | None = number(
        None, "bai: weight of the pretrained checkpoint, 0.5 unless given", at_least=0, at_most=1
    )
    t: float | None = number(None, "slerp: from 0, the first member, to 1, the second", at_least=0, at_most=1)
    scale: float | None = number(None, "task vectors: λ, 1 unless given")
    density: float | None = number(
        None, "ties: the share of each parameter's elements that is kept, 0.2 unless given", above=0, at_most=1
    )
    drop_rate: float | None = number(None, "dare, dare_ties: the share that is dropped", at_least=0, below=1)
    seed: int | None = number(
        None, "dare, dare_ties: of what is dropped, 0 unless given", at_least=0, at_most=2**64 - 1
    )
    decay: float | None = number(None, "ema: d, from 0, the last member, to 1, the first", at_least=0, at_most=1)
    sweep: list[float] = number(
        list, "of alpha, t, scale or decay, which is left out then: one output each, the inputs read once"
    )
    alpha_for: dict[str, float] = number(
        dict, "by group (see inspect) or regex; the first that fits", at_least=0, at_most=1
    )
    weights_for: dict[str, list[float]] = number(dict, "likewise")
    t_for: dict[str, float] = number(dict, "likewise", at_least=0, at_most=1)
    allow_different: list[str] = setting(
        list,
        "what sources may say differently though it changes the forward pass or the tokens: keys of config.json, "
        "tokenizer",
    )
    tokenizer: str = setting(
        "",
        "whose tokenizer, chat template, generation config and end tokens the output has: pretrained, a member's "
        "number from 1, or a source's path; empty: the pretrained's, or the first member's that has one",
    )
    keep: list[str] = setting(
        list,
        "groups or regexes of tensors that stay as in the pretrained checkpoint, and members need not have, such "
        "as mtp",
    )
    output: str = path("", "with a sweep, the directory of the outputs: alpha-0.1 and so on")
    format: str = setting(
        "",
        "of the output: hf (safetensors) or megatron (torch_dist); empty: the pretrained checkpoint's",
        choices=("hf", "megatron", ""),
    )
    dtype: str = setting(
        "",
        "of the output: bfloat16, float16 or float32; empty: the pretrained checkpoint's",
        choices=("bfloat16", "float16", "float32", ""),
    )
    vocab_size: int = number(
        0, "rows of the embedding that mean a token, the others are padding; 0: as the checkpoints say", at_least=0
    )
    chunk_mib: int = number(
        0, "split torch_dist tensors anew, into chunks of at most this; 0: the pretrained's chunks", at_least=0
    )
    file_mib: int = number(
        0, "fill output files to this; 0: the pretrained's files (safetensors) or 256 (torch_dist)", at_least=0
    )
    memory_mib: int = number(512, "of a rank's buffers, whatever the size of the model", at_least=1)
    threads: int = number(
        0, "of a rank; 0 shares the cores among the machine's ranks, up to 8 each and as the memory allows", at_least=0
    )
    verify: str = setting(
        "sample",
        "none, sample or all: how much of the output is compared with the formula before it counts",
        choices=("none", "sample", "all"),
    )
    dry_run: bool = setting(False, "print the plan and stop")
