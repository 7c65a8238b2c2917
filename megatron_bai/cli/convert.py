"""The verb `convert`: Megatron torch_dist ↔ Hugging Face safetensors, in one process."""

from pathlib import Path

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model.convert import convert


def run(settings: config.Config) -> None:
    """Convert `convert.source` into `convert.target`.

    Raises:
        UserError: a missing or unusable source, an unknown format, or a target that exists.
    """
    job = settings.convert
    if not job.source or not job.target:
        raise UserError("convert.source and convert.target must both be given")
    if job.to not in ("hf", "megatron"):
        raise UserError(f"convert.to is {job.to!r}: choose hf or megatron")
    if Path(job.target).exists():
        raise UserError(f"{job.target} exists: remove it or choose another convert.target")
    convert(settings, job.source, job.target, job.to)
    print(f"wrote {job.target}")
