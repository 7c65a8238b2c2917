"""The promise of `rollout.exact`: where it can be kept, and that it was."""

import torch

from megatron_bai import config
from megatron_bai.distributed.backend import select_device
from megatron_bai.distributed.hosts import is_multi_host
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.rl.batches.stages import ScoredBatch

FAMILIES = ("qwen3_moe",)  # those whose layers have exact functions in both engines


def validate_exact(settings: config.Config, architecture: Architecture) -> None:
    """Refuse `rollout.exact` where the engines' log-probabilities would differ.

    Args:
        settings: of the run.
        architecture: of its model.

    Raises:
        UserError: names the setting in the way.
    """
    rollout = settings.rollout
    if not rollout.exact:
        return
    values, family = architecture.values, architecture.family.name
    rope = (values.get("rope_parameters") or {}).get("rope_type", "default")
    for is_fault, fault in (
        (family not in FAMILIES, f"a model of the family {family}: of {', '.join(FAMILIES)} alone"),
        (not values.get("norm_topk_prob"), "norm_topk_prob=false: of normalised weights alone"),
        (bool(architecture.layers("dense")), "layers without experts: of MoE layers alone"),
        (bool(values.get("attention_bias")), "attention_bias=true: of layers without biases alone"),
        (architecture.tied, "tie_word_embeddings=true: of an output layer of its own alone"),
        (rope != "default", f"rope_type={rope}: of plain rotary positions alone"),
    ):
        if is_fault:
            raise UserError(f"rollout.exact and {fault} both engines have the same functions; leave rollout.exact out")
    for name, value, needed in (
        ("backend.kind", select_device(settings.backend).kind, "cpu"),
        ("backend.dtype", settings.backend.dtype, "float32"),
        ("parallel.tensor", settings.parallel.tensor, 1),
        ("parallel.pipeline", settings.parallel.pipeline, 1),
        ("parallel.expert", settings.parallel.expert, 1),
        ("rollout.dtype", rollout.dtype, "float32"),
        ("rollout.quantize", rollout.quantize, ""),
        ("rollout.tensor", rollout.tensor, 1),
    ):
        if value != needed:
            raise UserError(
                f"rollout.exact needs {name}={needed or 'empty'}, and it is {value}: the engines would round otherwise"
            )
    if rollout.urls:
        raise UserError("rollout.exact is for servers that the run starts: leave out rollout.urls")
    if is_multi_host():
        raise UserError("rollout.exact needs one machine: the processor of another one may round differently")


def require_exact(batch: ScoredBatch, live: torch.Tensor | None) -> None:
    """End the run unless every token's log-probability is the server's, bit for bit. Collective.

    Args:
        batch: of this replica.
        live: `[B, T]` log-probabilities under the step's weights without replay, likewise for tokens of age 0; None:
            not measured.

    Raises:
        UserError: names the token that is furthest off, and by how much.
    """
    known = batch.usable_mask & ~batch.sampled_logprobs.isnan()
    pairs = [("", batch.sampled_logprobs, known)]
    if live is not None:
        pairs.append((" without replay", live.cpu(), batch.usable_mask & (batch.version_age == 0)))

    def check() -> None:
        for how, logprobs, mask in pairs:
            gap = (logprobs - batch.infer_logprobs).abs().masked_fill(~mask, 0)
            if gap.any():
                row, column = divmod(int(gap.argmax()), gap.shape[1])
                ours, theirs = float(logprobs[row, column]), float(batch.infer_logprobs[row, column])
                raise UserError(
                    f"rollout.exact: the engines' log-probabilities{how} are not the same: token {column + 1} of "
                    f"sample {int(batch.sample_index[row])} has {ours:.9g} in training and {theirs:.9g} in the server, "
                    f"{float(gap[row, column]):.3g} apart (of {int((gap > 0).sum())} of {int(mask.sum())} tokens)"
                )

    current_ranks().run_on_all(check)
