"""Fill a model from a checkpoint of either format."""

from pathlib import Path

from megatron_bai.checkpoint import formats
from megatron_bai.model import hf_checkpoint, megatron_checkpoint
from megatron_bai.model.architecture import require_same
from megatron_bai.model.build import MegatronModel


def load_weights(model: MegatronModel, directory: str | Path) -> None:
    """Fill a model, and its optimizer's master weights, from a complete checkpoint of its architecture. *Collective*.

    Args:
        model: in place; in any layout.
        directory: of the checkpoint, safetensors or torch_dist.

    Raises:
        UserError: there is no complete checkpoint, it is not what was written, or of another architecture.
    """
    if formats.checkpoint_format(directory) != "hf":
        megatron_checkpoint.load(model, directory)
        return
    require_same(directory, model.architecture)
    hf_checkpoint.load_hf(model.modules, model.architecture, directory)
    megatron_checkpoint.reload_master_weights(model)
