"""The trainer's view of the inference engine: start it, sample from it, give it new weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai.data.task import Prompt
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint
from megatron_bai.rewards import rewarded
from megatron_bai.rl.batches.batch import padded_length
from megatron_bai.rl.session import Session
from megatron_bai.rollout.client import RolloutClient, Wanted
from megatron_bai.rollout.sample import Sample, lost_sample
from megatron_bai.rollout.servers import fleet, weight_sync
from megatron_bai.rollout.servers.broadcast_transport import OverGroup
from megatron_bai.rollout.servers.fleet import Fleet, Servers
from megatron_bai.rollout.servers.quantize import quantized
from megatron_bai.rollout.servers.weight_sync import Carrier

_PROBES = 4  # held-out prompts whose log-probabilities prove that new weights arrived


class InferenceEngine:
    """The servers of a run: rank 0 gives them weights, each replica's leader is a client.

    Attributes:
        version: of the weights in use, counted in syncs from 0; when made, of those before the first sync.
        sync_gap: |mean log-probability of the probe under a server − under the trainer|, nats, after the last sync; the
            largest of the servers'.
    """

    def __init__(self, session: Session, servers: Fleet, version: int, supervised: Servers | None = None):
        """
        Args:
            version: of the weights before the first sync.
            supervised: the same servers as rank 0 has them, on rank 0.
        """
        settings = session.settings
        self._session, self._servers, self._fleet = session, servers, supervised
        self._transport: Carrier | None = None
        self._has_pushed = False
        self._disk_version = version + 1  # the checkpoint below run.dir that a server can be started from
        self._client = self._make_client(servers.ask, session.dp_rank)
        self._shapes = hf_checkpoint.hf_shapes(session.actor.modules, settings.model)
        probes = min(_PROBES, session.task.eval_size)
        self._probe = [prompt.ids for prompt in session.task.prompts("eval", settings.run.seed, 0, probes)]
        self.version = version
        self.sync_gap = float("nan")

    def _make_client(self, urls: list[str], first: int = 0) -> RolloutClient:
        model, rollout = self._session.settings.model, self._session.settings.rollout
        signature = self._session.signature
        return RolloutClient(urls, rollout, signature, model.vocab_size, model.max_position_embeddings, first)

    def sample(
        self,
        prompts: list[Prompt],
        group_size: int,
        seed: int | str,
        first: int = 0,
        temperature: float | None = None,
    ) -> list[Sample]:
        """Responses to this replica's prompts, with their rewards, on every rank of the replica. Collective over the
        world.

        A sample that cannot be had is asked again once servers that failed are back, and is `lost` where none did.

        Args:
            seed, first, temperature: as in `RolloutClient.generate`.

        Raises:
            UserError: a server failed too often, or aborted a sample.
        """
        session = self._session
        found: list[Sample | UserError] = []
        max_failures = self.max_failures(len(prompts) * group_size)
        while True:
            if session.is_replica_leader:
                end, version = session.task.tokenizer.eos_token_id, str(self.version)
                asked = ([prompt.ids for prompt in prompts], group_size, seed, end, first, temperature)
                found = self._client.generate(*asked, version=version, tolerated=max_failures, known=found)
                self._refuse_aborted(found)
            failures = [each for each in found if isinstance(each, UserError)]
            if not self.any_failed(failures) or not self.recover(failures, max_failures):
                break
        samples = [
            lost_sample(place // group_size, prompts[place // group_size].ids, session.signature, str(each))
            if isinstance(each, UserError)
            else each
            for place, each in enumerate(found)
        ]
        return session.send_to_replica(self.add_rewards(prompts, samples) if session.is_replica_leader else None)

    def add_rewards(self, prompts: list[Prompt], samples: list[Sample]) -> list[Sample]:
        """The samples with their rewards. A leader's alone."""
        assert self._session.scorer
        return rewarded(self._session.scorer, self._session.task, prompts, samples)

    def sample_partial(self, wanted: list[Wanted], max_failures: int) -> list[Sample | UserError]:
        """One go of samples, by `rollout.partial_tokens`, without rewards. A leader's alone: it asks no other rank.

        Args:
            max_failures: how many may fail: why they did is in their place (`RolloutClient.generate`).

        Raises:
            UserError: a server aborted a sample.
        """
        session = self._session
        end, budget = session.task.tokenizer.eos_token_id, session.settings.rollout.partial_tokens
        found = self._client.sample(wanted, end, budget=budget, version=str(self.version), tolerated=max_failures)
        self._refuse_aborted(found)
        return found

    def _refuse_aborted(self, found: list[Sample | UserError]) -> None:
        if any(isinstance(each, Sample) and each.finish == "abort" for each in found):
            where = ", ".join(self._servers.ask)
            raise UserError(f"{where} aborted a rollout: somebody else controls the server; run your own")

    def max_failures(self, samples: int) -> int:
        """How many of so many samples of a replica may be lost."""
        return int(self._session.settings.rollout.max_failed_fraction * samples)

    def any_failed(self, failures: list[UserError]) -> bool:
        """Whether samples of any replica failed. Collective.

        Args:
            failures: of this replica's, on its leader.
        """
        return any(current_ranks().run_on_all(lambda: bool(failures)))

    def recover(self, failures: list[UserError], max_failures: int) -> bool:
        """Whether servers had failed and are back, with the weights in use, which the actor must still have: what failed
        is worth asking again. Collective.

        Args:
            failures: as in `any_failed`.
            max_failures: how many there may be.

        Raises:
            UserError: there are more in some replica, and no server to bring back; or one failed too often.
        """
        if self._recover_servers():
            self._push_weights(again=True)
            return True
        current_ranks().run_on_all(lambda: self._require_few_failures(failures, max_failures))
        return False

    def _require_few_failures(self, failures: list[UserError], max_failures: int) -> None:
        if len(failures) > max_failures:
            bound = self._session.settings.rollout.max_failed_fraction
            raise UserError(
                f"{len(failures)} samples of a replica failed, more than rollout.max_failed_fraction={bound:g} allows; "
                f"first: {failures[0]}"
            )

    def _recover_servers(self) -> bool:
        """`Servers.revive` on rank 0. Collective."""
        checkpoint, version = _weights_dir(self._session, self._disk_version), str(self.version)

        def revive() -> list[str]:
            assert self._fleet
            return self._fleet.revive(checkpoint, version)

        if not current_ranks().run_on_first(revive):
            return False
        self.close()  # who came back is no member of the group that weights went through
        return True

    def sync(self) -> None:
        """Give the servers the actor's weights as the next version, and prove that they use them. Collective.

        Raises:
            UserError: a server refused, or its log-probabilities are not those of the new weights.
        """
        if self._has_pushed:  # the first sync is to servers that were found or started a moment ago
            self._recover_servers()
        if self._session.is_rank_0:
            assert self._fleet
            self._fleet.step()
        self.version += 1
        self._push_weights()

    def _push_weights(self, again: bool = False) -> None:
        """The actor's weights, as `version`, to all servers. Collective.

        Args:
            again: `version` is not new: the actor still has its weights, and so has the disk if they travel as files.
        """
        session = self._session
        if session.settings.rollout.sync == "disk":
            self._through_files(export=not again)
        else:
            self._through_memory()
        dist.barrier()
        self._check_probe()
        self._has_pushed = True

    def _through_files(self, export: bool) -> None:
        session = self._session
        directory = _export_weights(session, self.version) if export else _weights_dir(session, self.version)
        if session.is_rank_0:
            weight_sync.from_disk(self._servers.urls, directory, str(self.version), self._shapes)
            if self._disk_version != self.version:
                rmtree(_weights_dir(session, self._disk_version), ignore_errors=True)
        self._disk_version = self.version

    def _through_memory(self) -> None:
        session, rollout = self._session, self._session.settings.rollout
        tensors = hf_checkpoint.iter_hf_tensors(session.actor.modules, session.settings.model)
        if session.is_rank_0:
            tensors = ((name, quantized(name, tensor, rollout.quantize)) for name, tensor in tensors)
            self._transport = self._transport or self._make_transport()
            bucket = rollout.sync_bucket_mib << 20
            weight_sync.from_tensors(
                self._servers.urls, tensors, str(self.version), self._shapes, self._transport, bucket
            )
        else:
            for _ in tensors:  # takes part in the gathering, and has nothing to give
                pass

    def _make_transport(self) -> Carrier:
        """What brings tensors to the servers as they are now."""
        servers, rollout, device = self._servers, self._session.settings.rollout, self._session.device.device
        if rollout.sync == "tensors":
            return weight_sync.OverHttp(servers.urls, servers.sizes)
        return OverGroup(servers.urls, servers.sizes, rollout.sync_host, device)

    def close(self) -> None:
        """Leave the process group shared with the servers, where there is one."""
        if isinstance(self._transport, OverGroup):
            self._transport.close()
        self._transport = None

    def _check_probe(self) -> None:
        """Compare a probe's log-probabilities. Every rank scores it; rank 0 asks each server."""
        session = self._session
        length = padded_length(max(map(len, self._probe)), session.engine.place.multiple)
        tokens = torch.zeros(len(self._probe), length, dtype=torch.int64)
        mask = torch.zeros(len(self._probe), length, dtype=torch.bool)
        for row, ids in enumerate(self._probe):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids) - 1] = True
        ours = session.engine.score_probe(tokens)
        mean = torch.zeros(1, dtype=torch.float64)
        if ours is not None and session.reports_stats and session.dp_rank == 0:
            mean[0] = ours.cpu()[mask].double().mean()
        mean = mean.to(session.device.device)
        dist.all_reduce(mean)  # one rank holds the value, the others zero
        gap = [0.0]
        if session.is_rank_0:
            asked = [self._make_client([url]).score(self._probe) for url in self._servers.urls]
            gap[0] = max(abs(float(mean) - float(np.concatenate(own).astype(np.float64).mean())) for own in asked)
        dist.broadcast_object_list(gap, src=0)
        self.sync_gap = gap[0]
        tolerance = session.settings.rollout.sync_tolerance
        if not self.sync_gap <= tolerance:
            raise UserError(
                f"after weight sync {self.version} a server's log-probabilities of the probe are {self.sync_gap:.3g} "
                f"nats off, more than rollout.sync_tolerance ({tolerance:g}): it does not use the new weights"
            )


def _weights_dir(session: Session, version: int) -> Path:
    return Path(session.settings.run.dir) / "weights" / str(version)


def _export_weights(session: Session, version: int) -> Path:
    directory = _weights_dir(session, version)
    settings = session.settings
    change = partial(quantized, form=settings.rollout.quantize)
    hf_checkpoint.save_hf(
        session.actor.modules, settings.model, directory, session.tokenizer_dir, {"version": version}, change
    )
    return directory


@contextmanager
def start_inference(session: Session, version: int = 0) -> Iterator[InferenceEngine]:
    """Have servers with the actor's weights; those started here are stopped however the block ends. Collective.

    Args:
        version: of these weights.

    Raises:
        UserError: a server did not start, or one that runs already cannot be used.
    """
    settings = session.settings
    directory = None if settings.rollout.urls else _export_weights(session, version)
    with ExitStack() as stack:
        supervised: Servers | None = None
        found: list[Any] = [None]
        if session.is_rank_0:
            supervised = (
                fleet.running(settings.rollout)
                if directory is None
                else stack.enter_context(
                    fleet.started(directory, settings.rollout, Path(settings.run.dir), session.device.kind)
                )
            )
            found[0] = supervised.fleet
            # what was sent is the servers' now; a run's result is `trainer.save`
            stack.callback(rmtree, _weights_dir(session, version).parent, ignore_errors=True)
        dist.broadcast_object_list(found, src=0)
        inference = InferenceEngine(session, found[0], version - 1, supervised)
        stack.callback(inference.close)
        inference.sync()
        yield inference
