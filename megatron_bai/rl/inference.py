"""The trainer's view of the inference engine: start it, sample from it, give it new weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.server import SGLangServer
from megatron_bai.rollout.sync import Shapes, sync_from_disk

_PROBES = 4  # held-out prompts whose log-probabilities prove that new weights arrived


class Inference:
    """One server for the whole run: rank 0 supervises it, each replica's leader is a client.

    Attributes:
        version: of the weights in use, counted in syncs from 0; when made, of those before the first sync.
        sync_gap: |mean log-probability of the probe under the server − under the trainer|, nats, after the last sync.
    """

    def __init__(self, session: Session, url: str, shapes: Shapes, version: int):
        settings = session.settings
        self._session, self._url, self._shapes = session, url, shapes
        self._client = RolloutClient(
            url, settings.rollout, session.signature, settings.model.vocab_size, settings.model.max_position_embeddings
        )
        probes = min(_PROBES, session.task.eval_size)
        self._probe = [prompt.ids for prompt in session.task.prompts("eval", settings.run.seed, 0, probes)]
        self.version = version
        self.sync_gap = float("nan")

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
            for sample in samples:
                if sample.finish == "abort":
                    raise UserError(f"{self._url} aborted a rollout: somebody else controls the server; run your own")
                if wrong := {span.version for span in sample.spans} - {str(self.version)}:
                    raise UserError(f"{self._url} sampled with weights {sorted(wrong)}, the trainer is at {self.version}")
            samples = rewarded(session.scorer, session.task, prompts, samples)
        return session.deliver(samples)

    def sync(self) -> None:
        """Give the server the actor's weights as the next version, and prove that it uses them. Collective.

        Raises:
            UserError: the server refused, or its log-probabilities are not those of the new weights.
        """
        session, self.version = self._session, self.version + 1
        directory = _export(session, self.version)
        if session.lead:
            sync_from_disk(self._url, directory, str(self.version), self._shapes)
            if self.version:
                rmtree(_weights(session, self.version - 1), ignore_errors=True)
        dist.barrier()
        self._prove()

    def _prove(self) -> None:
        """Compare a probe's log-probabilities. Every rank scores it; rank 0 asks the server."""
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
            theirs = np.concatenate(self._client.score(self._probe))
            gap[0] = abs(float(mean) - float(theirs.astype(np.float64).mean()))
        dist.broadcast_object_list(gap, src=0)
        self.sync_gap = gap[0]
        tolerance = session.settings.rollout.sync_tolerance
        if not self.sync_gap <= tolerance:
            raise UserError(
                f"after weight sync {self.version} the server's log-probabilities of the probe are {self.sync_gap:.3g} "
                f"nats off, more than rollout.sync_tolerance ({tolerance:g}): it does not use the new weights"
            )


def _weights(session: Session, version: int) -> Path:
    return Path(session.settings.run.dir) / "weights" / str(version)


def _export(session: Session, version: int) -> Path:
    directory = _weights(session, version)
    hf.export_hf(session.actor.modules, session.settings.model, directory, session.tokenizer_dir, {"version": version})
    return directory


@contextmanager
def serve(session: Session, version: int = 0) -> Iterator[Inference]:
    """Start the server on the actor's weights; stop it however the block ends. Collective.

    Args:
        version: of these weights.

    Raises:
        UserError: the server did not start.
    """
    settings = session.settings
    directory = _export(session, version)
    with ExitStack() as stack:
        found = ["", {}]
        if session.lead:
            log = Path(settings.run.dir) / "server.log"
            server = SGLangServer(directory, settings.rollout, log, session.device.kind)
            found = [stack.enter_context(server).url, server.tensors]
        dist.broadcast_object_list(found, src=0)
        if session.lead:  # what was sent is the server's now; a run's result is `trainer.save`
            stack.callback(rmtree, directory.parent, ignore_errors=True)
        inference = Inference(session, found[0], found[1], version - 1)
        inference.sync()
        yield inference
