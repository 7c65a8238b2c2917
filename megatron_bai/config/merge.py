"""Settings of the initial weights and of merges (docs/merge.md)."""

from dataclasses import dataclass, field

from omegaconf import MISSING


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
    checkpoint: str = ""  # what `train`, `merge` or `convert` wrote


@dataclass
class MergeInit(Init):
    """The merge that `merge.*` describes: run at the start unless `merge.output` holds it, then read from there."""

    name: str = "merge"


@dataclass
class Merge:
    """Merging checkpoints, by Balanced Actor Initialization unless `method` names another method.

    bai              α · pretrained + (1 − α) · Σ wᵢ·Mᵢ                          (arXiv 2509.00309)
    linear           Σ wᵢ·Mᵢ                                                     (arXiv 2203.05482)
    slerp            from the first of two members to the second, on an arc
    task_arithmetic  pretrained + λ · Σ wᵢ·τᵢ with τᵢ = Mᵢ − pretrained          (arXiv 2212.04089)
    ties             … τᵢ trimmed, averaged where they agree with a common sign  (arXiv 2306.01708)
    dare             … τᵢ with a random share dropped and the rest rescaled      (arXiv 2311.03099)

    A setting that the method does not use must be left out.
    """

    method: str = "bai"  # or linear, task_arithmetic, slerp, ties, dare
    pretrained: str = ""  # gives the layout, too; in linear and slerp that alone: empty takes the first member's
    members: list[str] = field(default_factory=list)  # Mᵢ; slerp: two
    weights: list[float] = field(default_factory=list)  # wᵢ; bai, linear: sum to 1; task vectors: 1 each unless given
    normalize: bool = False  # divide the weights by their sum; not for ties, which averages, and slerp
    alpha: float | None = None  # bai: weight of the pretrained checkpoint, 0.5 unless given
    t: float | None = None  # slerp: from 0, the first member, to 1, the second
    scale: float | None = None  # task vectors: λ, 1 unless given
    density: float | None = None  # ties: the share of each parameter's elements that is kept, 0.2 unless given
    drop_rate: float | None = None  # dare: the share that is dropped
    seed: int | None = None  # dare: of what is dropped, 0 unless given
    sweep: list[float] = field(default_factory=list)  # of alpha, t or scale: one output each, the inputs read once
    alpha_for: dict[str, float] = field(default_factory=dict)  # by group (see inspect) or regex; the first that fits
    weights_for: dict[str, list[float]] = field(default_factory=dict)  # likewise
    t_for: dict[str, float] = field(default_factory=dict)  # likewise
    output: str = ""  # with a sweep, the directory of the outputs: alpha-0.1 and so on
    dtype: str = ""  # of the output: bfloat16, float16 or float32; empty: the pretrained checkpoint's
    vocab_size: int = 0  # rows of the embedding that mean a token, the others are padding; 0: as the checkpoints say
    chunk_mib: int = 0  # split torch_dist tensors anew, into chunks of at most this; 0: the pretrained's chunks
    file_mib: int = 0  # fill output files to this; 0: the pretrained's files (safetensors) or 256 (torch_dist)
    memory_mib: int = 512  # of a rank's buffers, whatever the size of the model
    threads: int = 0  # of a rank; 0 shares the cores among the machine's ranks, up to 8 each and as the memory allows
    verify: str = "sample"  # none, sample or all: how much of the output is compared with the formula before it counts
    dry_run: bool = False  # print the plan and stop
