"""What is forced, or was recorded, in one run of a schedule: queues, cursors and proofs. No Megatron in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_INPUT_TOLERANCE = 0.1  # relative: recomputed activations repeat to rounding, those of another micro-batch share nothing


@dataclass(frozen=True)
class MicroRoutes:
    """The experts of one micro-batch on one rank. Its rows are the tokens this rank's routers see (`layout.Place`).

    Attributes:
        ids: `[rows, layers, topk]` expert ids of any integer dtype, on the model's device; layers are the rank's MoE
            layers in order. The order inside a row carries nothing.
        checked: `[rows]` bool, rows that must be proven replayed and are counted: not padding. None: all.
        live: `[rows]` bool, rows without a recording, where the router chooses. None: no row.
    """

    ids: torch.Tensor
    checked: torch.Tensor | None = None
    live: torch.Tensor | None = None


class ReplayPass:
    """One run of a schedule: what is forced or was recorded, how far each router is, and what was proven.

    Attributes:
        routes: what to force, or None to record.
        layer_queues: by layer, `[rows, topk]` ids of each micro-batch.
    """

    def __init__(self, layers: list[int], routes: Sequence[MicroRoutes] | None):
        self.routes = routes
        self.layer_queues = {layer: [m.ids[:, i] for m in routes or ()] for i, layer in enumerate(layers)}
        self._cursors = {backward: dict.fromkeys(layers, 0) for backward in (False, True)}
        self._inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._proven: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # rows counted, one a router's call
        self._wrong: list[tuple[int, str, torch.Tensor]] = []  # layer, what went wrong, in how many rows

    def cursor(self, layer: int, backward: bool) -> int:
        return self._cursors[backward][layer]

    def next_index(self, layer: int, backward: bool) -> int:
        """The number of the micro-batch whose turn it is in this layer."""
        number = self.cursor(layer, backward)
        limit = self.cursor(layer, False) if backward else None if self.routes is None else len(self.routes)
        if limit is not None and number >= limit:
            kind = "recomputed in the backward" if backward else "run"
            raise RuntimeError(f"the router of layer {layer} was {kind} more often than the {limit} micro-batches")
        self._cursors[backward][layer] = number + 1
        return number

    def remember_input(self, layer: int, hidden: torch.Tensor) -> None:
        """Remember a sample of the input, by which a recomputed pass is recognised."""
        self._inputs[layer].append(_fingerprint_input(hidden))

    def check_input(self, layer: int, number: int, hidden: torch.Tensor) -> None:
        """A recomputed pass must be the one whose turn it is, or it would replay the routes of another micro-batch."""
        before, now = self._inputs[layer][number], _fingerprint_input(hidden)
        if before.shape != now.shape:
            raise RuntimeError(f"the router of layer {layer} is recomputed with another micro-batch than is due")
        wrong = (now - before).norm() > _INPUT_TOLERANCE * before.norm()
        self._add_check(layer, "was recomputed with another micro-batch than was due", wrong)
        self._inputs[layer][number] = before[:0]

    def check_choice(self, layer: int, backward: bool, same: torch.Tensor, micro: MicroRoutes | None) -> None:
        """Note the rows in which the router chose what it was given."""
        live = None if micro is None else micro.live
        self._add_check(layer, "bypassed replay in {} rows", (~same).sum())
        kept = same if micro is None or micro.checked is None else same & micro.checked.to(same.device)
        self._proven[backward].append((kept if live is None else kept & ~live.to(same.device)).sum())

    def _add_check(self, layer: int, said: str, wrong: torch.Tensor) -> None:
        self._wrong.append((layer, said, wrong.long()))
        if wrong.device.type == "cpu":
            self._raise_pending()  # at once: on a GPU waiting for each answer would cost more than it saves

    def _raise_pending(self) -> None:
        if self._wrong and bool(torch.stack([wrong for *_, wrong in self._wrong]).any()):
            layer, said, wrong = next(entry for entry in self._wrong if bool(entry[2]))
            raise RuntimeError(f"the router of layer {layer} {said.format(int(wrong))}")
        self._wrong.clear()

    def check_complete(self) -> None:
        """Every router ran once for each micro-batch, and recomputed all of them or none.

        Raises:
            RuntimeError: names the layers.
        """
        self._raise_pending()
        ran, repeated = self._cursors[False], self._cursors[True]
        count = max(ran.values(), default=0) if self.routes is None else len(self.routes)
        if late := [layer for layer, number in ran.items() if number != count]:
            raise RuntimeError(
                f"routers of layers {late} ran for {[ran[layer] for layer in late]} of {count} micro-batches: their "
                "routing was not replayed"
            )
        if self.layer_queues and not count:
            raise RuntimeError(f"routers of layers {list(ran)} did not run: nothing was recorded or replayed")
        if late := [layer for layer, number in repeated.items() if number not in (0, count)]:
            raise RuntimeError(f"routers of layers {late} were recomputed for some of the {count} micro-batches only")

    def num_checked(self, backward: bool) -> int:
        """(token, layer) rows proven."""
        return int(torch.stack(self._proven[backward]).sum()) if self._proven[backward] else 0

    def recorded_routes(self) -> list[MicroRoutes]:
        """What the routers chose, by micro-batch."""
        if not self.layer_queues:
            return []
        return [MicroRoutes(torch.stack(ids, dim=1)) for ids in zip(*self.layer_queues.values(), strict=True)]


def _fingerprint_input(hidden: torch.Tensor) -> torch.Tensor:
    """Up to about 256 elements of a router's input, spread over its rows."""
    flat = hidden.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 256 | 1)].float().clone()


def sets_differ(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Rows whose expert *sets* differ.

    Args:
        ours, theirs: `[…, topk]` expert ids, distinct within a row, in any order.

    Returns:
        `[…]` bool.
    """
    return (ours.sort(dim=-1).values != theirs.sort(dim=-1).values).any(dim=-1)
