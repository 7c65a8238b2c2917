"""The verb `calibrate`: HARC's realignment of a merge's routers (docs/merge.md)."""

import dataclasses
from pathlib import Path

import torch.distributed as dist

from megatron_bai import config
from megatron_bai.checkpoint import formats
from megatron_bai.checkpoint.output_paths import require_apart, resolve_output
from megatron_bai.distributed import backend
from megatron_bai.model import build
from megatron_bai.model.architecture import read_architecture


def run(settings: config.Config) -> None:
    """Write `calibrate.path` with calibrated routers to `calibrate.output`. *Collective* under torchrun.

    Raises:
        UserError: settings, checkpoints, rows or a layout that cannot be used; nothing is written then.
    """
    from megatron_bai.data.row_texts import read_texts
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint
    from megatron_bai.rl.calibrate import build_calibrated, validate_calibrate
    from megatron_bai.rl.run_task import load_tokenizer

    job = settings.calibrate
    validate_calibrate(job, settings.parallel)
    sources = [("calibrate.path", job.path), *(("calibrate.parents", parent) for parent in job.parents)]
    for _, directory in sources:
        formats.require_model(directory)
        formats.require_complete(directory)
    require_apart(resolve_output(job.output, "calibrate.output"), "calibrate.output", sources)
    settings = dataclasses.replace(settings, model=read_architecture(job.path))
    rows = settings.data if isinstance(settings.data, config.Dataset) else config.Dataset()
    tokenizer = load_tokenizer(Path(job.path))
    texts = [read_texts(path, "calibrate.prompts", rows, tokenizer, job.count) for path in job.prompts]
    device = backend.init_backend(settings.backend)
    try:
        build.validate_layout(settings.model, settings.parallel, dist.get_world_size())
        build.init_parallel(settings.parallel, seed=0, timeout_s=settings.backend.timeout_s)
        with formats.open_checkpoint(job.path) as reader:
            actor, layers = build_calibrated(settings, device, texts)
            info = {"calibrated_from": str(job.path), "calibrated_to": list(job.parents)}
            source, unchanged = reader.path, reader.require_unchanged
            if formats.checkpoint_format(source) == "hf":
                hf_checkpoint.save_hf(
                    actor.modules, actor.architecture, job.output, source, info, verify_origin=unchanged
                )
            else:
                megatron_checkpoint.save(actor, job.output, source, info, unchanged)
        if dist.get_rank() == 0:
            for each in layers:
                found = each.calibration
                print(
                    f"layer {each.layer}: divergence from the parents' routers {found.before:.3g} → {found.after:.3g} "
                    f"nats, router moved by {each.moved:.1%}, {found.iterations} iterations to {found.residual:.1g}"
                )
            print(f"wrote {job.output}")
    finally:
        backend.shutdown_backend()
