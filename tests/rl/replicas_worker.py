"""`python replicas_worker.py DIRECTORY`: collects and evaluates with 1, 2 and 4 replicas; a file of facts for each.

Replicas are processes with real collectives. The inference engine is a function of a prompt's number in the stream, which
no server can be asked for: rewards must be known.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.data import Sums, build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.collect import Collector
from megatron_bai.rl.evaluate import evaluate
from megatron_bai.rollout.client import sampling_seed
from megatron_bai.rollout.sample import Sample

PROMPTS, SIZE, STEPS = 8, 4, 3


def rewards_of(number: int) -> list[float | None]:
    """Of the members of the group of a prompt: two groups in three are uniform, some have failures."""
    if number % 3:
        return [float(number % 2)] * SIZE
    if number % 4 == 0:
        return [None, 1.0, 0.0, None]
    if number % 5 == 0:
        return [None, None, None, 1.0]  # nothing to compare it with
    return [1.0, 0.0, 0.0, float(number % 2)]


class Engine:
    """Stands for the server."""

    def __init__(self, mode: str = ""):
        self.mode, self.asked = mode, []

    def sample(self, prompts: Any, size: int, seed: str, first: int = 0, temperature: float | None = None) -> list[Sample]:
        samples = []
        for index in range(len(prompts)):
            self.asked.append([first + index, sampling_seed(seed, first + index, 0), prompts[index].text, temperature])
            for member, reward in enumerate(np.resize(rewards_of(first + index), size).tolist()):
                reward = {"": reward, "fail": None, "uniform": 1.0}[self.mode]
                tokens = np.array([*prompts[index].ids, 5 + member, 1])
                of = dict(prompt=index, tokens=tokens, prompt_length=len(tokens) - 2, logprobs=np.zeros(2, np.float32))
                sample = Sample(routes=np.zeros((len(tokens) - 1, 1, 1), np.uint8), spans=(), finish="stop", **of)
                samples.append(replace(sample, reward=reward, failure="" if reward is not None else "broken"))
        return samples


def session(replicas: int, rank: int, **policy: Any) -> Any:
    settings = config.Config(model=config.Model(vocab_size=64), data=config.Arithmetic(eval_prompts=10))
    settings.objective = config.Minirl(**policy)
    settings.trainer = config.Trainer(prompts_per_step=PROMPTS, group_size=SIZE, eval_samples=3, eval_temperature=0.5)
    task = Sums(settings.data, build_tokenizer(settings.data, 64))
    place = SimpleNamespace(data_rank=rank, data_size=replicas, leader=True, lead=rank == 0, task=task)
    return SimpleNamespace(**vars(place), settings=settings, device=SimpleNamespace(device=torch.device("cpu")))


def collected(replicas: int, rank: int, mode: str = "", **policy: Any) -> dict[str, Any]:
    """Groups of `STEPS` steps, by the numbers of their prompts."""
    engine = Engine(mode)
    here = session(replicas, rank, **policy)
    collector = Collector(here, engine)
    steps = []
    for _ in range(STEPS):
        asked, stats = len(engine.asked), Stats()
        try:
            samples = collector._groups(stats)
        except UserError as error:
            return {"error": str(error)}
        assert [sample.prompt for sample in samples] == list(np.repeat(range(PROMPTS // replicas), SIZE))
        texts = {text: number for number, _, text, _ in engine.asked[asked:]}
        groups = [texts[here.task.tokenizer.decode(s.tokens[: s.prompt_length])] for s in samples[::SIZE]]
        assert [s.reward for s in samples[::SIZE]] == [rewards_of(g)[0] for g in groups] or mode
        values = stats.gathered(True).values()
        steps.append({"groups": groups, "asked": engine.asked[asked:], "values": values, **collector.state()})
    return {"steps": steps}


def evaluated(replicas: int, rank: int) -> dict[str, Any]:
    engine, stats = Engine(), Stats()
    evaluate(session(replicas, rank), engine, stats)
    return {"values": stats.gathered(True).values(), "asked": engine.asked}


def work(directory: Path, replicas: int, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{replicas}", rank=rank, world_size=replicas)
    found = {
        "plain": collected(replicas, rank),
        "refilled": collected(replicas, rank, drop_uniform_groups=True, refill_rounds=20),
        "bounded": collected(replicas, rank, drop_uniform_groups=True, refill_rounds=1),
        "uniform": collected(replicas, rank, "uniform", drop_uniform_groups=True, refill_rounds=2),
        "failed": collected(replicas, rank, "fail"),
        "evaluated": evaluated(replicas, rank),
    }
    (directory / f"{replicas}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(directory: Path) -> None:
    for replicas in (1, 2, 4):
        children = []
        for rank in range(replicas):
            child = os.fork()
            if child == 0:
                try:
                    work(directory, replicas, rank)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        assert not any(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
