"""The verbs: summary, function and groups of settings of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb: its summary, its function, its groups of settings, and an example."""

    summary: str
    function: str  # module:function taking the Config; imported when the verb runs
    groups: tuple[str, ...]  # in the order of its help
    example: str
    also_reads: tuple[str, ...] = ()  # groups of which it reads a setting or two, not listed by its help


_TRAINING = ("run", "backend", "model", "parallel", "data", "reward", "env", "init", "merge")
VERBS = {
    "merge": Verb(
        "Merge checkpoints into the one that RL starts from, by BAI or another method.",
        "megatron_bai.cli.merge:run",
        ("merge",),
        "megatron-bai merge merge.pretrained=a 'merge.members=[b,c]' 'merge.weights=[.5,.5]' merge.output=d",
    ),
    "train": Verb(
        "Train: reinforcement learning, or supervised with objective=sft. Several processes: megatron-bai torchrun.",
        "megatron_bai.cli.train:run",
        _TRAINING + ("cluster", "rollout", "replay", "objective", "supervised", "trainer", "monitor"),
        "megatron-bai torchrun --nproc-per-node 2 train experiment=demo",
    ),
    "plan": Verb(
        "Say what a training run will do and need of each GPU, without starting it.",
        "megatron_bai.cli.plan:run",
        _TRAINING + ("cluster", "rollout", "replay", "objective", "trainer", "monitor"),
        "megatron-bai plan experiment=qwen3_30b_minirl cluster=gpus_16 updates=n4",
        also_reads=("supervised",),  # so that a command line of `train` is one of `plan`
    ),
    "serve": Verb(
        "Serve a checkpoint with SGLang until interrupted.",
        "megatron_bai.cli.serve:run",
        ("run", "backend", "serve", "rollout"),
        "megatron-bai serve serve.checkpoint=runs/demo/actor",
        also_reads=("merge",),
    ),
    "convert": Verb(
        "Convert a checkpoint between Megatron torch_dist and Hugging Face safetensors.",
        "megatron_bai.cli.convert:run",
        ("backend", "convert"),
        "megatron-bai convert convert.source=runs/demo/actor convert.target=actor-hf convert.to=hf",
    ),
    "inspect": Verb(
        "Describe a checkpoint or a store of routes, or compare two; how much of its parents' routing a merge keeps.",
        "megatron_bai.cli.inspect_verb:run",
        ("inspect",),
        "megatron-bai inspect inspect.path=runs/demo/actor inspect.routing=true",
        also_reads=("backend", "parallel", "data"),
    ),
    "calibrate": Verb(
        "Realign the routers of a merge with its parents' (HARC), on texts of each.",
        "megatron_bai.cli.calibrate:run",
        ("calibrate",),
        "megatron-bai calibrate calibrate.path=actor 'calibrate.parents=[a,b]' 'calibrate.prompts=[a.jsonl,b.jsonl]'"
        " calibrate.output=calibrated",
        also_reads=("backend", "parallel", "data"),
    ),
    "samples": Verb(
        "Print responses that a run kept: the best, worst or longest of a step, or where the engines differ.",
        "megatron_bai.cli.samples:run",
        ("run", "samples"),
        "megatron-bai samples samples.run=runs/demo samples.step=12 samples.sort=worst",
    ),
    "report": Verb(
        "Write one HTML page about runs, finished or in progress.",
        "megatron_bai.cli.report:run",
        ("run", "report"),
        "megatron-bai report 'report.runs=[runs/demo,runs/other]' report.output=both.html",
    ),
    "doctor": Verb(
        "Say what this machine has, and what each missing piece disables.",
        "megatron_bai.cli.doctor:run",
        (),
        "megatron-bai doctor",
        also_reads=("backend",),
    ),
}
