"""What the routers give the experts of a token: recorded in one pass, compared in a later one (RSPO, arXiv 2510.23027).

Both passes may record or force routes, too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bai.routing.replay.routing_replay import RoutingReplay, in_backward

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]

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

    log_scores = _log_score_functions(replay)

    def observe(index: int, hidden: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        if len(layers[index]) == count:
            return
        logs = log_scores[index](logits)
        ids = chosen.int().topk(replay.signature.topk, dim=-1).indices
        layers[index].append((ids, logs.gather(-1, ids)))

    recorded: list[RouterScores] = []
    with observe_logits(replay, observe):
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
    seen, log_scores = [0] * len(replay.routers), _log_score_functions(replay)

    def observe(index: int, hidden: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        logs = log_scores[index](logits)
        micro_batch = seen[index]
        seen[index] += 1
        before = old[micro_batch]
        total[micro_batch] += (logs.gather(-1, before.ids[index]) - before.logs[index]).abs().mean(dim=-1)

    with observe_logits(replay, observe):
        yield
    assert set(seen) <= {len(total)}, f"routers ran for {seen} of {len(total)} micro-batches"


def _log_score_functions(replay: RoutingReplay) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the function from logits to log-scores of each router."""
    return [_LOG_SCORES[router.score_function] for router in replay.routers.values()]


@contextmanager
def observe_logits(replay: RoutingReplay, observe: Observer) -> Iterator[None]:
    """Call `observe` after each forward pass of a router; not where activation recomputation repeats one.

    Blocks nest.

    Args:
        replay: of the model.
        observe: gets the index of the layer among the rank's MoE layers, the router's input `[rows, H]`, its logits
            `[rows, experts]` float32, both without gradient, and its choice `[rows, experts]` bool.
    """
    undo: list[Callable[[], None]] = []
    try:
        for index, router in enumerate(replay.routers.values()):
            undo.append(_hook(router, index, observe))
        yield
    finally:
        for each in reversed(undo):
            each()


def _hook(router: Any, index: int, observe: Observer) -> Callable[[], None]:
    """Have one router keep its logits until it has chosen. Returns what undoes that."""
    compute_logits, outer = router.gating, router.__dict__.get("gating")
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def gating(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        logits: torch.Tensor = compute_logits(hidden, *others)
        if not in_backward():
            kept.append((hidden.detach(), logits.detach()))
        return logits

    def post_hook(router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if in_backward():
            return
        hidden, logits = (values.reshape(-1, values.shape[-1]) for values in kept.pop())
        observe(index, hidden, logits.float(), output[1])

    router.gating, handle = gating, router.register_forward_hook(post_hook)

    def undo() -> None:
        handle.remove()
        router.__dict__.pop("gating")
        if outer is not None:
            router.gating = outer

    return undo
