"""The values that quantised weights have, in the dtype they come in: what servers get with `rollout.quantize`.

A server that keeps weights in few bits and multiplies in its own dtype (W8A16) computes with exactly these values, so
the gap to the training engine is that of the format, on any device and without its kernels. Embeddings, output layer,
norms, biases, sinks and routers with their expert bias stay as they are, as in the quantised checkpoints of Qwen3 and
GLM.
"""

import torch
import torch.nn.functional as F  # noqa: N812, the name that torch code has for it

FORMATS = ("fp8", "int8")
_BLOCK = 128  # of fp8: one scale for this many rows and columns (DeepSeek-V3, arXiv 2412.19437, section 3.3)
# Endings: embeddings, output layers, routers and gates of shared experts; norms and biases have one axis, but for
# those of experts that are in one tensor
_NOT_QUANTIZED = ("embed_tokens.weight", "word_embeddings.weight", "lm_head.weight", "gate.weight", "router.weight")


def fake_quantize(name: str, tensor: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round a weight to the nearest values of `fmt`, ties to the even one. The dtype stays.

    `fp8`: e4m3 with a scale for each block of 128 × 128 elements, whose largest magnitude becomes 448. `int8`: −127 …
    127 with a scale for each row (output channel).

    Args:
        name: Hugging Face's.
        tensor: `[out, in]`, or `[experts, in, out]` as gpt-oss has them, any float dtype; returned unchanged where
            `name` is of a weight that is not quantised, or where it has one axis.
        fmt: of `FORMATS`, or "" to change nothing.
    """
    if not fmt or tensor.dim() < 2 or name.endswith((*_NOT_QUANTIZED, "_bias")):
        return tensor
    if tensor.dim() == 3:
        return torch.stack([fake_quantize(name, expert.T, fmt).T for expert in tensor]).contiguous()
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
