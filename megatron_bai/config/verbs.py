"""Settings that one verb alone reads."""

from dataclasses import dataclass

from megatron_bai.config import limits


@dataclass
class Serve:
    """Settings of `serve`."""

    checkpoint: str = limits.checkpoint_path("", "a Hugging Face or Megatron checkpoint; empty serves merge.output")


@dataclass
class Convert:
    """Settings of `convert`."""

    source: str = limits.checkpoint_path("", "a checkpoint of either format")
    target: str = limits.path("", "the directory that is written")
    to: str = limits.setting(
        "", "hf or megatron; empty: the one that the source is not in", choices=("hf", "megatron", "")
    )


@dataclass
class Inspect:
    """Settings of `inspect`."""

    path: str = limits.checkpoint_path("", "a checkpoint, or a directory that replay.store named")
    other: str = limits.checkpoint_path("", "a second one of the same kind to compare with")
    verify: bool = limits.setting(True, "read every byte against the checksums; false trusts sizes, which is quick")
    routing: bool = limits.setting(
        False, "run the model on prompts: its routes, and how many of each parent's it keeps"
    )
    parents: list[str] = limits.checkpoint_path(list, "of a merge; empty: the sources that its provenance names")
    prompts: str = limits.path(
        "", "rows with data.prompt, and data.response where it has one, for routing; empty: the prompts of data"
    )
    count: int = limits.number(64, "rows or prompts at most", at_least=1)


@dataclass
class Calibrate:
    """Settings of `calibrate`: the routers of a merge, realigned by HARC (arXiv 2606.03391; docs/merge.md)."""

    path: str = limits.checkpoint_path("", "the merge, made by any method")
    parents: list[str] = limits.checkpoint_path(list, "whose routing it is to keep")
    prompts: list[str] = limits.path(
        list, "rows of each parent's own texts, in order: data.prompt, and data.response where a row has one"
    )
    output: str = limits.path("", "a checkpoint in the format of path")
    count: int = limits.number(64, "rows of each at most", at_least=1)
    gamma: float = limits.number(0.9, "γ: 1 is undamped", above=0, at_most=1)
    max_iterations: int = limits.number(1000, "of the conjugate gradients", at_least=1)
    tolerance: float = limits.number(1e-6, "of their residual, relative", above=0, below=1)


@dataclass
class Samples:
    """Settings of `samples`."""

    run: str = limits.path("", "directory of a run; empty: run.dir")
    step: int = limits.number(0, "global step; 0: the last one whose samples are kept", at_least=0)
    split: str = limits.setting("", "train or eval; empty: both", choices=("train", "eval", ""))
    sort: str = limits.setting(
        "best",
        "best, worst, longest, discrepancy or mismatch (of routes)",
        choices=("best", "worst", "longest", "discrepancy", "mismatch"),
    )
    count: int = limits.number(3, "samples to print; 0: all", at_least=0)
    prompt: str = limits.setting("", "only prompts that contain this text, or that have this index")
    format: str = limits.setting("text", "or json: one object a line", choices=("text", "json"))


@dataclass
class Report:
    """Settings of `report`."""

    runs: list[str] = limits.path(list, "run directories; empty reports run.dir")
    output: str = limits.path("", "empty writes report.html into the first run")
