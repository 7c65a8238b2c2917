"""The decoder layers of each pipeline stage."""

from megatron_bai.config import Parallel
from megatron_bai.errors import UserError


def chunk_sizes(num_layers: int, parallel: Parallel) -> list[int]:
    """Return the number of decoder layers of each chunk, in the model's order.

    Chunk v of stage p is the (v·P + p)-th of P stages with V chunks each; where V is 1 a stage is one chunk.

    Args:
        num_layers: of the decoder.
        parallel: the layout, with `stage_layers` where the chunks are not alike.

    Raises:
        UserError: `parallel.stage_layers` does not describe these layers and stages.
    """
    chunks = parallel.pipeline * parallel.virtual_pipeline
    sizes = list(parallel.stage_layers)
    if not sizes:
        return [num_layers // chunks] * chunks
    if len(sizes) != chunks:
        raise UserError(
            f"parallel.stage_layers has {len(sizes)} numbers: parallel.pipeline × parallel.virtual_pipeline is {chunks}"
        )
    if sum(sizes) != num_layers:
        raise UserError(f"parallel.stage_layers are {sum(sizes)} layers, the model has {num_layers}")
    return sizes


def stage_layers(num_layers: int, parallel: Parallel, stage: int) -> list[int]:
    """Return the decoder layers of a stage, counted from 0.

    Args:
        num_layers: of the decoder.
        parallel: the layout.
        stage: index of the stage.
    """
    sizes = chunk_sizes(num_layers, parallel)
    starts = [sum(sizes[:chunk]) for chunk in range(len(sizes))]
    return [
        layer
        for chunk in range(stage, len(sizes), parallel.pipeline)
        for layer in range(starts[chunk], starts[chunk] + sizes[chunk])
    ]
