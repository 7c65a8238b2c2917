"""What is compared: the variants of each study, as settings of `megatron-bai train`, beside what the papers report.

Every variant of a study has the same number of updates, each of `prompts` × `GROUP` responses, so that N updates a step
mean as many fewer steps with N times the batch, as in arXiv 2512.01374. Everything starts from checkpoints that are
made once (`CHECKPOINTS`): seeds change prompts and samples, not these.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

GROUP = 8  # samples per prompt
# 32 experts, four of which a token uses: its routers are less sure than those of `tiny`.
_WIDE = "model.num_experts=32", "model.moe_topk=4"


def _balanced(loss: str, coefficient: str) -> tuple[str, ...]:
    return f"supervised.load_balancing={loss}", f"supervised.aux_loss_coeff={coefficient}"


# Supervised training of each checkpoint, as settings of the verb `train`; the first is the two next ones' origin. The
# instructed one derives its answers, the reasoning one says its lines once more, as models distilled from long ones do.
CHECKPOINTS = {
    "pretrained": ("experiment=demo_pretrained",),
    "instruct": ("experiment=demo_instruct", "data.style=reasoning"),
    "reasoning": ("experiment=demo_reasoning", "data.style=checked", "supervised.length=128", "trainer.steps=500"),
    "wide": ("experiment=demo_pretrained", "trainer.steps=1000", *_WIDE),
    # The load balanced in each row (`seq`), as a micro-batch of one row would be, or in the whole batch (`global`)
    "gap-none": ("experiment=gap_pretrained", *_balanced("none", "0")),
    **{
        f"gap-{scope}-{coefficient}": ("experiment=gap_pretrained", *_balanced(f"{scope}_aux_loss", coefficient))
        for scope, coefficient in product(("seq", "global"), ("0.001", "0.01"))
    },
}
# What a checkpoint is trained further from.
ORIGINS = {"instruct": "pretrained", "reasoning": "pretrained"}


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        settings: Hydra overrides beside the study's.
        updates_per_step: N.
        published: what the paper reports of it.
    """

    settings: tuple[str, ...] = ()
    updates_per_step: int = 1
    published: str = ""


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        name: also of its directory.
        checkpoints: what the runs start from: the settings that make each, in this order.
        settings: Hydra overrides of every variant.
        prompts: of one update.
        updates: of a run, unless others are asked for; a multiple of each N.
        evaluations: of a run, spread evenly, beside that of its first step; 0: none.
        served: the checkpoint whose shape all variants have: their runs share a server; empty: each starts its own.
        judged: whether rewards come from the reward model, which needs a server.
    """

    name: str
    checkpoints: Mapping[str, tuple[str, ...]]
    settings: tuple[str, ...]
    variants: dict[str, Variant]
    prompts: int
    updates: int
    evaluations: int = 0
    served: str = ""
    judged: bool = False

    def steps(self, name: str, updates: int) -> int:
        """Global steps of a variant's run."""
        return updates // self.variants[name].updates_per_step

    def needed_checkpoints(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Those that runs of these variants start from, and what these were trained from; in the order to make them."""
        words = [word for name in names for word in (*self.settings, *self.variants[name].settings)]
        needed = {found for word in words for found in re.findall(r"checkpoints/([\w.-]+)", word)}
        needed |= {self.served} if self.served else set()
        needed |= {ORIGINS[name] for name in needed if name in ORIGINS}
        return {name: settings for name, settings in self.checkpoints.items() if name in needed}

    def overrides(self, name: str, seed: int, updates: int, run_dir: Path) -> list[str]:
        """The command line of one run, less the reward server's address."""
        variant, steps = self.variants[name], self.steps(name, updates)
        n = variant.updates_per_step
        every = max(1, steps // self.evaluations) if self.evaluations else 0
        return [
            f"run.name={name}-{seed}", f"run.dir={run_dir}", f"run.seed={seed}",
            f"trainer.steps={steps}", f"trainer.mini_batches={n}", f"trainer.prompts_per_step={self.prompts * n}",
            f"trainer.group_size={GROUP}", f"trainer.micro_batch_size={min(32, self.prompts * GROUP)}",
            f"trainer.eval_every={every}", f"trainer.save_every={max(1, steps // 4)}", "trainer.keep=1",
            *self.settings, *variant.settings,
        ]  # fmt: skip


def all_studies(directory: Path) -> dict[str, Study]:
    """By name. `directory` holds the checkpoints (`CHECKPOINTS`) and merges made of them."""
    checkpoints = directory / "checkpoints"
    studies = (
        _bai(checkpoints, directory / "merges"), _minirl(checkpoints), _discrepancy(checkpoints), _gap(checkpoints),
        _gap_rl(checkpoints),
    )  # fmt: skip
    return {study.name: study for study in studies}


def _some(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: CHECKPOINTS[name] for name in names}


def _start(checkpoint: Path) -> tuple[str, ...]:
    return "init=checkpoint", f"init.checkpoint={checkpoint}"


def _merge(output: Path, *settings: str) -> tuple[str, ...]:
    return "init=merge", f"merge.output={output}", *settings


def _bai(checkpoints: Path, merges: Path) -> Study:
    """RL from the reasoning checkpoint alone, from BAI, and from merges of one stage (arXiv 2509.00309).

    The paper's objective (PPO with a critic) and half its updates a step; a served reward model (`preferences`). Both
    engines compute in float32, so that the first weights are all that differs.
    """
    pretrained, instruct, reasoning = (checkpoints / name for name in ("pretrained", "instruct", "reasoning"))
    linear = "merge.method=linear"
    halves = "merge.weights=[0.5,0.5]"
    starts = {
        "reasoning": (_start(reasoning), "−74 % of the length within 50 steps, never recovered; hockey sticks"),
        "instruct": (_start(instruct), ""),
        "instruct+reasoning": (
            _merge(merges / "stage1", linear, f"merge.members=[{instruct},{reasoning}]", halves), ""
        ),
        "pretrained+reasoning": (
            _merge(merges / "plain", linear, f"merge.members=[{pretrained},{reasoning}]", halves), ""
        ),
    }  # fmt: skip
    two_stages = f"merge.pretrained={pretrained}", f"merge.members=[{instruct},{reasoning}]", halves
    known = {0.1: "best benchmarks", 0.5: "best dynamics, with α = .6, at which the length grows throughout"}
    for alpha in (0.1, 0.2, 0.5, 0.7, 0.9):
        merged = _merge(merges / f"bai-{alpha}", *two_stages, f"merge.alpha={alpha}")
        starts[f"bai-{alpha}"] = (merged, known.get(alpha, ""))
    settings = (
        "objective=ppo", "objective.critic_warmup=2", "objective.critic_learning_rate=1e-3", "reward=model",
        "reward.send=ids", "reward.check=3", "replay.mode=none", "rollout.dtype=float32", "rollout.max_new_tokens=112",
        "trainer.learning_rate=3e-4", "trainer.eval_samples=2", "monitor.bucket=10", "monitor.reward_responses=32",
        "monitor.reward_drop=0.3",
    )  # fmt: skip
    variants = {name: Variant(start, 4, published) for name, (start, published) in starts.items()}
    own = _some("pretrained", "instruct", "reasoning")
    return Study("bai", own, settings, variants, prompts=4, updates=80, evaluations=4, served="pretrained", judged=True)


def _minirl(checkpoints: Path) -> Study:
    """MiniRL with N updates a step, replay and clipping (arXiv 2512.01374); bfloat16 and fp8 weights served.

    At N = 1 every ratio to π_old is 1: clipping changes nothing there, nor does R2, so neither is run.
    """
    published = {
        "n1": "peak .782, stable; KL 3.4e-3 → 6.5e-3",
        "n1-length-norm": "peak .758, stable; KL → 6–7e-3",
        "n1-no-is": "peak ≈.68, collapses at 100–135, entropy .31 → .1; KL → 2.1e-2",
        "n1-r3": "peak ≈.74; KL 2.4e-3 → 3.6e-3",
        "n2-none-noclip": "peak .749, collapses ≈1,000; KL → 2.2e-2",
        "n2-r2-noclip": "peak .783, collapses by ≈2,000; KL → 3.4e-2",
        "n2-r2": "peak .797, stable; KL 3.5e-3 → 1.3e-2",
        "n2-r3": "peak .772, stable; KL 2.4e-3 → 3.9e-3",
        "n8-r2": "peak .78, collapses ≈3,800; KL → 5.5e-2",
        "n8-r3": "peak .788, stable; KL 2.4e-3 → 1.2e-2",
    }
    alone = "replay.mode=none"
    settings = {
        "n1": (alone,),
        "n1-length-norm": (alone, "objective.length_norm=true"),
        "n1-no-is": (alone, "objective.train_infer_is=false"),
        "n1-r3": ("replay.mode=r3",),
    }
    updates = dict.fromkeys(settings, 1)
    for n, replay, clip in product((2, 4, 8), ("none", "r2", "r3"), (True, False)):
        name = f"n{n}-{replay}{'' if clip else '-noclip'}"
        settings[name] = f"replay.mode={replay}", f"objective.clip={str(clip).lower()}"
        updates[name] = n
    common = (
        *_start(checkpoints / "wide"), *_WIDE, "objective=minirl", "rollout.dtype=bfloat16", "rollout.quantize=fp8",
        "rollout.sync_tolerance=1", "trainer.learning_rate=6e-4", "trainer.eval_samples=2", "monitor.bucket=10",
    )  # fmt: skip
    variants = {name: Variant(settings[name], updates[name], published.get(name, "")) for name in settings}
    return Study("minirl", _some("wide"), common, variants, prompts=4, updates=64, evaluations=4, served="wide")


def _discrepancy(checkpoints: Path) -> Study:
    """Training against inference on the same tokens, with the server's routes and without (arXiv 2510.11370).

    Nothing is learned (learning rate 0): every step is another sample from one checkpoint.
    """
    served = {
        "float32": (),
        "bfloat16": ("rollout.dtype=bfloat16",),
        "bfloat16-int8": ("rollout.dtype=bfloat16", "rollout.quantize=int8"),
        "bfloat16-fp8": ("rollout.dtype=bfloat16", "rollout.quantize=fp8"),
    }
    paper = "KL 1.535e-3 → 7.5e-4; F(2) > .1 after 60 steps → < 1e-4; ≈10 % of routes, 94 % of tokens differ"
    known = {"bfloat16": paper}
    settings = "replay.mode=r3", "rollout.sync_tolerance=1", "trainer.learning_rate=0"
    starts = {"": _start(checkpoints / "pretrained"), "wide-": (*_start(checkpoints / "wide"), *_WIDE)}
    variants = {
        model + name: Variant((*start, *words), published=known.get(name, ""))
        for model, start in starts.items()
        for name, words in served.items()
    }
    return Study("discrepancy", _some("pretrained", "wide"), settings, variants, prompts=16, updates=6)


def _gap(checkpoints: Path) -> Study:
    """As `_discrepancy`, of routers that were trained with a load-balancing loss and without.

    Also with the server's weights of the experts, beside its routes.
    """
    settings = (
        "replay.mode=r3", "replay.weights=server", "rollout.sync_tolerance=1", "trainer.learning_rate=0",
        "rollout.dtype=bfloat16",
    )  # fmt: skip
    starts = {name.removeprefix("gap-"): checkpoints / name for name in CHECKPOINTS if name.startswith("gap-")}
    variants = {
        name + suffix: Variant((*_start(checkpoint), *words))
        for name, checkpoint in starts.items()
        for suffix, words in (("", ()), ("-fp8", ("rollout.quantize=fp8",)))
    }
    return Study("gap", _some(*(f"gap-{name}" for name in starts)), settings, variants, prompts=16, updates=6)


# Beside live routers: routes that are replayed, a ratio that is scaled where they shift, routers that are not trained
_GUARDS = {
    "none": ("replay.mode=none",),
    "r2": ("replay.mode=r2",),
    "r3": ("replay.mode=r3",),
    "rspo": ("replay.mode=none", "objective.router_shift=true"),
    "frozen": ("replay.mode=none", "trainer.freeze=[router]"),
}


def _gap_rl(checkpoints: Path) -> Study:
    """MiniRL and DPPO, N updates a step, across the gap, with each guard of the routes; MiniRL also without its clip.

    Left out is what equals another cell: at N = 1 every ratio to π_old and every shift of a router is none, so R2, RSPO
    and MiniRL's clip change nothing; DPPO without its trust region is MiniRL without its clip, but for `is_max`.
    """
    published = {
        "minirl-n1-none": "peak .782, stable",
        "minirl-n2-none-noclip": "peak .749, collapses ≈1,000",
        "minirl-n2-r2": "peak .797, stable: the best at N = 2",
        "minirl-n2-r3": "peak .772, stable",
        "minirl-n2-r2-noclip": "peak .783, collapses by ≈2,000",
        "minirl-n8-r2": "peak .78, collapses ≈3,800",
        "minirl-n8-r3": "peak .788, stable: the best from N = 4 on",
    }
    variants = {}
    for objective, n, guard, clip in product(("minirl", "dppo"), (1, 2, 4, 8), _GUARDS, (True, False)):
        if (n == 1 and (guard in ("r2", "rspo") or not clip)) or (objective == "dppo" and not clip):
            continue
        name = f"{objective}-n{n}-{guard}{'' if clip else '-noclip'}"
        settings = (f"objective={objective}", *_GUARDS[guard], *(() if clip else ("objective.clip=false",)))
        variants[name] = Variant(settings, n, published.get(name, ""))
    checkpoint = "gap-global-0.01"
    common = (
        *_start(checkpoints / checkpoint), "rollout.dtype=bfloat16", "rollout.quantize=fp8", "rollout.sync_tolerance=1",
        "trainer.learning_rate=6e-4", "trainer.eval_samples=2", "monitor.bucket=10",
    )  # fmt: skip
    return Study("gap_rl", _some(checkpoint), common, variants, prompts=4, updates=64, evaluations=4, served=checkpoint)
