"""Settings that one verb alone reads."""

from dataclasses import dataclass, field


@dataclass
class Serve:
    """Settings of `serve`."""

    checkpoint: str = ""  # a Hugging Face or Megatron checkpoint; empty serves merge.output


@dataclass
class Convert:
    """Settings of `convert`."""

    source: str = ""
    target: str = ""
    to: str = "hf"  # hf or megatron


@dataclass
class Inspect:
    """Settings of `inspect`."""

    path: str = ""  # a checkpoint, or a directory that replay.store named
    other: str = ""  # a second one of the same kind to compare with
    verify: bool = True  # read every byte against the checksums; false trusts sizes, which is quick


@dataclass
class Report:
    """Settings of `report`."""

    runs: list[str] = field(default_factory=list)  # run directories; empty reports run.dir
    output: str = ""  # empty writes report.html into the first run
