"""What the routers give the experts of a token: recorded in one pass, compared in a later one (RSPO, arXiv 2510.23027).

Both passes are forward ones without gradient, so no activation recomputation repeats a router in them. They may record
or force routes, too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bai.routing.replay.routing_replay import RoutingReplay

_LOG_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.log_softmax(dim=-1),
    "sigmoid": torch.nn.functional.logsigmoid,
}


@dataclass(frozen=True)
class RouterScores:
    """The experts that the routers of one rank used in one micro-batch, and their scores.

    Attributes:
        ids: `[layers, rows, topk]` int64; layers are the rank's MoE layers in order, rows the tokens its routers see.
        logs: `[layers, rows, topk]` float32, logarithms of the experts' scores among all experts.
    """

    ids: torch.Tensor
    logs: torch.Tensor


@contextmanager
def record_scores(replay: RoutingReplay, count: int) -> Iterator[list[RouterScores]]:
    """Record the experts that routers use and their scores, while a schedule runs forward for the first time.

    Args:
        replay: of the model.
        count: micro-batches of a run of the schedule; those of later runs are not recorded.

    Yields:
        A list that holds one entry a micro-batch once the block has ended; none where the rank has no routers.
    """
    layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in replay.routers]

    def observe(index: int, logs: torch.Tensor, chosen: torch.Tensor) -> None:
        if len(layers[index]) == count:
            return
        ids = chosen.int().topk(replay.signature.topk, dim=-1).indices
        layers[index].append((ids, logs.gather(-1, ids)))

    recorded: list[RouterScores] = []
    with _observed(replay, observe):
        yield recorded
    for micro_batch in zip(*layers, strict=True):
        ids, logs = zip(*micro_batch, strict=True)
        recorded.append(RouterScores(torch.stack(ids), torch.stack(logs)))


@contextmanager
def compare_scores(replay: RoutingReplay, old: Sequence[RouterScores], total: torch.Tensor) -> Iterator[None]:
    """Compare the scores of recorded experts with those recorded, while a schedule runs forward over the same rows.

    Args:
        replay: of the model.
        old: of each micro-batch.
        total: `[micro-batches, rows]` float32; gets Σ over this rank's layers of the mean, over a token's recorded
            experts, of |log p − log p_old|.
    """
    seen = [0] * len(replay.routers)

    def observe(index: int, logs: torch.Tensor, chosen: torch.Tensor) -> None:
        micro_batch = seen[index]
        seen[index] += 1
        before = old[micro_batch]
        total[micro_batch] += (logs.gather(-1, before.ids[index]) - before.logs[index]).abs().mean(dim=-1)

    with _observed(replay, observe):
        yield
    assert set(seen) <= {len(total)}, f"routers ran for {seen} of {len(total)} micro-batches"


@contextmanager
def _observed(replay: RoutingReplay, observe: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `observe` after each call of a router: index of its layer, log-scores and choice, `[rows, experts]` each."""
    hooks = []
    try:
        for index, router in enumerate(replay.routers.values()):
            hooks.append(_hook(router, index, observe))
        yield
    finally:
        for hook, router in zip(hooks, replay.routers.values(), strict=False):
            hook.remove()
            router.__dict__.pop("gating", None)


def _hook(router: Any, index: int, observe: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Any:
    """Have one router keep its logits until it has chosen. Returns the hook's handle."""
    compute_logits, log_scores, kept = router.gating, _LOG_SCORES[router.score_function], []

    def gating(*inputs: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled(), "scores are recorded without gradient"
        logits: torch.Tensor = compute_logits(*inputs)
        kept.append(logits)
        return logits

    def post_hook(router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        logits = kept.pop()
        observe(index, log_scores(logits.reshape(-1, logits.shape[-1]).float()), output[1])

    router.gating = gating
    return router.register_forward_hook(post_hook)
