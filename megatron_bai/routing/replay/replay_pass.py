"""The state of one run of a schedule: queues of routes, cursors and checks. Imports nothing of Megatron."""

from dataclasses import dataclass

import torch

from megatron_bai.routing.routes import RouteSignature, check_bounds, check_distinct

# Relative: recomputed activations repeat to rounding, those of another micro-batch share nothing.
_INPUT_TOLERANCE = 0.1


@dataclass(frozen=True)
class MicroRoutes:
    """The experts of one micro-batch on one rank. Its rows are the tokens this rank's routers see (`layout.Place`).

    Attributes:
        ids: `[rows, layers, topk]` expert ids of any integer dtype, on the model's device; layers are the rank's MoE
            layers in order. The order inside a row carries no meaning.
        checked: `[rows]` bool, rows that are checked to have been replayed and are counted: not padding. None: all.
        live: `[rows]` bool, rows without a recorded route, where the router chooses. None: no row.
    """

    ids: torch.Tensor
    checked: torch.Tensor | None = None
    live: torch.Tensor | None = None


class ReplayPass:
    """One run of a schedule: routes forced or recorded, how far each router is, and what was checked.

    Attributes:
        routes: what to force, as it is added; None: the pass records.
        layer_queues: by layer, `[rows, topk]` ids of each micro-batch.
    """

    def __init__(self, layers: list[int], signature: RouteSignature, forces: bool):
        self.routes: list[MicroRoutes] | None = [] if forces else None
        self.layer_queues: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._signature = signature
        self._cursors = {backward: dict.fromkeys(layers, 0) for backward in (False, True)}
        self._inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._num_checked: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # rows, one entry a router's call
        self._wrong: list[tuple[int, str, torch.Tensor]] = []  # layer, what went wrong, in how many rows

    def add(self, micro: MicroRoutes) -> None:
        """Add what to force in the next micro-batch, before its forward pass.

        Args:
            micro: routes of this rank's layers.

        Raises:
            ValueError: routes that do not fit these layers, or that the dispatcher could not follow.
        """
        assert self.routes is not None, "this pass records"
        self._check_routes(micro, f"micro-batch {len(self.routes)}")
        self.routes.append(micro)
        for i, queue in enumerate(self.layer_queues.values()):
            queue.append(micro.ids[:, i])

    def _check_routes(self, micro: MicroRoutes, where: str) -> None:
        """Refuse routes that do not fit this rank's layers, or that the dispatcher could not follow."""
        ids, shape = micro.ids, (len(self.layer_queues), self._signature.topk)
        if ids.dim() != 3 or ids.shape[1:] != shape or ids.is_floating_point():
            needed = f"[rows, {shape[0]}, {shape[1]}]"
            raise ValueError(f"{where}: routes are {ids.dtype} {tuple(ids.shape)}, this rank needs {needed}")
        for name, mask in (("checked", micro.checked), ("live", micro.live)):
            if mask is not None and (mask.shape != ids.shape[:1] or mask.dtype != torch.bool):
                raise ValueError(f"{where}: `{name}` is {mask.dtype} {tuple(mask.shape)}, not bool [{len(ids)}]")
        if not ids.numel():
            return
        low, high = (int(value) for value in ids.aminmax())
        check_bounds(low, high, self._signature, where)
        check_distinct(ids.sort(dim=-1).values.movedim(-1, 0), where)

    def cursor(self, layer: int, backward: bool) -> int:
        """Return how many micro-batches a layer's router has run, in forward passes or recomputed in the backward.

        Args:
            layer: decoder layer, counted from 0.
            backward: whether to count those recomputed in the backward.
        """
        return self._cursors[backward][layer]

    def next_index(self, layer: int, backward: bool) -> int:
        """Return the index of the micro-batch whose turn it is in a layer, and advance the layer's cursor.

        Args:
            layer: decoder layer, counted from 0.
            backward: whether this is a forward pass that the backward recomputes.

        Raises:
            RuntimeError: the router has run for every micro-batch already.
        """
        index = self.cursor(layer, backward)
        limit = self.cursor(layer, False) if backward else None if self.routes is None else len(self.routes)
        if limit is not None and index >= limit:
            how = "recomputed in the backward" if backward else "run"
            raise RuntimeError(
                f"the router of layer {layer} was {how} more often than the {limit} micro-batches with routes"
            )
        self._cursors[backward][layer] = index + 1
        return index

    def remember_input(self, layer: int, hidden: torch.Tensor) -> None:
        """Remember elements of a router's input, by which a recomputed pass is recognised.

        Args:
            layer: decoder layer, counted from 0.
            hidden: the router's input, `[…, H]`, in a forward pass; the elements are copied as float32.
        """
        self._inputs[layer].append(_fingerprint_input(hidden))

    def check_input(self, layer: int, index: int, hidden: torch.Tensor) -> None:
        """Check that a recomputed pass has the input of the micro-batch whose turn it is.

        Otherwise it would replay the routes of another micro-batch.

        Args:
            layer: decoder layer, counted from 0.
            index: of the micro-batch.
            hidden: the router's input, `[…, H]`.

        Raises:
            RuntimeError: the inputs differ; on a GPU not before `check_complete`.
        """
        before, now = self._inputs[layer][index], _fingerprint_input(hidden)
        if before.shape != now.shape:
            raise RuntimeError(f"the router of layer {layer} is recomputed with another micro-batch than is due")
        wrong = (now - before).norm() > _INPUT_TOLERANCE * before.norm()
        self._add_check(layer, "was recomputed with another micro-batch than was due", wrong)
        self._inputs[layer][index] = before[:0]

    def check_choice(self, layer: int, backward: bool, same: torch.Tensor, micro: MicroRoutes | None) -> None:
        """Check that the router chose the experts that it was given, and count the rows.

        Args:
            layer: decoder layer, counted from 0.
            backward: whether the pass is recomputed in the backward.
            same: `[rows]` bool, rows in which it did.
            micro: routes of the micro-batch, or None where they were recorded in this pass.

        Raises:
            RuntimeError: a row differs; on a GPU not before `check_complete`.
        """
        live = None if micro is None else micro.live
        self._add_check(layer, "bypassed replay in {} rows", (~same).sum())
        checked = same if micro is None or micro.checked is None else same & micro.checked.to(same.device)
        self._num_checked[backward].append((checked if live is None else checked & ~live.to(same.device)).sum())

    def _add_check(self, layer: int, message: str, wrong: torch.Tensor) -> None:
        """Add the result of a check: in how many rows a layer is wrong, and what the error then says."""
        self._wrong.append((layer, message, wrong.long()))
        if wrong.device.type == "cpu":
            self._raise_pending()  # at once: on a GPU waiting for each answer would cost more than it saves

    def _raise_pending(self) -> None:
        """Raise the first error among the checks added since the last call."""
        if self._wrong and bool(torch.stack([wrong for *_, wrong in self._wrong]).any()):
            layer, message, wrong = next(entry for entry in self._wrong if bool(entry[2]))
            raise RuntimeError(f"the router of layer {layer} {message.format(int(wrong))}")
        self._wrong.clear()

    def check_complete(self) -> None:
        """Check that every router ran once for each micro-batch, and recomputed all of them or none.

        Raises:
            RuntimeError: names the layers.
        """
        self._raise_pending()
        ran, recomputed = self._cursors[False], self._cursors[True]
        count = max(ran.values(), default=0) if self.routes is None else len(self.routes)
        if late := [layer for layer, index in ran.items() if index != count]:
            raise RuntimeError(
                f"routers of layers {late} ran for {[ran[layer] for layer in late]} of {count} micro-batches: their "
                "routing was not replayed"
            )
        if self.layer_queues and not count:
            raise RuntimeError(f"routers of layers {list(ran)} did not run: nothing was recorded or replayed")
        if late := [layer for layer, index in recomputed.items() if index not in (0, count)]:
            raise RuntimeError(f"routers of layers {late} were recomputed for some of the {count} micro-batches only")

    def num_checked(self, backward: bool) -> int:
        """Count the (token, layer) rows checked in forward passes, or in those that the backward recomputed."""
        return int(torch.stack(self._num_checked[backward]).sum()) if self._num_checked[backward] else 0

    def recorded_routes(self) -> list[MicroRoutes]:
        """Return the routes the routers chose, one entry a micro-batch."""
        if not self.layer_queues:
            return []
        return [MicroRoutes(torch.stack(ids, dim=1)) for ids in zip(*self.layer_queues.values(), strict=True)]


def _fingerprint_input(hidden: torch.Tensor) -> torch.Tensor:
    """Copy up to about 256 elements of a router's input, spread over its rows, as float32."""
    flat = hidden.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 256 | 1)].float().clone()


def sets_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Find the rows whose expert *sets* differ.

    Args:
        a: `[…, topk]` expert ids, distinct within a row, in any order.
        b: the same of other routes.

    Returns:
        `[…]` bool.
    """
    return (a.sort(dim=-1).values != b.sort(dim=-1).values).any(dim=-1)
