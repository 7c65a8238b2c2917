"""The whole global step of `train` beside TRL's GRPOTrainer, and what scoring and updating cost as sequences grow.

    python benchmarks/train.py step --dir /tmp --trl PYTHON
    python benchmarks/train.py scale --tokens 512 2048 8192

`step` makes one tiny Qwen3-MoE with random weights and runs, each in processes of its own, from those weights:

    ours      torchrun with 1 and 2 processes (data parallel) and `--servers` SGLang servers, each on one core, without
              replay, with R3, and with R3 and the discrepancy's extra forward pass (replay.measure_live)
    trl       TRL 1.16.0 in PYTHON's environment, transformers generating with its cache: 1 process with 2 threads, and
              2 processes (DDP); experts by grouped matrix products, which were the fastest of its three ways

All have the same prompts, group size, updates a step, micro-batches, float32 and GRPO's loss, on the cores `--cores`.
The end token's id is one that the model does not have, so that every response has the full length: the tokens of each
step are counted and must be those asked for. With `--ends` the model has it, and draws it as any other of its random
weights' tokens: lengths are then distributed as exp(−length / vocabulary) up to `--response`, with a tail as those of
reasoning have. The first step is warm-up; a row is the median of the others over `--repeat` runs, whose order
alternates; `tokens/s` those of the responses in all of these steps. `clock` is the seconds of a step, from the end of
the one before; `cpu` what the processors gave to all its processes (the server's too), to which other programs on the
machine add little.

`scale` times old log-probabilities and an update by the trainer's own engine on synthetic samples, and gives the
resident peak of a process less what it had before; layouts 1 and TP2 (sequence parallel).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WORK = Path(__file__).with_name("train_work.py")
UPDATES = 2  # a step


def launch(python: str, processes: int, threads: int, *words: str | Path) -> list[dict[str, Any]]:
    """What every rank of a run found."""
    start = [python]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*start, WORK, *words], capture_output=True, text=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    if done.returncode or len(found) != processes:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return sorted(found, key=lambda each: each["rank"])


def rows(options: argparse.Namespace) -> dict[str, tuple[str, str, int, int, dict[str, Any]]]:
    """What to run, by the name of its row: the work, Python, processes, threads, and what the work is told."""
    found = {}
    replays = {"none": ["replay.mode=none"], "r3": ["replay.measure_live=false"], "r3 + live": []}
    common = [
        "init=checkpoint", f"init.checkpoint={options.dir}/model", "objective=grpo",
        f"trainer.steps={options.steps}", f"trainer.prompts_per_step={options.prompts}", "trainer.learning_rate=1e-4",
        f"trainer.group_size={options.group}", f"trainer.mini_batches={UPDATES}", "rollout.start_timeout_s=900",
        f"trainer.micro_batch_size={options.micro}", f"rollout.max_new_tokens={options.response}",
        f"rollout.servers={options.servers}", f"rollout.concurrency={options.running}",
        f"rollout.max_running_requests={options.running}",
        f"model.max_position_embeddings={options.response + 64}", *options.set,
    ]  # fmt: skip
    for processes in (1, 2):
        for replay, more in replays.items():
            name = f"ours, {processes} process{'es' * (processes > 1)}, {replay}"
            found[name] = ("ours", sys.executable, processes, 1, {"overrides": common + more})
    shape = {"group": options.group, "response": options.response, "micro": options.micro, "steps": options.steps}
    shape |= {"samples": options.prompts * options.group, "updates": UPDATES, "experts": "grouped_mm"}
    if options.trl:
        found["trl, 1 process, 2 threads"] = ("trl", options.trl, 1, 2, shape | {"threads": 2})
        found["trl, 2 processes"] = ("trl", options.trl, 2, 1, shape | {"threads": 1})
    return {name: row for name, row in found.items() if not options.only or any(part in name for part in options.only)}


def check_tokens(name: str, ranks: list[dict[str, Any]], prompts: list[int], options: argparse.Namespace) -> None:
    """Refuse a run that had other tokens than those asked for, in any step."""
    for step in range(options.steps):
        own = prompts[step * options.prompts : (step + 1) * options.prompts]
        asked = (sum(own) * options.group, options.prompts * options.group * options.response)
        found = tuple(sum(rank["tokens"][step][which] for rank in ranks) for which in (0, 1))
        if found[0] != asked[0] or found[1] > asked[1] or found[1] < asked[1] and not options.ends:
            raise SystemExit(f"{name}: step {step + 1} had {found} prompt and response tokens, asked were {asked}")


def measure_steps(options: argparse.Namespace) -> None:
    options.dir = options.dir / "benchmark-train"  # never a directory that someone else filled
    shutil.rmtree(options.dir, ignore_errors=True)
    options.dir.mkdir(parents=True)
    overrides = [f"model.max_position_embeddings={options.response + 64}", f"rollout.max_new_tokens={options.response}"]
    told = {"name": "make", "overrides": overrides, "prompts": options.prompts * options.steps, "ends": options.ends}
    prompts = launch(sys.executable, 1, 1, "make", options.dir, json.dumps(told))[0]["prompt_tokens"]
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeat):
        order = list(rows(options).items())
        for number, (name, (work, python, processes, threads, told)) in enumerate(order[:: -1 if repeat % 2 else 1]):
            load = os.getloadavg()[0]
            own = json.dumps(told | {"name": f"{repeat}-{number}"})
            ranks = launch(python, processes, threads, work, options.dir, own)
            check_tokens(name, ranks, prompts, options)
            responses = sum(rank["tokens"][step][1] for rank in ranks for step in range(1, options.steps))
            found.setdefault(name, []).append(ranks[0] | {"load": load, "responses": responses})
    most = f"up to {options.response}" if options.ends else f"{options.response}"
    print(f"{options.prompts} prompts × {options.group} samples × {most} tokens, {UPDATES} updates a step")
    phases = ("rollout", "old_logprob", "update", "sync")
    heads = f"{'clock s':>9}{'cpu s':>8}{'tokens/s':>10}" + "".join(f"{name:>13}" for name in phases)
    print(f"{'':30}{heads}{'load':>7}")
    for name, runs in found.items():
        clock, cpu = (statistics.median(s for run in runs for s in run[which][1:]) for which in ("clock", "processor"))
        steps = [step for run in runs for step in run["phases"][1:]]
        split = "".join(f"{statistics.median(step.get(phase, 0.0) for step in steps):>13.2f}" for phase in phases)
        load = statistics.mean(run["load"] for run in runs)
        rate = sum(run["responses"] for run in runs) / sum(s for run in runs for s in run["clock"][1:])
        print(f"{name:30}{clock:>9.2f}{cpu:>8.2f}{rate:>10.0f}{split}{load:>7.1f}")
    shutil.rmtree(options.dir)


def measure_scale(options: argparse.Namespace) -> None:
    print(f"{options.samples} samples: old log-probabilities and one update")
    heads = ("tokens", "micro", "score s", "update s", "score cpu", "update cpu", "peak MiB", "load")
    print(f"{'layout':8}" + "".join(f"{head:>12}" for head in heads))
    for tensor in options.tensor:
        for tokens in options.tokens:
            for micro in options.micro:
                load = os.getloadavg()[0]
                told = {"tokens": tokens, "micro": micro, "tensor": tensor, "overrides": options.set}
                told |= {"samples": options.samples, "rounds": options.rounds}
                ranks = launch(sys.executable, tensor, 1, "scale", ".", json.dumps(told))
                values = [ranks[0][name] for name in ("score", "update", "score_cpu", "update_cpu")]
                peak = max(rank["peak_mib"] - rank["base_mib"] for rank in ranks)
                numbers = "".join(f"{value:>12.2f}" for value in values)
                print(f"TP{tensor:<6}{tokens:>12}{micro:>12}{numbers}{peak:>12.0f}{load:>12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    step = verbs.add_parser("step")
    step.set_defaults(run=measure_steps)
    step.add_argument("--dir", type=Path, required=True, help="directory to work in, in a folder of its own")
    step.add_argument("--trl", help="the Python of an environment that has trl 1.16.0")
    step.add_argument("--steps", type=int, default=6, help="of a run, the first of which is warm-up")
    step.add_argument("--prompts", type=int, default=16)
    step.add_argument("--group", type=int, default=8)
    step.add_argument("--response", type=int, default=64, help="tokens of every response, with --ends the most")
    step.add_argument("--ends", action="store_true", help="responses end where the model draws the end token")
    step.add_argument("--micro", type=int, default=32, help="samples in a micro-batch, on both sides")
    step.add_argument("--running", type=int, default=128, help="requests that a server samples at once")
    step.add_argument("--servers", type=int, default=2, help="that sample for ours")
    step.add_argument("--repeat", type=int, default=3)
    step.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    step.add_argument("--set", nargs="+", default=[], help="more settings of ours, such as rollout.deterministic=false")
    scale = verbs.add_parser("scale")
    scale.set_defaults(run=measure_scale)
    scale.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    scale.add_argument("--micro", type=int, nargs="+", default=[1, 4])
    scale.add_argument("--samples", type=int, default=4)
    scale.add_argument("--tensor", type=int, nargs="+", default=[1, 2])
    scale.add_argument("--rounds", type=int, default=3)
    scale.add_argument("--set", nargs="+", default=[], help="settings, such as parallel.recompute=full")
    for verb in (step, scale):
        verb.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="that everything runs on")
    options = parser.parse_args()
    os.sched_setaffinity(0, options.cores)
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, cores {options.cores}, load {load:.1f} at the start")
    options.run(options)


if __name__ == "__main__":
    main()
