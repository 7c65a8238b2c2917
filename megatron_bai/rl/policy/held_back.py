"""End tokens that a server holds back from the first tokens of a response (`rollout.min_new_tokens`)."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from megatron_bai.rl.batches.stages import RolloutBatch
from megatron_bai.rl.policy.logprobs import logprobs_and_entropy

_LOGIT = -1e30  # of a token held back, as SGLang's least: its probability is 0, and times its logit no NaN


@dataclass(frozen=True)
class HeldBack:
    """Tokens without probability at the beginning of a response.

    Attributes:
        num_tokens: tokens of a response, counted from its first, at which they have none.
        ids: of those tokens.
    """

    num_tokens: int
    ids: Collection[int]

    def rescore(
        self,
        scores: tuple[torch.Tensor, torch.Tensor],
        logits: torch.Tensor,
        targets: torch.Tensor,
        micro_batch: RolloutBatch,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores in which the first tokens of responses have those of the other ids alone. Differentiable.

        *Collective* over tensor ranks, which are fed the same tokens.

        Args:
            scores: log-probabilities and entropy over all ids, `[…]` each as the model is fed them.
            logits: `[…, V/tp]`, this rank's part of the vocabulary.
            targets: `[…]` int64 global ids.
            micro_batch: of these tokens.
            temperature: of sampling.
        """
        from megatron.core import parallel_state as state

        first = micro_batch.pack(self.find_tokens(micro_batch)).to(logits.device)
        if not first.any():
            return scores
        local = torch.tensor(sorted(self.ids), device=logits.device)
        local = local - state.get_tensor_model_parallel_rank() * logits.shape[-1]
        local = local[(local >= 0) & (local < logits.shape[-1])]
        rows = logits[first].index_fill(-1, local, _LOGIT)
        rescored = logprobs_and_entropy(rows, targets.to(logits.device)[first], temperature)
        logprobs, entropy = (all_.index_put((first,), part) for all_, part in zip(scores, rescored, strict=True))
        return logprobs, entropy

    def find_tokens(self, batch: RolloutBatch) -> torch.Tensor:
        """Return the tokens at which the ids have no probability, `[B, T]` bool.

        A token counts from the first of the response, whoever the tokens between are of: as requests do.
        """
        has_begun = batch.response_mask.cumsum(1) > 0
        return batch.response_mask & (has_begun.cumsum(1) <= self.num_tokens)
