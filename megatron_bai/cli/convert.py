"""The verb `convert`: Megatron torch_dist ↔ Hugging Face safetensors, in one process."""

from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint import formats
from megatron_bai.checkpoint.output_paths import require_apart, resolve_output
from megatron_bai.errors import UserError
from megatron_bai.model.convert import convert

_NAMES = {"hf": "Hugging Face's safetensors", "megatron": "Megatron's torch_dist"}


def run(settings: config.Config) -> None:
    """Convert `convert.source` into `convert.target`, to `convert.to` or else to the format that the source has not.

    Raises:
        UserError: a missing or unusable source, an unknown format, or a target that exists or is the source.
    """
    job = settings.convert
    if not job.source or not job.target:
        raise UserError("convert.source and convert.target must both be given")
    kind = formats.require_model(job.source)
    require_apart(resolve_output(job.target, "convert.target"), "convert.target", [("convert.source", job.source)])
    if Path(job.target).exists():
        raise UserError(f"{job.target} exists: remove it or choose another convert.target")
    to = job.to or ("megatron" if kind == "hf" else "hf")
    if to == kind:
        raise UserError(
            f"convert.to={to}, but {job.source} is in {_NAMES[kind]} format already: leave convert.to out, or copy the"
            " directory"
        )
    convert(settings, job.source, job.target, to)
    print(f"wrote {job.target} in {_NAMES[to]} format, from {_NAMES[kind]}")
