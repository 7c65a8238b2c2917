"""Settings of the training loops (docs/training.md)."""

from dataclasses import dataclass

from megatron_bai.config.limits import LONGEST_S, choice, number, path


@dataclass
class Supervised:
    """Batches of `objective=sft`."""

    rows: int = number(32, at_least=1)  # packed rows per step, over all data-parallel ranks
    length: int = number(64, at_least=1)  # tokens in a row
    # what routers learn beside the text, as Megatron-Core has it (docs/training.md): an even load of experts in each
    # micro-batch (aux_loss), in each row (seq_aux_loss), or in the step so far over all replicas (global_aux_loss)
    load_balancing: str = choice("none", "none", "aux_loss", "seq_aux_loss", "global_aux_loss")
    aux_loss_coeff: float = number(0.0, at_least=0)  # of that loss
    z_loss_coeff: float = number(0.0, at_least=0)  # of the routers' z loss, which keeps their logits small


@dataclass
class Trainer:
    """The training loop: batches, optimizer, checkpoints, evaluation."""

    steps: int = number(10, at_least=1)  # global steps
    prompts_per_step: int = number(16, at_least=1)
    group_size: int = number(8, at_least=1)  # samples per prompt
    mini_batches: int = number(2, at_least=1)  # N: updates per global step
    # samples per forward pass and data-parallel rank, padded to the longest of the step
    micro_batch_size: int = number(16, at_least=1)
    # or, in place of samples, tokens: as many samples side by side as fit; 0: samples
    tokens_per_micro_batch: int = number(0, at_least=0)
    learning_rate: float = number(1e-3, at_least=0)
    warmup_updates: int = number(0, at_least=0)  # the learning rate rises linearly over these
    # then it stays, or falls until the last update: linear, cosine, inverse-square-root
    decay: str = choice("constant", "constant", "linear", "cosine", "inverse-square-root")
    min_learning_rate: float = number(0.0, at_least=0)  # to this
    weight_decay: float = number(0.0, at_least=0)  # of all but norms and biases
    # what an update adds to or takes from expert biases (Megatron-Core's moe_router_bias_update_rate); 0: they stay
    expert_bias_update_rate: float = number(0.0, at_least=0, at_most=1)
    # parts of the actor that keep their initial weights: router, shared_experts; no gradient, decay or optimizer state
    freeze: list[str] = choice(list, "router", "shared_experts")
    adam_beta2: float = number(0.999, at_least=0, below=1)
    clip_grad: float = number(1.0, at_least=0, finite=False)
    eval_every: int = number(0, at_least=0)  # steps between evaluations on held-out prompts; 0 never evaluates
    eval_samples: int = number(1, at_least=1)  # n of avg@n: samples to each held-out prompt
    eval_temperature: float | None = number(None, above=0)  # of these samples; unset: rollout.temperature
    save: str = path("")  # where the final checkpoint goes; empty keeps none
    # steps between checkpoints that the same command goes on from, in run.dir; 0 writes none
    save_every: int = number(0, at_least=0)
    save_async: bool = False  # write them in the background, while the next step runs
    keep: int = number(2, at_least=1)  # of them, the last ones
    # after SIGTERM, to end the step in work and save; then, or with 0 at once, the run stops
    grace_s: float = number(20.0, at_least=0, at_most=LONGEST_S)
