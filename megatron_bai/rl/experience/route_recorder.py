"""Keep the routes that training replays in a store (`replay.store`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.routes import VersionSpan
from megatron_bai.routing.store.codec import Recording, encode, token_hash
from megatron_bai.routing.store.route_store import RouteStore, StoreWriter, cut, is_store


class RouteRecorder:
    """The leader of each replica writes the routes of its samples to a file of its own, once a step."""

    def __init__(self, session: Session, step: int = 0, same_run: bool = False):
        """Open the store. Collective.

        Args:
            step: the first that will be kept.
            same_run: the store is of the run that goes on with this step; what it holds of it and later ones is cut.

        Raises:
            UserError: it holds routes of another run, or cannot be written.
        """
        self.session, self.settings = session, session.settings.replay
        self._writer: StoreWriter | None = None
        current_ranks().run_on_first(lambda: _prepare_store(self.settings.store, step if same_run else None))
        if not session.is_replica_leader:
            return
        self._writer = StoreWriter(self.settings.store, f"replica-{session.dp_rank:05}")

    def record_step(
        self, step: int, version: int, samples: list[Sample], micro_batches: list[Batch], routes: list[MicroRoutes]
    ) -> None:
        """Write the routes of a step, as the engine was given them. Collective over the replica.

        Args:
            version: of the training engine's weights, which chose R2's routes.
            samples: of this replica, in the order they were sampled in.
            micro_batches: the batch in parts, which hold the samples in any order (`Batch.sample_index`).
            routes: replayed in each of them on this rank.

        Raises:
            UserError: they cannot be written.
        """
        kept: list[int] = []
        for micro_batch, own in zip(micro_batches, routes, strict=True):
            whole = self._gather_routes(micro_batch, own)
            if self._writer is None or whole is None:
                continue
            # R2 replays the trainer's own routes, which lack none.
            known = micro_batch.routed if self.settings.mode == "r3" else micro_batch.routed | micro_batch.missing
            for number, ids, routed in zip(micro_batch.sample_index.tolist(), whole, known.numpy(), strict=True):
                sample = samples[number]
                kept.append(number)
                if sample.lost:
                    continue
                rows = len(sample.tokens) - 1
                mine = (VersionSpan(str(version), 0, rows),)
                recording = Recording(
                    signature=self.session.signature,
                    ids=ids[:rows],
                    valid=routed[:rows],
                    spans=sample.row_spans if self.settings.mode == "r3" else mine,
                    token_hash=token_hash(sample.tokens),
                )
                envelope = encode(recording, self.settings.store_encoding)
                self._writer.append(step, self.session.dp_rank * len(samples) + number, self.settings.mode, envelope)
        if self._writer:
            assert sorted(kept) == list(range(len(samples))), "each sample's routes are kept once, if it has any"
            self._writer.sync()

    def _gather_routes(self, micro_batch: Batch, own: MicroRoutes) -> np.ndarray | None:
        """`[B, T, moe_layers, topk]` of a micro-batch on the leader, None elsewhere, from what each rank replayed.

        Raises:
            RuntimeError: the ranks together do not hold a route of every token in every layer.
        """
        session, signature = self.session, self.session.signature
        fed = micro_batch.pack(micro_batch.tokens)
        place = torch.arange(fed.numel()).reshape(fed.shape)
        tokens = session.engine.place.rows(place).numpy()  # where each of this rank's rows belongs
        ids, columns = own.ids.cpu().numpy().astype(signature.dtype), session.engine.replay.columns
        parts: list[Any] | None = (
            [None] * dist.get_world_size(session.model_group) if session.is_replica_leader else None
        )
        dist.gather_object((tokens, columns, ids), parts, group=session.model_group, group_dst=0)
        if parts is None:
            return None
        whole = np.full((fed.numel(), signature.moe_layers, signature.topk), -1, dtype=np.int16)
        for rows, layers, replayed in parts:
            whole[np.ix_(rows, layers)] = replayed
        if (whole < 0).any():
            raise RuntimeError("the ranks of a replica do not replay a route of every token in every layer")
        return micro_batch.unpack(
            torch.from_numpy(whole.astype(signature.dtype)).view(*fed.shape, *whole.shape[1:])
        ).numpy()

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _prepare_store(directory: str, step: int | None) -> None:
    """Cut a store of the same run to the steps before `step`; refuse one of another run."""
    if not is_store(directory):
        return
    if step is not None:
        cut(directory, step)
    with RouteStore(directory) as store:
        if store.entries and step is None:
            raise UserError(
                f"replay.store={directory} holds routes of another run, up to its step {store.entries[-1].step}: name "
                "another directory"
            )


@contextmanager
def open_route_recorder(session: Session, step: int = 0, same_run: bool = False) -> Iterator[RouteRecorder | None]:
    """A keeper where `replay.store` asks for one. Collective.

    Raises:
        UserError: as `RouteRecorder`.
    """
    if not session.settings.replay.store:
        yield None
        return
    recorder = RouteRecorder(session, step, same_run)
    try:
        yield recorder
    finally:
        recorder.close()
