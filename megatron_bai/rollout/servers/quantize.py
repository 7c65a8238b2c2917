"""The values that quantised weights have, in the dtype they come in: what servers get with `rollout.quantize`.

A server that keeps weights in few bits and multiplies in its own dtype (W8A16) computes with exactly these values, so
the gap to the training engine is that of the format, on any device and without its kernels. Embeddings, output layer,
norms and routers stay as they are, as in the quantised checkpoints of Qwen3.
"""

import torch
import torch.nn.functional as F  # noqa: N812, the name that torch code has for it

FORMATS = ("fp8", "int8")
_BLOCK = 128  # of fp8: one scale for this many rows and columns (DeepSeek-V3, arXiv 2412.19437, section 3.3)
_NOT_QUANTIZED = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "norm.weight")


def fake_quantize(name: str, tensor: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round a weight to the nearest values of `fmt`, ties to the even one. The dtype stays.

    `fp8`: e4m3 with a scale for each block of 128 × 128 elements, whose largest magnitude becomes 448. `int8`: −127 …
    127 with a scale for each row (output channel).

    Args:
        name: Hugging Face's.
        tensor: `[out, in]`, any float dtype; returned unchanged where `name` is of a weight that is not quantised.
        fmt: of `FORMATS`, or "" to change nothing.
    """
    if not fmt or name.endswith(_NOT_QUANTIZED):
        return tensor
    values = tensor.float()
    if fmt == "int8":
        scale = _scale(values.abs().amax(1, keepdim=True), 127.0)
        return ((values / scale).round() * scale).to(tensor.dtype)
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    # [row block, 128, column block, 128]
    blocks: torch.Tensor = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = _scale(blocks.abs().amax((1, 3), keepdim=True), 448.0)
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(tensor.dtype)


def _scale(largest: torch.Tensor, top: float) -> torch.Tensor:
    """Compute the scale that maps the largest magnitude to `top`; 1 where all elements are 0."""
    return torch.where(largest > 0, largest / top, 1.0)
