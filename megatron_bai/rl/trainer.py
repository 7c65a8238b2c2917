"""The reinforcement-learning loop: roll out, score, update, sync, record."""

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model import megatron_checkpoint
from megatron_bai.model.build import MegatronModel
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.run_monitor import Monitor, required_action
from megatron_bai.monitor.metrics import router_metrics as router
from megatron_bai.monitor.metrics.response_metrics import compute_response_metrics
from megatron_bai.monitor.report.headline import describe_discrepancy
from megatron_bai.monitor.report.report import write_report
from megatron_bai.monitor.report.run_data import load_run
from megatron_bai.monitor.run_log import RunLog
from megatron_bai.monitor.stats import Stats
from megatron_bai.monitor.step_timer import StepTimer
from megatron_bai.monitor.summary import Summary, read_summary
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.micro_batches import MiniBatches, make_mini_batches, split_alike
from megatron_bai.rl.batches.stages import (
    RolloutBatch,
    ScoredBatch,
    TrainingBatch,
    make_scored_batch,
    make_training_batch,
)
from megatron_bai.rl.checkpointing import ResumePoint, RunCheckpoints, Stateful, open_run, result_paths
from megatron_bai.rl.experience.collector import Collector
from megatron_bai.rl.experience.evaluation import evaluate
from megatron_bai.rl.experience.inference_engine import InferenceEngine, start_inference
from megatron_bai.rl.experience.route_recorder import RouteRecorder, open_route_recorder
from megatron_bai.rl.experience.sample_recorder import SampleRecorder
from megatron_bai.rl.experience.server_probe import verify_engines
from megatron_bai.rl.experience.staleness import PreviousWeights, add_discrepancies
from megatron_bai.rl.merge_routing import measure_merge_routing
from megatron_bai.rl.objectives.objective import policy_settings
from megatron_bai.rl.policy.exactness import require_exact
from megatron_bai.rl.policy.lr_schedule import set_learning_rate
from megatron_bai.rl.policy.route_prediction import RoutePrediction
from megatron_bai.rl.policy.router_shift import RouterShift
from megatron_bai.rl.policy.training_engine import Scores
from megatron_bai.rl.policy.weight_copy import WeightCopy
from megatron_bai.rl.session import Session, open_session
from megatron_bai.rl.signals import SignalActions, handle_signals
from megatron_bai.routing.replay.replay_pass import MicroRoutes

_log = logging.getLogger(__name__)

_PRINTED_METRICS = (
    "reward_mean",
    "eval_accuracy",
    "response_length_mean",
    "kl_k3",
    "kl_k3_live",
    "grad_norm",
    "seconds_step",
)


def train(settings: config.Config) -> None:
    """Run `trainer.steps` global steps and write the report. Collective.

    Raises:
        UserError: anything that stops the run, in one line.
    """
    with open_session(settings) as session, open_run(session) as start:
        if not start.is_finished:
            _run_training(session, start)
        elif session.is_rank_0:
            print(f"{settings.run.dir} is complete: nothing to do")  # noqa: T201, the verb's result


def _run_training(session: Session, start: ResumePoint) -> None:
    """Run the remaining steps, save the models and write the report. Collective."""
    settings, directory = session.settings, Path(session.settings.run.dir)
    measured = {} if start.checkpoint else measure_merge_routing(session)
    # A copy of the weights that the run started from: the checkpoint's are loaded next.
    reference = WeightCopy(session.actor) if policy_settings(settings.objective).kl_penalty else None
    models = {"actor": session.actor} | ({"critic": session.critic.model} if session.critic else {})
    start.load_models(models)
    with RunLog(directory, settings, settings.trainer.steps, session.is_rank_0, start.step) as progress:
        resumed = [*read_summary(directory).get("resumed", []), start.step] if start.checkpoint else []
        summary = Summary(settings, dist.get_world_size(), progress.records, resumed)
        version = start.version
        if start.step < settings.trainer.steps:
            version = _run_steps(session, start, models, reference, progress, summary, measured)
    info = {"steps": settings.trainer.steps, "version": version}
    for name, path in result_paths(settings).items():
        megatron_checkpoint.save(models[name], path, session.tokenizer_dir, info)
    if session.is_rank_0:
        summary.write(directory, complete=True)
        write_report([directory], directory / "report.html")
        if text := describe_discrepancy(load_run(directory, settings.run.name, "")):
            print(text)  # noqa: T201, the verb's result
        print(f"wrote {directory / 'report.html'}")  # noqa: T201, the verb's result


def _run_steps(
    session: Session,
    start: ResumePoint,
    models: dict[str, MegatronModel],
    reference: WeightCopy | None,
    progress: RunLog,
    summary: Summary,
    measured: Mapping[str, float] = MappingProxyType({}),
) -> int:
    """Run the remaining steps and return the version of the weights. Collective. `measured` are the first's, too."""
    progress.show_phase(start.step + 1, "server_start")
    with (
        open_route_recorder(session, start.step, start.same_store) as route_recorder,
        start_inference(session, start.version) as inference,
    ):
        loop = TrainingLoop(session, inference, route_recorder, reference, progress.show_phase)
        verify_engines(loop.collector, loop.stages)
        start.load_states(loop.stateful)
        with (
            RunCheckpoints(session, models, loop.stateful) as checkpoints,
            handle_signals(session.settings.trainer.grace_s) as requests,
        ):
            for step in range(start.step, session.settings.trainer.steps):
                values = loop.step(step) | (dict(measured) if step == start.step else {})
                progress.log_step(values, _PRINTED_METRICS, loop.sample_recorder.take())
                if session.is_rank_0:
                    summary.add_step(values)
                    summary.write(session.settings.run.dir, complete=False)
                _act_on_requests(values, requests.agree(session.device.device), checkpoints, inference.version)
        return inference.version


def _act_on_requests(
    values: dict[str, Any], requested: SignalActions, checkpoints: RunCheckpoints, version: int
) -> None:
    """Save if it is due, or if an alarm or a signal requests it; then end the run if one requests that. Collective.

    Raises:
        UserError: an alarm stops the run; the step's checkpoint is written.
        SystemExit: a signal stops it, likewise.
    """
    step, action = values["step"], required_action(values)
    checkpoints.save_if_due(step, version, requested.save or action != "warn")
    if action == "stop":
        checkpoints.wait()
        raise UserError(f"stopped by an alarm at step {step}, which is saved: {Alarm(**values['alarms'][0])}")
    if requested.stop:
        checkpoints.wait()
        if dist.get_rank() == 0:
            name = signal.Signals(requested.stop).name
            _log.info("stopped after step %d, as %s asked: the same command goes on from there", step, name)
        raise SystemExit(requested.exit_code)


class TrainingLoop:
    """The global steps of a run.

    Attributes:
        stateful: objects whose state a resumed run needs, by name.
        warmup: steps that train the critic alone.
    """

    def __init__(
        self,
        session: Session,
        inference: InferenceEngine,
        route_recorder: RouteRecorder | None = None,
        reference: WeightCopy | None = None,
        on_phase: Callable[[int, str], None] | None = None,
    ):
        """Build what the steps share.

        Args:
            session: of the run.
            inference: its servers.
            route_recorder: writes the routes of each step; None: they are not written.
            reference: weights of the KL penalty; None without one.
            on_phase: called as each phase of a step, counted from 1, begins.
        """
        from megatron.core import parallel_state

        self.session, self.inference, self.route_recorder = session, inference, route_recorder
        self.sample_recorder, self._on_phase = SampleRecorder(session), on_phase or (lambda step, phase: None)
        self.collector = Collector(session, inference)
        self.settings = settings = session.settings
        self.objective = objectives.get(settings.objective.name)
        penalty = policy_settings(settings.objective).kl_penalty
        assert bool(penalty) == bool(reference), "the penalty and its reference belong together"
        self.reference = reference
        measured = settings.rollout.overlap and settings.rollout.measure_sampled
        self.previous_weights = PreviousWeights(session.engine) if measured else None
        self.router_shift = RouterShift(session.engine, settings.objective)
        self.route_prediction = RoutePrediction(session.engine, settings)
        self.monitor = Monitor(settings.monitor)
        self.stages = parallel_state.get_pipeline_model_parallel_group()
        self.stateful: dict[str, Stateful] = {"collector": self.collector, "monitor": self.monitor}
        if self.route_prediction.is_enabled:
            self.stateful["route_prediction"] = self.route_prediction
        self.warmup = session.critic.settings.critic_warmup if session.critic else 0

    def step(self, step: int) -> dict[str, Any]:
        """Roll out, update N times, sync. Collective.

        Args:
            step: global step, from 0.

        Returns:
            The step's metrics, the same on every rank.
        """
        clock = StepTimer(partial(self._on_phase, step + 1))
        stats, router_stats = Stats(), Stats()  # of this replica; of what this rank's routers saw
        version = self.inference.version
        with clock("rollout"):
            samples, rollouts = self.collector.collect(stats, step + 1 == self.settings.trainer.steps)
        rollouts, rollout_parts = make_mini_batches(rollouts, self.settings, stats, self.session.device.device)
        micro_batches = sum(rollout_parts, [])
        rows_before, expected = self.session.engine.replay.rows, self._expected_replay_rows(step, rollout_parts)
        with clock("old_logprob"), self._recording_routers(step, rollout_parts):
            scored, routes, differing = self._score_old_policy(rollouts, micro_batches, stats, router_stats)
        if self.route_recorder:
            assert routes is not None, "a store belongs to a replay"
            with clock("store"):
                self.route_recorder.record_step(step, version, samples, micro_batches, routes)
        if self.session.critic:
            with clock("values"):
                training = self.session.critic.estimate_advantages(scored, micro_batches, stats)
        else:
            training = make_training_batch(scored)
        with clock("samples"):
            self.sample_recorder.add_train(step + 1, samples, training, micro_batches, differing)
        mini_batches = split_alike(training, rollout_parts)
        update_metrics: dict[str, Any] = {}
        if self.session.critic:
            with clock("update_critic"):
                update_metrics |= self._update_critic(step, mini_batches, stats)
        if step >= self.warmup:
            with clock("update"):
                update_metrics |= self._update(step, mini_batches, routes, stats, router_stats)
        rows = self._sum_over_ranks(
            [self.session.engine.replay.rows - rows_before, expected if self.session.reports_stats else 0]
        )
        self._sync(clock)
        every = self.settings.trainer.eval_every
        if every and ((step + 1) % every == 0 or step == 0):
            with clock("eval"):
                self.sample_recorder.add_eval(step + 1, evaluate(self.session, self.inference, stats))
        values = {
            "step": step + 1,
            "weight_version": version,
            **self._gather_metrics(stats, router_stats),
            "route_coverage": rows[0] / rows[1] if rows[1] else None,
            **update_metrics,
            "sync_gap": self.inference.sync_gap,
            **clock.metrics(self._sum_over_ranks([int(rollouts.routed.sum()) if self.session.reports_stats else 0])[0]),
        }
        if alarms := self.monitor.step(values):  # the same on every rank
            values["alarms"] = [alarm.json() for alarm in alarms]
        return values

    def _sync(self, clock: StepTimer) -> None:
        """Send the weights to the servers once nothing is sampled with the former ones. Collective."""
        if self.settings.rollout.overlap:
            with clock("ahead"):
                self.collector.wait()
        with clock("sync"):
            self.inference.sync()
        if self.settings.rollout.overlap:
            self.collector.finish_next()

    @contextmanager
    def _recording_routers(self, step: int, mini_batches: MiniBatches[RolloutBatch]) -> Iterator[None]:
        """Record what later comparisons with π_old's routers need, if there are any."""
        num_passes = sum(map(len, mini_batches))
        with self.router_shift.record(num_passes), self.route_prediction.record(step, mini_batches):
            yield

    def _gather_metrics(self, stats: Stats, router_stats: Stats) -> dict[str, float]:
        """Gather the step's statistics over the world. Collective."""
        stats, router_stats = stats.gather_sum(self.session.reports_stats), router_stats.gather_sum(True)
        lengths = compute_response_metrics(stats, self.settings.monitor.bucket)
        load = router.compute_load_metrics(router_stats, self.session.signature.num_experts)
        return {**stats.values(), **lengths, **router_stats.values(), **load}

    def _score_old_policy(
        self, rollouts: RolloutBatch, micro_batches: list[RolloutBatch], stats: Stats, router_stats: Stats
    ) -> tuple[ScoredBatch, list[MicroRoutes] | None, list[torch.Tensor]]:
        """Make the scored stage and measure the discrepancy.

        Returns:
            The stage; the routes that the updates replay; where routes differ, as `router.add_route_mismatch` returns
            it, nothing where that is not measured.
        """
        engine, mode = self.session.engine, self.settings.replay.mode
        inference = [engine.local_routes(micro_batch) for micro_batch in micro_batches]
        replayed = engine.score(micro_batches, inference) if mode == "r3" else None
        live_scores: Scores | None = None
        differing: list[torch.Tensor] = []
        if mode != "r3" or self.settings.replay.measure_live:
            live_scores = engine.score(micro_batches, record=True, shift=self.route_prediction.shift)
            differing = router.add_route_mismatch(
                router_stats, inference, live_scores.routes, engine.replay.columns, self.stages
            )
        old = replayed or live_scores
        assert old, "replayed with r3, live with the other modes"
        weighted = None
        if self.settings.replay.weights == "server":
            weighted, gap = engine.score_weights(micro_batches)
            router.add_weight_gap(router_stats, gap)
        previous = None
        if self.previous_weights:
            previous = self.previous_weights.score(micro_batches, inference if mode == "r3" else None)
            self.previous_weights.capture()
        reference, live = None, None if live_scores is None else live_scores.logprobs
        if self.reference:
            with self.reference.swapped_in():  # with its live router: it is one distribution for the whole run
                reference = engine.score(micro_batches).logprobs
        scored = make_scored_batch(rollouts, old.logprobs, previous, reference)
        if old.entropy is not None:
            add_discrepancies(stats, scored, live, weighted)
            stats.mean("entropy", old.entropy.cpu()[scored.usable_mask])
        if self.settings.rollout.exact:
            require_exact(scored, live)
        routes = inference if mode == "r3" else old.routes
        router.add_expert_load(router_stats, routes, engine.replay.columns)
        return scored, None if mode == "none" else routes, differing

    def _update(
        self,
        step: int,
        mini_batches: MiniBatches[TrainingBatch],
        routes: list[MicroRoutes] | None,
        stats: Stats,
        router_stats: Stats,
    ) -> dict[str, float]:
        """Make an optimizer step on each mini-batch, with the routes of its micro-batches. Collective."""
        trainer, engine = self.settings.trainer, self.session.engine
        norms, rate, first = [], 0.0, (step - self.warmup) * trainer.mini_batches
        updates = (trainer.steps - self.warmup) * trainer.mini_batches
        remaining, num_done = iter(routes or ()), 0
        for update, micro_batches in enumerate(mini_batches, start=first):
            rate = set_learning_rate(self.session.actor.optimizer, trainer, update, updates)
            mini_batch_routes = routes and list(islice(remaining, len(micro_batches)))
            if num_done:  # before the step's first update nothing has moved
                micro_batches = self.router_shift.measure(micro_batches, mini_batch_routes, num_done)
            num_done += len(micro_batches)
            with self.route_prediction.learn(update - first, rate, router_stats):
                update_stats, norm = engine.update(
                    micro_batches, mini_batch_routes, self.objective, self.settings.objective
                )
            stats.add(update_stats)
            norms.append(norm)
        return {"grad_norm": float(np.mean(norms)), "learning_rate": rate}

    def _update_critic(self, step: int, mini_batches: MiniBatches[TrainingBatch], stats: Stats) -> dict[str, float]:
        """Make the critic's optimizer steps, on the same mini-batches. Collective."""
        assert self.session.critic
        update_stats, norms, rate = self.session.critic.update(mini_batches, step * self.settings.trainer.mini_batches)
        stats.add(update_stats)
        return {"critic_grad_norm": float(np.mean(norms)), "critic_learning_rate": rate}

    def _expected_replay_rows(self, step: int, mini_batches: MiniBatches[RolloutBatch]) -> int:
        """Return the (token, layer) rows to be replayed for this replica in the step; called before it scores."""
        updates = step >= self.warmup
        scorings = 2 if self.previous_weights and self.previous_weights.available else 1
        scorings += self.settings.replay.weights == "server"
        per_layer = 0
        for index, micro_batches in enumerate(mini_batches):
            rows = sum(int(micro_batch.routed.sum()) for micro_batch in micro_batches)
            missing = sum(int(micro_batch.missing.sum()) for micro_batch in micro_batches)
            passes = updates * (2 if self.router_shift.is_enabled and index else 1)
            # R2 replays the trainer's own routes: none is missing
            by_mode = {"none": 0, "r2": passes * (rows + missing), "r3": (scorings + passes) * rows}
            per_layer += by_mode[self.settings.replay.mode]
        return per_layer * self.session.signature.moe_layers

    def _sum_over_ranks(self, values: list[int]) -> list[int]:
        """Sum over the world. Collective."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self.session.device.device)
        dist.all_reduce(tensor)
        return tensor.tolist()
