"""Settings of the training loops (docs/training.md)."""

from dataclasses import dataclass


@dataclass
class Supervised:
    """Batches of `objective=sft`."""

    rows: int = 32  # packed rows per step, over all data-parallel ranks
    length: int = 64  # tokens in a row


@dataclass
class Trainer:
    """The training loop: batches, optimizer, checkpoints, evaluation."""

    steps: int = 10  # global steps
    prompts_per_step: int = 16
    group_size: int = 8  # samples per prompt
    mini_batches: int = 2  # N: updates per global step
    micro_batch_size: int = 16  # samples per forward pass and data-parallel rank, padded to the longest of the step
    tokens_per_micro_batch: int = 0  # or, in place of samples, tokens: as many samples side by side as fit; 0: samples
    learning_rate: float = 1e-3
    warmup_updates: int = 0  # the learning rate rises linearly over these
    decay: str = "constant"  # then it stays, or falls until the last update: linear, cosine, inverse-square-root
    min_learning_rate: float = 0.0  # to this
    weight_decay: float = 0.0  # of all but norms and biases
    adam_beta2: float = 0.999
    clip_grad: float = 1.0
    eval_every: int = 0  # steps between evaluations on held-out prompts; 0 never evaluates
    eval_samples: int = 1  # n of avg@n: samples to each held-out prompt
    eval_temperature: float | None = None  # of these samples; unset: rollout.temperature
    save: str = ""  # where the final checkpoint goes; empty keeps none
    save_every: int = 0  # steps between checkpoints that the same command goes on from, in run.dir; 0 writes none
    save_async: bool = False  # write them in the background, while the next step runs
    keep: int = 2  # of them, the last ones
    grace_s: float = 20.0  # after SIGTERM, to end the step in work and save; then, or with 0 at once, the run stops
