"""`python replicas_worker.py DIRECTORY`: collects and evaluates with 1, 2 and 4 replicas; a file of facts for each.

Replicas are processes with real collectives. The inference engine is a function of a prompt's number in the stream,
which no server can be asked for: rewards must be known.
"""

import json
import sys
import threading
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from processes import fork_ranks

from megatron_bai import config
from megatron_bai.data.arithmetic_task import ArithmeticTask
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.advantages import GroupRewards
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
from megatron_bai.rl.experience.collector import Collector
from megatron_bai.rl.experience.evaluation import evaluate
from megatron_bai.rl.experience.sample_recorder import SampleRecorder
from megatron_bai.rollout.client import SampleRequest, sampling_seed
from megatron_bai.rollout.sample import PARTIAL, Sample, lost_sample
from megatron_bai.routing.layout import Place
from megatron_bai.routing.routes import RouteSignature, VersionSpan

PROMPTS, SIZE, STEPS = 8, 4, 3
GO, LONGEST = 3, 12  # tokens, of partial rollouts
LATER = 6  # steps of them
FAILING = (2, 4)  # versions whose first round has requests that fail


def rewards_of(number: int) -> list[float | None]:
    """Of the members of the group of a prompt: two groups in three are uniform, some have failures."""
    if number % 3:
        return [float(number % 2)] * SIZE
    if number % 4 == 0:
        return [None, 1.0, 0.0, None]
    if number % 5 == 0:
        return [None, None, None, 1.0]  # nothing to compare it with
    return [1.0, 0.0, 0.0, float(number % 2)]


class FakeInference:
    """Stands for the server."""

    def __init__(self, mode: str = ""):
        self.mode, self.asked = mode, []
        self.tokenizer: Any = None  # with one, every second prompt of the stream is answered rightly

    def sample(
        self, prompts: Any, size: int, seed: str, first: int = 0, temperature: float | None = None
    ) -> list[Sample]:
        samples = []
        for index in range(len(prompts)):
            self.asked.append([first + index, sampling_seed(seed, first + index, 0), prompts[index].text, temperature])
            for member, reward in enumerate(np.resize(rewards_of(first + index), size).tolist()):
                reward = {"": reward, "lost": reward, "fail": None, "uniform": 1.0}[self.mode]
                body = [5 + member]
                if self.tokenizer and (first + index) % 2:
                    body = self.tokenizer.encode(f"answer:{prompts[index].answer}")
                prompt, response = prompts[index].ids, [*body, 1]
                tokens, logprobs = np.array([*prompt, *response]), np.zeros(len(response), np.float32)
                of = dict(prompt_index=index, tokens=tokens, prompt_length=len(prompt), logprobs=logprobs)
                sample = Sample(routes=np.zeros((len(tokens) - 1, 1, 1), np.uint8), spans=(), finish="stop", **of)
                sample = replace(sample, reward=reward, failure="" if reward is not None else "broken")
                if self.mode == "lost" and reward is None:
                    sample = lost_sample(index, prompts[index].ids, RouteSignature(1, 2, 1), "no server")
                samples.append(sample)
        return samples


@cache
def tokenizer() -> Any:
    return build_tokenizer(config.Arithmetic(), 64)


class Parts(FakeInference):
    """Samples in parts: a token is a function of seed, place and version, the length of the seed."""

    def __init__(self, rollout: dict[str, Any], version: int = 0, fault: str = ""):
        super().__init__()
        self.budget, self.fault, self.failing = rollout.get("partial_tokens", LONGEST), fault, set(fault and FAILING)
        self.version, self.rounds, self.threads, self.recovered = version, [], set(), []

    def sample_partial(
        self, wanted: list[SampleRequest], max_failures: int, prompts: Any = None
    ) -> list[Sample | UserError]:
        self.threads.add(threading.current_thread().name)
        self.rounds.append(len(wanted))
        fails, self.failing = self.version in self.failing, self.failing - {self.version}
        if self.fault == "lost" and self.version - 1 in FAILING and "rollout" in self.threads:
            fails = True  # once more after the sync
        return [UserError("no server") if fails and each.seed % 3 == 0 else self._part(each) for each in wanted]

    def max_failures(self, samples: int) -> int:
        return samples

    def any_failed(self, failures: list[UserError]) -> bool:
        return any(current_ranks().run_on_all(lambda: bool(failures)))

    def recover(self, failures: list[UserError], max_failures: int) -> bool:
        self.recovered.append([self.version, threading.current_thread().name])
        return self.fault == "back"

    def _part(self, each: SampleRequest) -> Sample:
        former, length = each.partial, 1 + each.seed % LONGEST
        ids = each.prompt_ids if former is None else former.tokens.tolist()
        start = len(ids) - len(each.prompt_ids)
        end = min(start + self.budget, length)
        response = np.array([2 + (each.seed + place) % 50 for place in range(start, end)])
        rows, known = len(ids) + len(response) - 1, len(ids) - 1 if former else 0
        routes = np.full((rows, 1, 1), self.version % 4, np.uint8)
        routes[:known] = 3  # of rows that were not asked for once more, which nobody may look at
        spans = (VersionSpan(str(self.version), 0, len(response)),)
        logprobs = np.full(len(response), -1.0 - self.version, np.float32)
        finish = "stop" if end == length else PARTIAL
        part = Sample(each.prompt_index, np.array([*ids, *response]), len(ids), logprobs, routes, spans, finish)
        return former.append(part) if former else part

    def add_rewards(self, prompts: list[Any], samples: list[Sample]) -> list[Sample]:
        given = [replace(sample, reward=float(len(sample.response) % 2)) for sample in samples]
        return [was if was.lost else sample for was, sample in zip(samples, given)]


def session(replicas: int, rank: int, rollout: dict[str, Any] | None = None, **policy: Any) -> Any:
    settings = config.Config(model=config.Model(vocab_size=64), data=config.Arithmetic(eval_prompts=10))
    settings.rollout = config.Rollout(**rollout or {})
    settings.objective = config.Minirl(**policy)
    settings.trainer = config.Trainer(prompts_per_step=PROMPTS, group_size=SIZE, eval_samples=3, eval_temperature=0.5)
    task = ArithmeticTask(settings.data, tokenizer())
    signature = RouteSignature(1, 4, 1)
    place = SimpleNamespace(dp_rank=rank, dp_size=replicas, is_replica_leader=True, is_rank_0=rank == 0, task=task)
    place.signature, place.send_to_replica = signature, lambda samples: samples
    return SimpleNamespace(**vars(place), settings=settings, device=SimpleNamespace(device=torch.device("cpu")))


def collected(
    replicas: int, rank: int, mode: str = "", rollout: dict[str, Any] | None = None, **policy: Any
) -> dict[str, Any]:
    """Groups of `STEPS` steps, by the numbers of their prompts."""
    engine = FakeInference(mode)
    here = session(replicas, rank, rollout, **policy)
    collector = Collector(here, engine)
    steps = []
    for _ in range(STEPS):
        asked, stats = len(engine.asked), Stats()
        try:
            samples = collector._sample_groups(stats)
        except UserError as error:
            return {"error": str(error)}
        assert [sample.prompt_index for sample in samples] == list(np.repeat(range(PROMPTS // replicas), SIZE))
        texts = {text: number for number, _, text, _ in engine.asked[asked:]}
        groups = [texts[here.task.tokenizer.decode(s.tokens[: s.prompt_length])] for s in samples[::SIZE]]
        assert [s.reward for s in samples[::SIZE]] == [rewards_of(g)[0] for g in groups] or mode not in ("", "lost")
        values = stats.gather_sum(True).values()
        steps.append({"groups": groups, "asked": engine.asked[asked:], "values": values, **collector.state_dict()})
    return {"steps": steps}


def told(samples: list[Sample], task: Any) -> list[Any]:
    return [
        [s.prompt_index, task.tokenizer.decode(s.tokens[: s.prompt_length]), s.response.tolist(), s.finish, s.reward]
        + [[[span.version, span.start, span.end] for span in s.spans], s.logprobs.tolist(), s.routes.ravel().tolist()]
        for s in samples
    ]


def ahead(directory: Path, replicas: int, rank: int, fault: str = "", **rollout: Any) -> dict[str, Any]:
    """Steps of partial rollouts, of such ahead, or of both; each state is kept, and half of them are done once more."""
    here, kept = session(replicas, rank, rollout), directory / f"kept-{'-'.join(rollout)}{fault}-{replicas}"
    engine = Parts(rollout, fault=fault)
    collector, steps, states = Collector(here, engine), [], []
    for step in range(LATER):
        if rank == 0:
            (kept / str(step)).mkdir(parents=True)
        dist.barrier()
        states.append(collector.state_dict())
        collector.save_files(kept / str(step))
        steps.append(_ahead_step(here, collector, engine, step))
    again, other = Parts(rollout, LATER // 2, fault), session(replicas, rank, rollout)
    collector = Collector(other, again)
    collector.load_state_dict(states[LATER // 2])
    collector.load_files(kept / str(LATER // 2))
    repeated = [_ahead_step(other, collector, again, step) for step in range(LATER // 2, LATER)]
    more = {"threads": sorted(engine.threads), "recovered": engine.recovered}
    return {"steps": steps, "repeated": repeated, "states": states, **more}


def _ahead_step(here: Any, collector: Collector, engine: Parts, step: int) -> dict[str, Any]:
    stats, rounds = Stats(), len(engine.rounds)
    samples = collector._from_buffer(step == LATER - 1, stats)
    collector.wait()
    engine.version += 1
    collector.finish_next()
    held = collector.buffer._groups + collector.buffer._next_groups
    return {
        "samples": told(samples, here.task), "rounds": engine.rounds[rounds:], **collector.state_dict(),
        "held": [group.prompt_index for group in held], "values": stats.gather_sum(True).values(),
    }  # fmt: skip


def moved(directory: Path, replicas: int, rank: int) -> dict[str, Any]:
    """One replica's run goes on with several."""
    rollout = {"partial_tokens": GO, "overlap": True}
    engine = Parts(rollout, LATER // 2)
    here = session(replicas, rank, rollout)
    collector = Collector(here, engine)
    written = directory / "kept-partial_tokens-overlap-1" / str(LATER // 2)
    collector.load_state_dict({"taken": 2 * PROMPTS + (LATER // 2) * PROMPTS, "begun": True})
    collector.load_files(written)
    return {"steps": [_ahead_step(here, collector, engine, step) for step in range(LATER // 2, LATER)]}


def evaluated(replicas: int, rank: int, mode: str = "", other_reward: bool = False) -> dict[str, Any]:
    here, stats, engine = session(replicas, rank), Stats(), FakeInference(mode)
    if other_reward:
        here.settings.reward, engine.tokenizer = config.Function(), here.task.tokenizer
    evaluate(here, engine, stats)
    return {"values": stats.gather_sum(True).values(), "asked": engine.asked}


def recorded(replicas: int, rank: int) -> list[list[dict[str, Any]]]:
    """The samples that are kept of each step, on rank 0: some are lost, others have no reward."""
    here, engine = session(replicas, rank), FakeInference("lost")
    alone = [dist.new_group([r]) for r in range(replicas)][rank]
    here.reports_stats, here.model_group = True, alone
    here.engine = SimpleNamespace(place=Place(), tensor_rank=0)
    collector, recorder, steps = Collector(here, engine), SampleRecorder(here), []
    for step in range(STEPS):
        samples = collector._sample_groups(Stats())
        advantages = GroupRewards.of([sample.reward for sample in samples], SIZE).compute_advantages("centred")
        length = max(len(sample.tokens) for sample in samples) + rank  # padded otherwise
        batch = from_samples(samples, advantages, length, 0, here.signature)
        numbers = torch.tensor([s.stream_index * SIZE + i % SIZE for i, s in enumerate(samples)])
        scored = make_scored_batch(batch, -((numbers * 7 % 11) / 10)[:, None] * batch.usable_mask)
        batch = make_training_batch(scored).reorder(list(reversed(range(len(batch)))))
        fed = torch.arange(length).repeat(len(batch), 1) + numbers.flip(0)[:, None]
        micro_batches = batch.split(4)  # a row is token s of its sample b
        routes = [part.T.flatten().to(torch.int16) % 2 for part in fed.split(4)]
        recorder.add_train(step + 1, samples, batch, micro_batches, routes)
        recorder.add_eval(step + 1, evaluate(here, engine, Stats()))
        steps.append([asdict(sample) for sample in recorder.take()])
    return steps


def work(directory: Path, replicas: int, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{replicas}", rank=rank, world_size=replicas)
    dropped = {"drop_uniform_groups": True, "refill_rounds": 20}
    found = {
        "plain": collected(replicas, rank),
        "refilled": collected(replicas, rank, **dropped),
        "bounded": collected(replicas, rank, drop_uniform_groups=True, refill_rounds=1),
        "uniform": collected(replicas, rank, "uniform", drop_uniform_groups=True, refill_rounds=2),
        "failed": collected(replicas, rank, "fail"),
        "lost": collected(replicas, rank, "lost"),
        "whole": collected(replicas, rank, "lost", {"incomplete_groups": "drop"}, **dropped),
        "evaluated": evaluated(replicas, rank),
        "partial": ahead(directory, replicas, rank, partial_tokens=GO),
        "overlap": ahead(directory, replicas, rank, overlap=True),
        "both": ahead(directory, replicas, rank, partial_tokens=GO, overlap=True),
        "partial, back": ahead(directory, replicas, rank, "back", partial_tokens=GO),
        "overlap, back": ahead(directory, replicas, rank, "back", overlap=True),
        "partial, lost": ahead(directory, replicas, rank, "lost", partial_tokens=GO),
        "overlap, lost": ahead(directory, replicas, rank, "lost", overlap=True),
        "moved": moved(directory, replicas, rank),
        "recorded": recorded(replicas, rank),
        "evaluated with another reward": evaluated(replicas, rank, other_reward=True),
        "evaluated without": evaluated(replicas, rank, "lost"),
    }
    (directory / f"{replicas}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(directory: Path) -> None:
    tokenizer()  # once for all
    for replicas in (1, 2, 4):
        fork_ranks(partial(work, directory, replicas), replicas)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
