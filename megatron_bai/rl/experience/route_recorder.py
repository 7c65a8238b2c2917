"""The routes that training replays, written to a store (`replay.store`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.rl.batches.stages import RolloutBatch
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.routes import VersionSpan
from megatron_bai.routing.store.codec import SampleRoutes, encode, token_hash
from megatron_bai.routing.store.route_store import RouteStore, StoreWriter, is_store, truncate_store


class RouteRecorder:
    """Writes the routes of each step: the leader of each replica those of its samples, to a file of its own."""

    def __init__(self, session: Session, step: int = 0, same_run: bool = False):
        """Open the store. Collective.

        Args:
            session: of the run.
            step: the first that will be recorded.
            same_run: the store is of the run that is resumed at this step; its records of this and later steps are
                removed.

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
        self,
        step: int,
        version: int,
        samples: list[Sample],
        micro_batches: list[RolloutBatch],
        routes: list[MicroRoutes],
    ) -> None:
        """Write the routes that the engine replayed in a step. Collective over the replica.

        Args:
            step: global step, from 0.
            version: of the training engine's weights, which chose R2's routes.
            samples: of this replica, in the order they were sampled in.
            micro_batches: of the step, which hold the samples in any order (`RolloutBatch.sample_index`).
            routes: replayed in each of them on this rank.

        Raises:
            UserError: they cannot be written.
        """
        recorded_samples: list[int] = []
        for micro_batch, local_routes in zip(micro_batches, routes, strict=True):
            all_ids = self._gather_routes(micro_batch, local_routes)
            if self._writer is None or all_ids is None:
                continue
            # R2 replays the trainer's own routes: none is missing.
            route_mask = micro_batch.routed if self.settings.mode == "r3" else micro_batch.routed | micro_batch.missing
            indices = micro_batch.sample_index.tolist()
            for index, ids, valid in zip(indices, all_ids, route_mask.numpy(), strict=True):
                sample = samples[index]
                recorded_samples.append(index)
                if sample.lost:
                    continue
                rows = len(sample.tokens) - 1
                trainer_span = (VersionSpan(str(version), 0, rows),)
                recording = SampleRoutes(
                    signature=self.session.signature,
                    ids=ids[:rows],
                    valid=valid[:rows],
                    spans=sample.row_spans if self.settings.mode == "r3" else trainer_span,
                    token_hash=token_hash(sample.tokens),
                )
                envelope = encode(recording, self.settings.store_encoding)
                self._writer.append(step, self.session.dp_rank * len(samples) + index, self.settings.mode, envelope)
        if self._writer:
            assert sorted(recorded_samples) == list(range(len(samples))), "every sample is in one micro-batch"
            self._writer.sync()

    def _gather_routes(self, micro_batch: RolloutBatch, routes: MicroRoutes) -> np.ndarray | None:
        """Gather what each rank replayed of a micro-batch on the leader: `[B, T, moe_layers, topk]`, None elsewhere.

        Raises:
            RuntimeError: the ranks together do not hold a route of every token in every layer.
        """
        session, signature = self.session, self.session.signature
        model_tokens = micro_batch.pack(micro_batch.tokens)
        positions = torch.arange(model_tokens.numel()).reshape(model_tokens.shape)
        tokens = session.engine.place.rows(positions).numpy()  # the token of each of this rank's rows
        ids, columns = routes.ids.cpu().numpy().astype(signature.dtype), session.engine.replay.columns
        gathered: list[Any] | None = (
            [None] * dist.get_world_size(session.model_group) if session.is_replica_leader else None
        )
        dist.gather_object((tokens, columns, ids), gathered, group=session.model_group, group_dst=0)
        if gathered is None:
            return None
        all_ids = np.full((model_tokens.numel(), signature.moe_layers, signature.topk), -1, dtype=np.int16)
        for rows, layers, replayed in gathered:
            all_ids[np.ix_(rows, layers)] = replayed
        if (all_ids < 0).any():
            raise RuntimeError("the ranks of a replica do not replay a route of every token in every layer")
        packed = torch.from_numpy(all_ids.astype(signature.dtype)).view(*model_tokens.shape, *all_ids.shape[1:])
        return micro_batch.unpack(packed).numpy()

    def close(self) -> None:
        """Close the file."""
        if self._writer:
            self._writer.close()


def _prepare_store(directory: str, step: int | None) -> None:
    """Remove the records of `step` and later steps from a store of the same run; refuse a store of another run."""
    if not is_store(directory):
        return
    if step is not None:
        truncate_store(directory, step)
    with RouteStore(directory) as store:
        if store.entries and step is None:
            raise UserError(
                f"replay.store={directory} holds routes of another run, up to its step {store.entries[-1].step}: name "
                "another directory"
            )


@contextmanager
def open_route_recorder(session: Session, step: int = 0, same_run: bool = False) -> Iterator[RouteRecorder | None]:
    """Open a recorder if `replay.store` is set. Collective.

    Args:
        session: of the run.
        step: as in `RouteRecorder`.
        same_run: likewise.

    Yields:
        The recorder, or None.

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
