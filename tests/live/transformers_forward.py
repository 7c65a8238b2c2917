"""transformers' forward of a Qwen3-MoE: what a real server's replies are compared with."""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeForCausalLM

from megatron_bai.rollout.sample import Sample

TIE = 1e-5  # of two experts' scores: ten times their rounding


class Reference:
    """transformers' float32 forward of one checkpoint."""

    def __init__(self, path: Path):
        self.model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.gates = [layer.mlp.gate for layer in self.model.model.layers]

    @torch.no_grad()
    def __call__(self, ids: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probabilities `[T − 1]` of tokens 1…T−1; experts `[T − 1, layers, topk]` of tokens 0…T−2, sorted; and
        `[T − 1]` whether rounding can change neither: no expert of these tokens or those before is all but tied."""
        chosen: list[torch.Tensor] = []
        margins: list[torch.Tensor] = []

        def seen(gate: torch.nn.Module, given: tuple[torch.Tensor], out: tuple[torch.Tensor, ...]) -> None:
            chosen.append(out[-1])
            scores = (given[0].reshape(-1, given[0].shape[-1]) @ gate.weight.T).sort(-1, descending=True).values
            margins.append(scores[:, out[-1].shape[-1] - 1] - scores[:, out[-1].shape[-1]])

        hooks = [gate.register_forward_hook(seen) for gate in self.gates]
        logits = self.model(torch.from_numpy(ids)[None]).logits[0, :-1] / temperature
        for hook in hooks:
            hook.remove()
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[1:, None]))[:, 0]
        sure = (torch.stack(margins, 1)[:-1].amin(1) > TIE).cummin(0).values
        return logprobs.numpy(), torch.stack(chosen, 1)[:-1].sort(-1).values.numpy(), sure.numpy()

    def agrees(self, sample: Sample, temperature: float = 1.0, of: slice = slice(None)) -> None:
        """Assert that a sample has these weights' log-probabilities and routes; `of` are tokens of its response."""
        logprobs, routes, sure = self(sample.tokens, temperature)
        assert sure[:2].all(), "the test's premise: there is something to compare"
        known = sure[sample.prompt_length - 1 :][of]
        wanted = logprobs[sample.prompt_length - 1 :][of]
        np.testing.assert_allclose(sample.logprobs[of][known], wanted[known], atol=1e-4, rtol=0)
        if of == slice(None):
            np.testing.assert_array_equal(np.sort(sample.routes, -1)[sure], routes[sure])
