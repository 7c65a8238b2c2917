"""The verb `convert`: Megatron torch_dist ↔ Hugging Face safetensors, in one process."""

from pathlib import Path

import torch.distributed as dist

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model import build, hf_checkpoint, megatron_checkpoint


def convert(settings: config.Config, source: str | Path, target: str | Path, to: str) -> None:
    """Load a checkpoint of either format and write it in format `to` (`hf` or `megatron`).

    The whole model is held in memory once. The architecture comes from the source's `config.json`.

    Args:
        settings: of which `backend` alone is used: device and dtype of the model.
        source: directory of the checkpoint, with the tokenizer's files, which are copied.
        target: directory to write, complete or not at all; an earlier checkpoint there is replaced.
        to: `hf` or `megatron`.

    Raises:
        UserError: there is no complete checkpoint of a supported architecture at `source`, the target cannot be
            written, or there are several processes.
    """
    if not Path(source).is_dir():
        raise UserError(f"no checkpoint at {source}")
    manifest.read_info(source)  # before its configuration decides how much memory is asked for
    kind = megatron_checkpoint.checkpoint_format(source)
    whole = config.Config(backend=settings.backend, model=hf_checkpoint.read_config(source))
    device = backend.init_backend(whole.backend)
    try:
        if dist.get_world_size() > 1:
            raise UserError("convert runs in one process: start it without torchrun")
        build.init_parallel(whole.parallel, seed=0)
        actor = build.build_actor(whole, device, train=False)
        if kind == "hf":
            hf_checkpoint.load_hf(actor.modules, whole.model, source)
        else:
            megatron_checkpoint.load(actor, source)
        info = {"converted_from": str(source)}
        if to == "hf":
            hf_checkpoint.save_hf(actor.modules, whole.model, target, source, info)
        else:
            megatron_checkpoint.save(actor, target, source, info)
    finally:
        backend.shutdown_backend()
