"""Settings of the initial weights and of merges (docs/merge.md)."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_bai.config.limits import checkpoint_path, choice, number, path


@dataclass
class Init:
    """The origin of the initial weights: `init=NAME` chooses (docs/training.md)."""

    name: str = MISSING  # set by the choice


@dataclass
class RandomInit(Init):
    """Random weights, drawn by `run.seed`, with a tokenizer trained on the task's text."""

    name: str = "random"


@dataclass
class CheckpointInit(Init):
    """A complete checkpoint, with its tokenizer."""

    name: str = "checkpoint"
    checkpoint: str = checkpoint_path("")  # what `train`, `merge` or `convert` wrote


@dataclass
class MergeInit(Init):
    """The merge that `merge.*` describes: run at the start unless `merge.output` holds it, then read from there."""

    name: str = "merge"
    # prompts on which RL compares the routes of the merge with its sources' before it begins; 0: none
    routing_prompts: int = number(64, at_least=0)


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

    # or linear, task_arithmetic, slerp, ties, dare, dare_ties, average, ema
    method: str = choice(
        "bai", "bai", "linear", "task_arithmetic", "slerp", "ties", "dare", "dare_ties", "average", "ema"
    )
    # gives the layout, too; in linear, slerp, average and ema that alone: empty takes the first member's
    pretrained: str = checkpoint_path("")
    # Mᵢ; slerp: two. A pattern such as run/checkpoints/step-* stands for the directories that match, by number
    members: list[str] = checkpoint_path(list)
    # wᵢ; bai, linear: sum to 1, and may be left out with one member; task vectors: 1 each unless given
    weights: list[float] = number(list)
    normalize: bool = False  # divide the weights by their sum (dare_ties: of those that agree); not for ties and slerp
    # bai: weight of the pretrained checkpoint, 0.5 unless given
    alpha: float | None = number(None, at_least=0, at_most=1)
    t: float | None = number(None, at_least=0, at_most=1)  # slerp: from 0, the first member, to 1, the second
    scale: float | None = number(None)  # task vectors: λ, 1 unless given
    # ties: the share of each parameter's elements that is kept, 0.2 unless given
    density: float | None = number(None, above=0, at_most=1)
    drop_rate: float | None = number(None, at_least=0, below=1)  # dare, dare_ties: the share that is dropped
    # dare, dare_ties: of what is dropped, 0 unless given
    seed: int | None = number(None, at_least=0, at_most=2**64 - 1)
    # ema: d, from 0, the last member, to 1, the first
    decay: float | None = number(None, at_least=0, at_most=1)
    # of alpha, t, scale or decay, which is left out then: one output each, the inputs read once
    sweep: list[float] = number(list)
    # by group (see inspect) or regex; the first that fits
    alpha_for: dict[str, float] = number(dict, at_least=0, at_most=1)
    weights_for: dict[str, list[float]] = number(dict)  # likewise
    t_for: dict[str, float] = number(dict, at_least=0, at_most=1)  # likewise
    # what sources may say differently though it changes the forward pass or the tokens: keys of config.json, tokenizer
    allow_different: list[str] = field(default_factory=list)
    # whose tokenizer, chat template, generation config and end tokens the output has: pretrained, a member's number
    # from 1, or a source's path; empty: the pretrained's, or the first member's that has one
    tokenizer: str = ""
    # groups or regexes of tensors that stay as in the pretrained checkpoint, and members need not have, such as mtp
    keep: list[str] = field(default_factory=list)
    output: str = path("")  # with a sweep, the directory of the outputs: alpha-0.1 and so on
    # of the output: hf (safetensors) or megatron (torch_dist); empty: the pretrained checkpoint's
    format: str = choice("", "hf", "megatron", "")
    # of the output: bfloat16, float16 or float32; empty: the pretrained checkpoint's
    dtype: str = choice("", "bfloat16", "float16", "float32", "")
    # rows of the embedding that mean a token, the others are padding; 0: as the checkpoints say
    vocab_size: int = number(0, at_least=0)
    # split torch_dist tensors anew, into chunks of at most this; 0: the pretrained's chunks
    chunk_mib: int = number(0, at_least=0)
    # fill output files to this; 0: the pretrained's files (safetensors) or 256 (torch_dist)
    file_mib: int = number(0, at_least=0)
    memory_mib: int = number(512, at_least=1)  # of a rank's buffers, whatever the size of the model
    # of a rank; 0 shares the cores among the machine's ranks, up to 8 each and as the memory allows
    threads: int = number(0, at_least=0)
    # none, sample or all: how much of the output is compared with the formula before it counts
    verify: str = choice("sample", "none", "sample", "all")
    dry_run: bool = False  # print the plan and stop
