"""The reinforcement-learning loop: roll out, score, update, sync, record."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model import build, checkpoint
from megatron_bai.monitor.clock import Clock
from megatron_bai.monitor.discrepancy import add_kl
from megatron_bai.monitor.progress import Progress
from megatron_bai.monitor.report import write_report
from megatron_bai.monitor.stats import Stats
from megatron_bai.monitor.summary import Summary
from megatron_bai.rl import objectives
from megatron_bai.rl.batch import Batch
from megatron_bai.rl.collect import Collector
from megatron_bai.rl.evaluate import evaluate
from megatron_bai.rl.inference import Inference, serve
from megatron_bai.rl.keep import RouteKeeper, keep_routes
from megatron_bai.rl.packing import Cut, cut
from megatron_bai.rl.reference import Reference
from megatron_bai.rl.schedule import set_learning_rate
from megatron_bai.rl.session import Session, open_session
from megatron_bai.routing.queues import MicroRoutes, differing

_SHOWN = ("reward_mean", "eval_accuracy", "response_length_mean", "kl_k3", "kl_k3_live", "grad_norm", "seconds_step")


def train(settings: config.Config) -> None:
    """Run `trainer.steps` global steps and write the report. Collective.

    Raises:
        UserError: anything that stops the run, in one line.
    """
    with open_session(settings) as session, keep_routes(_checked(session)) as keeper, serve(session) as inference:
        loop = Loop(session, inference, keeper)
        summary = Summary(settings, dist.get_world_size())
        steps = settings.trainer.steps
        with Progress(settings.run.dir, settings, steps, active=session.lead) as progress:
            for step in range(steps):
                values = loop.step(step)
                progress.step(values, _SHOWN)
                if session.lead:
                    summary.step(values)
                    summary.write(settings.run.dir, complete=step + 1 == steps)
        if settings.trainer.save:
            info = {"steps": steps, "version": inference.version}
            checkpoint.save(session.actor, settings.trainer.save, session.tokenizer_dir, info)
    if session.lead:
        output = Path(settings.run.dir) / "report.html"
        write_report([Path(settings.run.dir)], output)
        print(f"wrote {output}")


def _checked(session: Session) -> Session:
    """Refuse batches that do not divide evenly, before a server is started.

    Raises:
        UserError: names the settings.
    """
    trainer = session.settings.trainer
    parts = session.data_size * trainer.mini_batches
    if trainer.prompts_per_step % parts:
        raise UserError(
            f"trainer.prompts_per_step ({trainer.prompts_per_step}) is not a multiple of trainer.mini_batches × "
            f"data-parallel ranks ({trainer.mini_batches} × {session.data_size})"
        )
    if trainer.tokens_per_micro_batch:
        return session  # as many micro-batches as it takes
    samples = trainer.prompts_per_step // parts * trainer.group_size
    if samples % trainer.micro_batch_size:
        raise UserError(
            f"trainer.micro_batch_size ({trainer.micro_batch_size}) does not divide the {samples} samples of a rank's "
            "mini-batch"
        )
    build.validate_micro_batches(session.settings.parallel, samples // trainer.micro_batch_size)
    return session


class Loop:
    """One global step after another."""

    def __init__(self, session: Session, inference: Inference, keeper: RouteKeeper | None = None):
        self.session, self.inference, self.keeper = session, inference, keeper
        self.collector = Collector(session, inference)
        self.settings = settings = session.settings
        self.objective = objectives.get(settings.objective.name)
        self.reference = Reference(session.actor) if settings.objective.kl_penalty else None

    def step(self, step: int) -> dict[str, Any]:
        """Roll out, update N times, sync. Returns the step's metrics, the same on every rank. Collective."""
        clock = Clock()
        stats = Stats()
        version = self.inference.version
        with clock("rollout"):
            samples, batch = self.collector.collect(stats)
        batch, minis = cut(batch, self.settings, stats)
        micros = sum(minis, [])
        rows_before = self.session.engine.replay.rows
        with clock("old_logprob"):
            routes = self._score_old(batch, micros, stats)
        if self.keeper:
            with clock("store"):
                self.keeper.keep(step, version, samples, micros, routes)
        with clock("update"):
            norms, rate = self._update(step, batch, minis, routes, stats)
        expected = self._rows_expected(batch)
        rows = self._sum([self.session.engine.replay.rows - rows_before, expected if self.session.contributes else 0])
        with clock("sync"):
            self.inference.sync()
        every = self.settings.trainer.eval_every
        if every and ((step + 1) % every == 0 or step == 0):
            with clock("eval"):
                evaluate(self.session, self.inference, stats)
        values = stats.gathered(self.session.contributes).values()
        return {
            "step": step + 1,
            "weight_version": version,
            **values,
            "route_coverage": rows[0] / rows[1] if rows[1] else None,
            "grad_norm": float(np.mean(norms)),
            "learning_rate": rate,
            "sync_gap": self.inference.sync_gap,
            **clock.report(self._sum([int(batch.routed.sum()) if self.session.contributes else 0])[0]),
        }

    def _score_old(self, batch: Batch, micros: list[Batch], stats: Stats) -> list[MicroRoutes] | None:
        """Fill `old_logprobs`, measure the discrepancy, and return the routes the updates replay."""
        engine, mode = self.session.engine, self.settings.replay.mode
        inference = [engine.routes_of(micro) for micro in micros]
        replayed = engine.score(micros, inference) if mode == "r3" else None
        live = None
        if mode != "r3" or self.settings.replay.measure_live:
            live = engine.score(micros, record=True)
            self._compare_routes(inference, live.recorded, stats)
        old = replayed or live
        if engine.last_stage:
            batch.old_logprobs.copy_(old.logprobs)
            add_kl(stats, "", batch.old_logprobs, batch.infer_logprobs, batch.mask)
            if live is not None:
                add_kl(stats, "_live", live.logprobs.cpu(), batch.infer_logprobs, batch.mask)
            stats.mean("entropy", old.entropy.cpu()[batch.mask])
        if self.reference:
            with self.reference():  # its own router decides: the reference is one distribution for the whole run
                reference = engine.score(micros).logprobs
            if engine.last_stage:
                batch.reference_logprobs.copy_(reference)
        return {"none": None, "r2": live and live.recorded, "r3": inference}[mode]

    def _compare_routes(self, theirs: list[MicroRoutes], ours: list[MicroRoutes], stats: Stats) -> None:
        """Add `route_mismatch`: the share of (token, layer) routes that the live router chose differently.

        Each rank sees its tokens and layers only, so the counts are summed over the world first; one rank keeps them.
        """
        different = total = 0
        for inference, live in zip(theirs, ours):
            rows = differing(live.ids, inference.ids)[inference.counted]
            different, total = different + int(rows.sum()), total + rows.numel()
        sums = self._sum([different, total])
        if self.session.contributes:
            stats.ratio("route_mismatch", sums[0], sums[1])

    def _update(
        self, step: int, batch: Batch, minis: Cut, routes: list[MicroRoutes] | None, stats: Stats
    ) -> tuple[list[float], float]:
        """N optimizer steps on consecutive mini-batches, each with the routes of its micro-batches."""
        trainer, engine = self.settings.trainer, self.session.engine
        batch.leave_out()
        norms, rate = [], 0.0
        remaining = iter(routes or ())
        for number, micros in enumerate(minis):
            rate = set_learning_rate(self.session.actor.optimizer, trainer, step * trainer.mini_batches + number)
            own = routes and list(islice(remaining, len(micros)))
            found, norm = engine.update(micros, own, self.objective, self.settings.objective)
            stats.add(found)
            norms.append(norm)
        return norms, rate

    def _rows_expected(self, batch: Batch) -> int:
        """(token, layer) rows that should have been replayed for this replica in the step."""
        rows = int(batch.routed.sum())
        fed = rows + int(batch.missing.sum())  # R2 replays the trainer's own routes, which lack none
        return {"none": 0, "r2": fed, "r3": 2 * rows}[self.settings.replay.mode] * self.session.signature.moe_layers

    def _sum(self, values: list[int]) -> list[int]:
        """Sums over the world. Collective."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self.session.device.device)
        dist.all_reduce(tensor)
        return tensor.tolist()
