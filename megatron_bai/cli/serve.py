"""The verb `serve`: SGLang on a checkpoint, until interrupted."""

import time
from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model import megatron_checkpoint
from megatron_bai.model.convert import convert
from megatron_bai.rollout.servers.sglang_server import SGLangServer


def run(settings: config.Config) -> None:
    """Serve `serve.checkpoint`, converted to Hugging Face format first where it is Megatron's.

    Raises:
        UserError: no such checkpoint, or the server did not start or ended by itself.
    """
    source = settings.serve.checkpoint or settings.merge.output
    if not source:
        raise UserError("serve.checkpoint is empty: give a Hugging Face or Megatron checkpoint")
    if not Path(source).is_dir():
        raise UserError(f"no checkpoint at {source}")
    kind = backend.select_device(settings.backend).kind
    directory = Path(source)
    manifest.read_info(source)
    if megatron_checkpoint.checkpoint_format(source) == "hf":
        manifest.verify_weights(source)  # SGLang would not notice; `convert` does so itself
    else:
        directory = Path(settings.run.dir) / "serve" / "model"
        # Made anew each time: the source may have changed since the last.
        manifest.require_info(source)
        convert(settings, source, directory, "hf")
    log = Path(settings.run.dir) / "serve" / "server.log"
    with SGLangServer(directory, settings.rollout, log, kind, text=True) as server:
        print(f"serving {source} at {server.url} (log: {log}); Ctrl-C stops it", flush=True)
        while True:
            time.sleep(1)
            server.check_alive()
