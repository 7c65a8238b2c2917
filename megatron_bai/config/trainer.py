"""Settings of the training loops (docs/training.md)."""

from dataclasses import dataclass

from megatron_bai.config.limits import LONGEST_S, number, path, setting


@dataclass
class Supervised:
    """Batches of `objective=sft`."""

    rows: int = number(32, "packed rows per step, over all data-parallel ranks", at_least=1)
    length: int = number(64, "tokens in a row", at_least=1)
    load_balancing: str = setting(
        "none",
        "what routers learn beside the text, as Megatron-Core has it (docs/training.md): an even load of "
        "experts in each micro-batch (aux_loss), in each row (seq_aux_loss), or in the step so far over all "
        "replicas (global_aux_loss)",
        choices=("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
    )
    aux_loss_coeff: float = number(0.0, "of that loss", at_least=0)
    z_loss_coeff: float = number(0.0, "of the routers' z loss, which keeps their logits small", at_least=0)


@dataclass
class Trainer:
    """The training loop: batches, optimizer, checkpoints, evaluation."""

    steps: int = number(10, "global steps", at_least=1)
    prompts_per_step: int = number(16, "groups of samples that a global step trains", at_least=1)
    group_size: int = number(8, "samples per prompt", at_least=1)
    mini_batches: int = number(2, "N: updates per global step", at_least=1)
    micro_batch_size: int = number(
        16, "samples per forward pass and data-parallel rank, padded to the longest of the step", at_least=1
    )
    tokens_per_micro_batch: int = number(
        0, "or, in place of samples, tokens: as many samples side by side as fit; 0: samples", at_least=0
    )
    learning_rate: float = number(1e-3, "Adam's, after the warm-up", at_least=0)
    warmup_updates: int = number(0, "the learning rate rises linearly over these", at_least=0)
    decay: str = setting(
        "constant",
        "then it stays, or falls until the last update: linear, cosine, inverse-square-root",
        choices=("constant", "linear", "cosine", "inverse-square-root"),
    )
    min_learning_rate: float = number(0.0, "to this", at_least=0)
    weight_decay: float = number(0.0, "of all but norms and biases", at_least=0)
    expert_bias_update_rate: float = number(
        0.0,
        "what an update adds to or takes from expert biases (Megatron-Core's moe_router_bias_update_rate); 0: they "
        "stay",
        at_least=0,
        at_most=1,
    )
    freeze: list[str] = setting(
        list,
        "parts of the actor that keep their initial weights: router, shared_experts; no gradient, decay or "
        "optimizer state",
        choices=("router", "shared_experts"),
    )
    adam_beta2: float = number(0.999, "decay of Adam's second moments", at_least=0, below=1)
    clip_grad: float = number(1.0, "norm that gradients are scaled down to; 0: never", at_least=0, finite=False)
    eval_every: int = number(0, "steps between evaluations on held-out prompts; 0 never evaluates", at_least=0)
    eval_samples: int = number(1, "n of avg@n: samples to each held-out prompt", at_least=1)
    eval_temperature: float | None = number(None, "of these samples; unset: rollout.temperature", above=0)
    save: str = path("", "where the final checkpoint goes; empty keeps none")
    save_every: int = number(
        0, "steps between checkpoints that the same command goes on from, in run.dir; 0 writes none", at_least=0
    )
    save_async: bool = setting(False, "write them in the background, while the next step runs")
    keep: int = number(2, "of them, the last ones", at_least=1)
    grace_s: float = number(
        20.0,
        "after SIGTERM, to end the step in work and save; then, or with 0 at once, the run stops",
        at_least=0,
        at_most=LONGEST_S,
    )
