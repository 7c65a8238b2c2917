"""What `benchmarks/train.py` measures, each in processes of its own; rank 0 prints one JSON object.

    python benchmarks/train_work.py WORK DIRECTORY JSON

Only the standard library is imported at first, so that a peer's own environment can run its part. DIRECTORY holds
`model`, which every run starts from, and `prompts.json`. Timed is a whole global step, from the end of the one before
to its own.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
NEVER = "<never>"  # the end token, whose id the model does not have: every response has the full length


def reward_of(response: Sequence[int]) -> float:
    """Something that varies within a group, and costs nothing."""
    return sum(int(token) % 2 for token in response) / len(response)


def settings_of(directory: Path, work: dict[str, Any]) -> Any:
    """Our settings of a run."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from megatron_bai import config

    config.register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        words = [f"run.dir={directory}/{work['name']}", "backend.kind=cpu", *work["overrides"]]
        return OmegaConf.to_object(compose("config", overrides=words))


def make(directory: Path, work: dict[str, Any]) -> dict[str, Any]:
    """`model`, random weights with the task's tokenizer but for its end token, and the prompts of all steps."""
    from megatron_bai.model import hf_checkpoint
    from megatron_bai.rl.session import open_session

    settings = settings_of(directory, work)
    with open_session(settings) as session:
        tokenizer = session.task.tokenizer
        missing = settings.model.vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<spare{i}>" for i in range(missing)])
        tokenizer.add_special_tokens({"eos_token": "<spare0>" if work["ends"] else NEVER})
        assert (tokenizer.eos_token_id < settings.model.vocab_size) == work["ends"]
        tokenizer.save_pretrained(directory / "tokenizer")
        hf_checkpoint.save_hf(session.actor.modules, settings.model, directory / "model", directory / "tokenizer", {})
        prompts = session.task.prompts("train", settings.run.seed, 0, work["prompts"])
    (directory / "prompts.json").write_text(json.dumps([prompt.text for prompt in prompts]))
    return {"prompt_tokens": [len(prompt.ids) for prompt in prompts]}


def spent() -> float:
    """Seconds that the processors gave to this run: all ranks, the server, and what started them."""
    import psutil

    root = psutil.Process(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Steps:
    """The ends of global steps by the clock and by the processors, the seconds of their phases, and their tokens."""

    def __init__(self) -> None:
        self.phases: list[dict[str, float]] = []
        self.tokens: list[tuple[int, int]] = []
        self.begin()
        self._now: dict[str, float] = defaultdict(float)
        self._prompt = self._response = 0

    def begin(self) -> None:
        self.ends = [(time.perf_counter(), spent())]

    @contextmanager
    def phase(self, name: str) -> Any:
        began = time.perf_counter()
        yield
        self._now[name] += time.perf_counter() - began

    def count(self, prompt: int, response: int) -> None:
        self._prompt, self._response = self._prompt + prompt, self._response + response

    def end(self, phases: dict[str, float] | None = None) -> None:
        self.ends.append((time.perf_counter(), spent()))
        self.phases.append(dict(phases or self._now))
        self.tokens.append((self._prompt, self._response))
        self._now.clear()
        self._prompt = self._response = 0

    def report(self) -> dict[str, Any]:
        clock, processor = ([b - a for a, b in zip(each, each[1:])] for each in zip(*self.ends))
        return {"clock": clock, "processor": processor, "phases": self.phases, "tokens": self.tokens}


def ours(directory: Path, work: dict[str, Any]) -> dict[str, Any]:
    """Our trainer, with its server, under torchrun."""
    from megatron_bai.data.arithmetic_task import ArithmeticTask
    from megatron_bai.rl import trainer
    from megatron_bai.rl.experience import collector

    steps, loop, source, task = (
        Steps(),
        cast(Any, trainer.TrainingLoop),
        cast(Any, collector.Collector),
        cast(Any, ArithmeticTask),
    )
    step, sampled = loop.step, source.collect
    task.reward = lambda self, prompt, response: reward_of(response)

    def collected(self: Any, *arguments: Any) -> Any:
        samples, batch = sampled(self, *arguments)
        steps.count(sum(each.prompt_length for each in samples), sum(len(each.response) for each in samples))
        return samples, batch

    def stepped(self: Any, *arguments: Any) -> dict[str, Any]:
        values: dict[str, Any] = step(self, *arguments)
        steps.end({name[8:]: each for name, each in values.items() if name.startswith("seconds_")})
        return values

    source.collect, loop.step = collected, stepped
    trainer.train(settings_of(directory, work))
    return steps.report()


def trl(directory: Path, work: dict[str, Any]) -> dict[str, Any]:
    """TRL's GRPOTrainer, generating with transformers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(work["threads"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa", experts_implementation=work["experts"]
    )
    update = work["samples"] // work["updates"] // SIZE  # samples of a process in an update
    options = GRPOConfig(
        output_dir=str(directory / work["name"]),
        per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=update // work["micro"],
        steps_per_generation=work["updates"] * update // work["micro"],
        num_generations=work["group"],
        max_completion_length=work["response"],
        max_steps=work["steps"] * work["updates"],
        temperature=1.0, top_k=0, beta=0.0, loss_type="grpo", learning_rate=1e-4, lr_scheduler_type="constant",
        shuffle_dataset=False, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
        report_to="none", save_strategy="no", logging_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
        ddp_backend="gloo" if SIZE > 1 else None, generation_kwargs={"use_cache": True}, seed=0,
    )  # fmt: skip
    steps = Steps()

    def reward(prompt_ids: Any = None, completion_ids: Any = None, prompts: Any = None, **_: Any) -> list[float]:
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        steps.count(sum(lengths), sum(map(len, completion_ids)))
        return [reward_of(ids) for ids in completion_ids]

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            steps.begin()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step % work["updates"] == 0:
                steps.end()

    def timed(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with steps.phase(phase):
                return method(*arguments, **named)

        return call

    prompts = json.loads((directory / "prompts.json").read_text())
    trainer = GRPOTrainer(
        model, reward, options, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[Ends()]
    )
    trainer._generate = timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = timed("collect", trainer._generate_and_score_completions)
    trainer.train()
    found = steps.report()
    for phases, seconds in zip(found["phases"], found["clock"]):
        phases["old_logprob"] = phases.pop("collect") - phases["rollout"]
        phases["update"] = seconds - phases["old_logprob"] - phases["rollout"]
    return found


def scale(_: Path, work: dict[str, Any]) -> dict[str, Any]:
    """Old log-probabilities and one update over synthetic samples; medians of rounds after the first."""
    import statistics

    import numpy as np

    from megatron_bai.distributed import backend
    from megatron_bai.model import build, megatron_checkpoint, param_shards

    settings = settings_of(Path("."), {"name": "scale", "overrides": [
        "objective=grpo", f"parallel.tensor={work['tensor']}", f"parallel.expert={work['tensor']}",
        f"parallel.sequence={str(work['tensor'] > 1).lower()}", f"model.max_position_embeddings={work['tokens']}",
        "rollout.max_new_tokens=16", *work["overrides"],
    ]})  # fmt: skip
    device = backend.init_backend(settings.backend)
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.batch import from_samples
    from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
    from megatron_bai.rl.policy.training_engine import TrainingEngine
    from megatron_bai.rollout.sample import Sample
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    build.init_parallel(settings.parallel, seed=0)
    actor = build.build_actor(settings, device)
    param_shards.init_random(actor.modules, settings.model, seed=0)
    megatron_checkpoint.reload_master_weights(actor)
    replay = RoutingReplay(actor.modules)
    engine, random, signature = (
        TrainingEngine(actor, replay, device.device, 1.0),
        np.random.default_rng(0),
        replay.signature,
    )
    length, prompt = work["tokens"], 16
    shape = length - 1, signature.moe_layers, signature.topk
    samples = [
        Sample(0, random.integers(0, settings.model.vocab_size, length), prompt,
               np.full(length - prompt, -4, dtype=np.float32), np.zeros(shape, dtype=signature.dtype), (), "length")
        for _ in range(work["samples"])
    ]  # fmt: skip
    batch = from_samples(samples, random.normal(size=len(samples)), length, 0, signature)
    micros, objective = batch.split(work["micro"]), objectives.get("grpo")
    base = peak_mib()
    found: dict[str, list[float]] = defaultdict(list)
    for _round in range(work["rounds"]):
        marks = [(time.perf_counter(), time.process_time())]
        scores = engine.score(micros).logprobs
        assert scores is not None, "one stage has the logits"
        training = make_training_batch(make_scored_batch(batch, scores)).split(work["micro"])
        marks.append((time.perf_counter(), time.process_time()))
        engine.update(training, None, objective, settings.objective)
        marks.append((time.perf_counter(), time.process_time()))
        for name, before, after in zip(("score", "update"), marks, marks[1:]):
            found[name].append(after[0] - before[0])
            found[f"{name}_cpu"].append(after[1] - before[1])
    backend.shutdown_backend()
    return {name: statistics.median(values[1:] or values) for name, values in found.items()} | {"base_mib": base}


def peak_mib() -> float:
    """Resident peak of this program; `getrusage` would include what the parent had before `exec`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def main() -> None:
    name, directory, work = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    found = {f.__name__: f for f in (make, ours, trl, scale)}[name](directory, work)
    line = json.dumps({"rank": RANK, **found, "peak_mib": peak_mib()})
    os.write(1, f"\n{line}\n".encode())  # one write: ranks share the pipe


if __name__ == "__main__":
    main()
