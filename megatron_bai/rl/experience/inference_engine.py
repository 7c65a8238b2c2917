"""The inference engine as the trainer uses it: start the servers, sample from them, sync weights to them."""

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
from megatron_bai.rewards import score_samples
from megatron_bai.rl.batches.token_batch import padded_length
from megatron_bai.rl.experience.memory_sync import MemorySync
from megatron_bai.rl.experience.sample_hooks import make_sample_hooks
from megatron_bai.rl.session import Session
from megatron_bai.rollout.client import RolloutClient, SampleRequest
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample, lost_sample
from megatron_bai.rollout.servers import fleet, weight_sync
from megatron_bai.rollout.servers.fleet import FleetInfo, ServerFleet
from megatron_bai.rollout.servers.quantize import fake_quantize
from megatron_bai.routing.layout import ServedColumns

_PROBES = 4  # held-out prompts whose log-probabilities verify that new weights arrived
_LENGTHENED = 4  # tokens of a probe made of a prompt of one token


class InferenceEngine:
    """The servers of a run: rank 0 sends them weights, each replica's leader is a client.

    Attributes:
        version: of the weights in use, counted in syncs from 0; before the first sync, of the weights before it.
        sync_gap: |mean log-probability of the probe under a server − under the trainer|, nats, after the last sync; the
            largest of the servers'.
        untested: releases of the servers that are not in the table: their rows must be verified before they are used.
    """

    def __init__(self, session: Session, servers: FleetInfo, version: int, server_fleet: ServerFleet | None = None):
        """Make a client of the servers; nothing is sent.

        Args:
            session: of the run.
            servers: addresses and layouts.
            version: of the weights before the first sync.
            server_fleet: restarts the same servers, on rank 0.
        """
        settings = session.settings
        self._session, self._servers, self._fleet = session, servers, server_fleet
        self._has_pushed = False
        self._have_previous = False  # all servers got every tensor of the last sync from this process
        self._disk_version = version + 1  # the checkpoint below run.dir that a server can be started from
        self._client = self._make_client(servers.sampling_urls, session.dp_rank)
        self._shapes = hf_checkpoint.hf_shapes(session.actor.modules, session.actor.architecture)
        self._memory = MemorySync(session, servers, self._shapes)
        probes = min(_PROBES, session.task.eval_size)
        self._probe = make_probe([prompt.ids for prompt in session.task.prompts("eval", settings.run.seed, 0, probes)])
        self.version = version
        self.untested = servers.untested
        self.sync_gap = float("nan")

    def _make_client(self, urls: list[str], first: int = 0) -> RolloutClient:
        session, settings, limit = self._session, self._session.settings, None
        if settings.replay.weights == "server":
            limit = session.actor.transformer_config.moe_router_topk_scaling_factor or 1.0
        served = ServedColumns(*session.actor.architecture.family.route_columns(session.actor.architecture))
        route_format, model = RouteFormat(session.signature, served, limit), settings.model
        return RolloutClient(
            urls, settings.rollout, route_format, model.vocab_size, model.max_position_embeddings, first
        )

    def sample(
        self,
        prompts: list[Prompt],
        group_size: int,
        seed: int | str,
        first: int = 0,
        temperature: float | None = None,
    ) -> list[Sample]:
        """Sample responses to this replica's prompts, with rewards, on every rank of the replica. Collective.

        A failed request is retried once failed servers are recovered; its sample is `lost` if none had failed.

        Args:
            prompts: of this replica.
            group_size: samples of a prompt.
            seed: as in `RolloutClient.generate`.
            first: likewise.
            temperature: likewise.

        Returns:
            Samples in groups, in the order of the prompts, each with the routes of the rank's own layers.

        Raises:
            UserError: a server failed too often, or aborted a sample.
        """
        session = self._session
        results: list[Sample | UserError] = []
        max_failures = self.max_failures(len(prompts) * group_size)
        while True:
            if session.is_replica_leader:
                end, version = session.task.end_tokens, str(self.version)
                arguments = ([prompt.ids for prompt in prompts], group_size, seed, end, first, temperature)
                limits = (version, max_failures, results)
                results = self._client.generate(*arguments, *limits, *make_sample_hooks(session, prompts))
                self._refuse_aborted(results)
            failures = [result for result in results if isinstance(result, UserError)]
            if not self.any_failed(failures) or not self.recover(failures, max_failures):
                break
        samples = [
            lost_sample(i // group_size, prompts[i // group_size].ids, session.signature, str(result))
            if isinstance(result, UserError)
            else result
            for i, result in enumerate(results)
        ]
        return session.send_to_replica(self.add_rewards(prompts, samples) if session.is_replica_leader else None)

    def add_rewards(self, prompts: list[Prompt], samples: list[Sample]) -> list[Sample]:
        """Return the samples with rewards, those that were not rewarded as they ended. Called on leaders.

        Args:
            prompts: indexed by `Sample.prompt_index`.
            samples: of this replica, in any order, which the result keeps; those with a reward or a failure and lost
                ones are returned unchanged.
        """
        assert self._session.scorer
        return score_samples(self._session.scorer, self._session.task, prompts, samples)

    def sample_partial(
        self, wanted: list[SampleRequest], max_failures: int, prompts: list[Prompt] | None = None, tokens: int = 0
    ) -> list[Sample | UserError]:
        """Sample a few more tokens each; what is then complete has a reward, or gets it by `add_rewards`.

        Called on leaders, not collective.

        Args:
            wanted: samples to start or to continue.
            max_failures: how many may fail.
            prompts: indexed by `SampleRequest.prompt_index`; None: no turn is replied to, and nothing is rewarded.
            tokens: the most new tokens of each; 0: `rollout.partial_tokens`.

        Returns:
            A sample or, where its request failed, the reason, for each of `wanted`.

        Raises:
            UserError: a server aborted a sample.
        """
        session = self._session
        end, budget = session.task.end_tokens, tokens or session.settings.rollout.partial_tokens
        limits = (budget, str(self.version), max_failures)
        results = self._client.sample(wanted, end, None, *limits, *make_sample_hooks(session, prompts))
        self._refuse_aborted(results)
        return results

    def _refuse_aborted(self, results: list[Sample | UserError]) -> None:
        """Raise a UserError if a server aborted a sample."""
        if any(isinstance(result, Sample) and result.finish == "abort" for result in results):
            urls = ", ".join(self._servers.sampling_urls)
            raise UserError(f"{urls} aborted a rollout: somebody else controls the server; run your own")

    def max_failures(self, num_samples: int) -> int:
        """Return how many of a replica's samples may be lost."""
        return int(self._session.settings.rollout.max_failed_fraction * num_samples)

    def any_failed(self, failures: list[UserError]) -> bool:
        """Return whether samples of any replica failed. Collective.

        Args:
            failures: of this replica's, on its leader.
        """
        return any(current_ranks().run_on_all(lambda: bool(failures)))

    def recover(self, failures: list[UserError], max_failures: int) -> bool:
        """Restart failed servers, with the weights in use, which the actor must still have. Collective.

        Args:
            failures: as in `any_failed`.
            max_failures: how many a replica may have if no server had failed.

        Returns:
            Whether servers had failed and were recovered, so that failed requests should be retried.

        Raises:
            UserError: a replica has more failures and no server to recover; or a server failed too often.
        """
        if self._recover_servers():
            self._push_weights(again=True)
            return True
        current_ranks().run_on_all(lambda: self._require_few_failures(failures, max_failures))
        return False

    def _require_few_failures(self, failures: list[UserError], max_failures: int) -> None:
        """Raise a UserError unless the failures are at most `max_failures`."""
        if len(failures) > max_failures:
            bound = self._session.settings.rollout.max_failed_fraction
            raise UserError(
                f"{len(failures)} samples of a replica failed, more than rollout.max_failed_fraction={bound:g} allows; "
                f"first: {failures[0]}"
            )

    def _recover_servers(self) -> bool:
        """Restart failed servers on rank 0, and return whether there were any. Collective."""
        checkpoint, version = _weights_dir(self._session, self._disk_version), str(self.version)

        def revive() -> list[str]:
            assert self._fleet
            return self._fleet.recover(checkpoint, version)

        if not current_ranks().run_on_first(revive):
            return False
        self.close()  # restarted servers are no members of the process groups that weights are sent through
        return True

    def sync(self) -> None:
        """Send the actor's weights to the servers as the next version, and check that they use them. Collective.

        Raises:
            UserError: a server refused, or its log-probabilities are not those of the new weights.
        """
        if self._has_pushed:  # the first sync is to servers that were started or connected to just before
            self._recover_servers()
        if self._session.is_rank_0:
            assert self._fleet
            self._fleet.reset_restarts()
        self.version += 1
        self._push_weights()

    def _push_weights(self, again: bool = False) -> None:
        """Send the actor's weights, as `version`, to all servers. Collective.

        Args:
            again: `version` is not new: the actor still has its weights, and so has the disk if they are sent as files.
        """
        session = self._session
        if session.settings.rollout.sync == "disk":
            self._through_files(export=not again)
        else:
            self._memory.send(str(self.version), self._have_previous and not again)
        dist.barrier()
        self._check_probe()
        self._has_pushed = self._have_previous = True

    def _through_files(self, export: bool) -> None:
        """Have the servers read the weights from disk. Collective."""
        session = self._session
        directory = _export_weights(session, self.version) if export else _weights_dir(session, self.version)
        if session.is_rank_0:
            weight_sync.sync_from_disk(self._servers.urls, directory, str(self.version), self._shapes)
            if self._disk_version != self.version:
                rmtree(_weights_dir(session, self._disk_version), ignore_errors=True)
        self._disk_version = self.version

    def close(self) -> None:
        """Leave the process groups shared with the servers, where there are any. The next sync sends everything."""
        self._memory.close()
        self._have_previous = False

    def _check_probe(self) -> None:
        """Compare a probe's log-probabilities between trainer and servers. Collective.

        Raises:
            UserError: they differ by more than `rollout.sync_tolerance`.
        """
        session = self._session
        length = padded_length(max(map(len, self._probe)), session.engine.place.multiple)
        tokens = torch.zeros(len(self._probe), length, dtype=torch.int64)
        mask = torch.zeros(len(self._probe), length, dtype=torch.bool)
        for row, ids in enumerate(self._probe):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids) - 1] = True
        logprobs = session.engine.score_probe(tokens)
        mean = torch.zeros(1, dtype=torch.float64)
        if logprobs is not None and session.reports_stats and session.dp_rank == 0:
            mean[0] = logprobs.cpu()[mask].double().mean()
        mean = mean.to(session.device.device)
        dist.all_reduce(mean)  # one rank holds the value, the others zero
        gap = [0.0]
        if session.is_rank_0:
            scores = [self._make_client([url]).score(self._probe) for url in self._servers.urls]
            means = [float(np.concatenate(score).astype(np.float64).mean()) for score in scores]
            gap[0] = max(abs(float(mean) - server_mean) for server_mean in means)
        dist.broadcast_object_list(gap, src=0)
        self.sync_gap = gap[0]
        if not mean.isfinite():
            raise UserError(
                f"before weight sync {self.version} the training engine's log-probabilities of the probe are "
                f"{float(mean)}: the weights are of no use; continue from the last checkpoint, or from another start"
            )
        tolerance = session.settings.rollout.sync_tolerance
        if not self.sync_gap <= tolerance:
            raise UserError(
                f"after weight sync {self.version} a server's log-probabilities of the probe are {self.sync_gap:.3g} "
                f"nats off, more than rollout.sync_tolerance ({tolerance:g}): it does not use the new weights"
            )


def make_probe(prompts: list[list[int]]) -> list[list[int]]:
    """Return sequences of at least two tokens, so that each has a token that the model predicts.

    Args:
        prompts: token ids of each. One of a single token is followed by all prompts' tokens, over and over.
    """
    tokens = [token for ids in prompts for token in ids]
    return [ids if len(ids) > 1 else (ids + tokens * _LENGTHENED)[:_LENGTHENED] for ids in prompts]


def _weights_dir(session: Session, version: int) -> Path:
    """Return the directory of exported weights."""
    return Path(session.settings.run.dir) / "weights" / str(version)


def _export_weights(session: Session, version: int) -> Path:
    """Export the actor's weights in the format of Hugging Face. Collective."""
    directory = _weights_dir(session, version)
    change = partial(fake_quantize, fmt=session.settings.rollout.quantize)
    info = {"version": version}
    hf_checkpoint.save_hf(
        session.actor.modules, session.actor.architecture, directory, session.tokenizer_dir, info, change, True
    )
    return directory


@contextmanager
def start_inference(session: Session, version: int = 0) -> Iterator[InferenceEngine]:
    """Start servers, or connect to running ones, and sync the actor's weights to them. Collective.

    However the block ends or fails to begin, servers that were started here are stopped and exported weights removed.

    Args:
        session: of the run.
        version: of the actor's weights.

    Yields:
        The inference engine.

    Raises:
        UserError: a server did not start, or one that runs already cannot be used.
    """
    settings = session.settings
    with ExitStack() as stack:
        if session.is_rank_0:
            # What was sent the servers have; a run's result is `trainer.save`. What a killed run left goes first.
            weights = _weights_dir(session, version).parent
            rmtree(weights, ignore_errors=True)
            stack.callback(rmtree, weights, ignore_errors=True)
        directory = None if settings.rollout.urls else _export_weights(session, version)
        server_fleet: ServerFleet | None = None
        info: list[Any] = [None]
        if session.is_rank_0:
            server_fleet = (
                fleet.connect_servers(settings.rollout)
                if directory is None
                else stack.enter_context(
                    fleet.start_servers(
                        directory,
                        settings.rollout,
                        Path(settings.run.dir),
                        session.device.kind,
                        settings.replay.weights == "server",
                    )
                )
            )
            info[0] = server_fleet.fleet
        dist.broadcast_object_list(info, src=0)
        inference = InferenceEngine(session, info[0], version - 1, server_fleet)
        stack.callback(inference.close)
        inference.sync()
        yield inference
