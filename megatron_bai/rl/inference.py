"""The trainer's view of the inference engine: start it, sample from it, give it new weights."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai.data import Prompt
from megatron_bai.errors import UserError
from megatron_bai.model import hf
from megatron_bai.rewards import rewarded
from megatron_bai.rl.batch import padded_length
from megatron_bai.rl.session import Session
from megatron_bai.rollout.client import RolloutClient, Wanted
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout import fleet, sync
from megatron_bai.rollout.fleet import Fleet
from megatron_bai.rollout.group import OverGroup
from megatron_bai.rollout.quantize import quantized

_PROBES = 4  # held-out prompts whose log-probabilities prove that new weights arrived


class Inference:
    """The servers of a run: rank 0 gives them weights, each replica's leader is a client.

    Attributes:
        version: of the weights in use, counted in syncs from 0; when made, of those before the first sync.
        sync_gap: |mean log-probability of the probe under a server − under the trainer|, nats, after the last sync; the
            largest of the servers'.
    """

    def __init__(self, session: Session, servers: Fleet, version: int, carrier: sync.Carrier | None):
        """
        Args:
            version: of the weights before the first sync.
            carrier: of tensors, on rank 0; None where weights travel as files.
        """
        settings = session.settings
        self._session, self._servers, self._carrier = session, servers, carrier
        self._client = self._client_of(servers.ask, session.data_rank)
        self._shapes = hf.shapes(session.actor.modules, settings.model)
        probes = min(_PROBES, session.task.eval_size)
        self._probe = [prompt.ids for prompt in session.task.prompts("eval", settings.run.seed, 0, probes)]
        self.version = version
        self.sync_gap = float("nan")

    def _client_of(self, urls: list[str], first: int = 0) -> RolloutClient:
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
        """Responses to this replica's prompts, with their rewards, on every rank of the replica. Collective over it.

        Args:
            seed, first, temperature: as in `RolloutClient.generate`.

        Raises:
            UserError: the server failed, aborted a sample, or sampled with other weights than it was given.
        """
        session, samples = self._session, None
        if session.leader:
            end = session.task.tokenizer.eos_token_id
            samples = self._client.generate([p.ids for p in prompts], group_size, seed, end, first, temperature)
            self._check(samples)
            samples = self.reward(prompts, samples)
        return session.deliver(samples)

    def reward(self, prompts: list[Prompt], samples: list[Sample]) -> list[Sample]:
        """The samples with their rewards. A leader's alone."""
        return rewarded(self._session.scorer, self._session.task, prompts, samples)

    def advance(self, wanted: list[Wanted]) -> list[Sample]:
        """One go of samples, by `rollout.partial_tokens`, without rewards. A leader's alone: it asks no other rank.

        Raises:
            UserError: as `sample`.
        """
        session = self._session
        end, budget = session.task.tokenizer.eos_token_id, session.settings.rollout.partial_tokens
        samples = self._client.sample(wanted, end, budget=budget)
        self._check(samples, [len(each.former.response) if each.former else 0 for each in wanted])
        return samples

    def _check(self, samples: list[Sample], before: list[int] | None = None) -> None:
        """Refuse what the server did not sample whole, and with the weights it was given.

        Args:
            before: tokens of each response that are from earlier goes; None: there are none.
        """
        where = ", ".join(self._servers.ask)
        for sample, start in zip(samples, before or [0] * len(samples), strict=True):
            if sample.finish == "abort":
                raise UserError(f"{where} aborted a rollout: somebody else controls the server; run your own")
            if wrong := {span.version for span in sample.spans if span.end > start} - {str(self.version)}:
                raise UserError(f"{where} sampled with weights {sorted(wrong)}, the trainer is at {self.version}")

    def sync(self) -> None:
        """Give the servers the actor's weights as the next version, and prove that they use them. Collective.

        Raises:
            UserError: a server refused, or its log-probabilities are not those of the new weights.
        """
        session, self.version = self._session, self.version + 1
        if session.settings.rollout.sync == "disk":
            self._through_files()
        else:
            self._through_memory()
        dist.barrier()
        self._prove()

    def _through_files(self) -> None:
        session = self._session
        directory = _export(session, self.version)
        if session.lead:
            sync.from_disk(self._servers.urls, directory, str(self.version), self._shapes)
            if self.version:
                rmtree(_weights(session, self.version - 1), ignore_errors=True)

    def _through_memory(self) -> None:
        session, rollout = self._session, self._session.settings.rollout
        tensors = hf.tensors(session.actor.modules, session.settings.model)
        if session.lead:
            tensors = ((name, quantized(name, tensor, rollout.quantize)) for name, tensor in tensors)
            bucket = rollout.sync_bucket_mib << 20
            sync.from_tensors(self._servers.urls, tensors, str(self.version), self._shapes, self._carrier, bucket)
        else:
            for _ in tensors:  # takes part in the gathering, and has nothing to give
                pass

    def _prove(self) -> None:
        """Compare a probe's log-probabilities. Every rank scores it; rank 0 asks each server."""
        session = self._session
        length = padded_length(max(map(len, self._probe)), session.engine.place.multiple)
        tokens = torch.zeros(len(self._probe), length, dtype=torch.int64)
        mask = torch.zeros(len(self._probe), length, dtype=torch.bool)
        for row, ids in enumerate(self._probe):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids) - 1] = True
        ours = session.engine.probe(tokens)
        mean = torch.zeros(1, dtype=torch.float64)
        if ours is not None and session.contributes and session.data_rank == 0:
            mean[0] = ours.cpu()[mask].double().mean()
        mean = mean.to(session.device.device)
        dist.all_reduce(mean)  # one rank holds the value, the others zero
        gap = [0.0]
        if session.lead:
            asked = [self._client_of([url]).score(self._probe) for url in self._servers.urls]
            gap[0] = max(abs(float(mean) - float(np.concatenate(own).astype(np.float64).mean())) for own in asked)
        dist.broadcast_object_list(gap, src=0)
        self.sync_gap = gap[0]
        tolerance = session.settings.rollout.sync_tolerance
        if not self.sync_gap <= tolerance:
            raise UserError(
                f"after weight sync {self.version} a server's log-probabilities of the probe are {self.sync_gap:.3g} "
                f"nats off, more than rollout.sync_tolerance ({tolerance:g}): it does not use the new weights"
            )


def _weights(session: Session, version: int) -> Path:
    return Path(session.settings.run.dir) / "weights" / str(version)


def _export(session: Session, version: int) -> Path:
    directory = _weights(session, version)
    settings = session.settings
    change = partial(quantized, form=settings.rollout.quantize)
    hf.export_hf(
        session.actor.modules, settings.model, directory, session.tokenizer_dir, {"version": version}, change
    )
    return directory


@contextmanager
def serve(session: Session, version: int = 0) -> Iterator[Inference]:
    """Have servers with the actor's weights; those started here are stopped however the block ends. Collective.

    Args:
        version: of these weights.

    Raises:
        UserError: a server did not start, or one that runs already cannot be used.
    """
    settings = session.settings
    directory = None if settings.rollout.urls else _export(session, version)
    with ExitStack() as stack:
        found: list[Fleet | None] = [None]
        if session.lead:
            found[0] = fleet.running(settings.rollout) if directory is None else stack.enter_context(
                fleet.started(directory, settings.rollout, Path(settings.run.dir), session.device.kind)
            )
        dist.broadcast_object_list(found, src=0)
        servers = found[0]
        if session.lead:  # what was sent is the servers' now; a run's result is `trainer.save`
            stack.callback(rmtree, _weights(session, version).parent, ignore_errors=True)
        carrier = _carrier(session, servers, stack) if session.lead else None
        inference = Inference(session, servers, version - 1, carrier)
        inference.sync()
        yield inference


def _carrier(session: Session, servers: Fleet, stack: ExitStack) -> sync.Carrier | None:
    """What `rollout.sync` asks for, closed with the stack."""
    rollout = session.settings.rollout
    if rollout.sync == "tensors":
        return sync.OverHttp(servers.urls, servers.sizes)
    if rollout.sync == "group":
        group = OverGroup(servers.urls, servers.sizes, rollout.sync_host, session.device.device)
        return stack.enter_context(closing(group))
    return None
