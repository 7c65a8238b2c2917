"""Canonical names: the same weight is saved under many names, split and stacked in many ways.

A *canonical* tensor holds one kind of parameter of the whole model: its layers are stacked on the first axis, the
experts of a layer on the next, the rows of the up projection after those of the gate projection.
`canonical_box` says which box of which canonical tensor a checkpoint's own (*native*) tensor is. With L layers, E
experts, I rows of gate and H columns:

    Megatron-Core 0.16, all canonical `decoder.layers.mlp.experts.experts.linear_fc1.weight` [L, E, 2I, H]
        decoder.layers.mlp.experts.experts.linear_fc1.weight            [L, E, 2I, H]  the default
        decoder.layers.3.mlp.experts.experts.linear_fc1.weight          [E, 2I, H]     layers that differ in kind
        decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w, _v  [I, H]         `singleton_local_shards`
    Hugging Face, all canonical `model.layers.mlp.experts.gate_up_proj` [L, E, 2I, H]
        model.layers.3.mlp.experts.gate_up_proj                         [E, 2I, H]     as transformers 5 holds it
        model.layers.3.mlp.experts.7.gate_proj.weight, up_proj.weight   [I, H]         as it is published
    gpt-oss: [L, E, H, 2I], the biases [L, E, 2I], in the order that its checkpoints have
        model.layers.3.mlp.experts.gate_up_proj, gate_up_proj_bias      [E, H, 2I], [E, 2I]

Under Transformer Engine a norm may be fused into the linear layer behind it and is then saved as that layer's
`layer_norm_weight`; Megatron's local layers save some under the fused name although they are not fused. A layer has one
of the two, so both mean the norm.
"""

import re
from dataclasses import dataclass

from megatron_bai.checkpoint.boxes import Box
from megatron_bai.compat.releases import MEGATRON, MEGATRON_CORE

LAYER, EXPERT = "layers", "experts"  # the leading axes of a canonical tensor

_LAYERS = re.compile(r"^(.*?\blayers\.)(?:(\d+)\.)?(.*)$")
_NUMBERED_EXPERT = re.compile(r"\bexperts\.(\d+)\.")
_STACKED_EXPERTS = re.compile(r"\bexperts\.experts\.|\bmlp\.experts\.(gate_up_proj|down_proj)(_bias)?$")
_HALVES = re.compile(r"(?<=\blinear_fc1\.)(weight|bias)_([wv])$")
_HF_HALVES = re.compile(r"(?<=\bmlp\.experts\.)(gate|up)_proj\.weight$")
_HF_WHOLE = re.compile(r"(?<=\bmlp\.experts\.)(gate_up_proj|down_proj)\.weight$")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# The layer within one of multi-token prediction, whose name differs between releases of Megatron-Core.
_MTP_LAYER = re.compile(rf"^(mtp\.layers\.)({'|'.join(sorted({row.mtp_layer for row in MEGATRON.values()}))})\.")


@dataclass(frozen=True, slots=True)
class CanonicalBox:
    """A native tensor as a box of a canonical one; all in elements.

    Attributes:
        name: of the canonical tensor.
        axes: its leading axes, `LAYER` and `EXPERT` where it has them.
        origin: position of the native element [0, …, 0] in the canonical tensor.
        sizes: of the box: a 1 for each index in the native name, then the native shape.
    """

    name: str
    axes: tuple[str, ...]
    origin: tuple[int, ...]
    sizes: tuple[int, ...]

    def to_canonical(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
        """Convert a box of the native tensor to canonical coordinates.

        Args:
            offsets: of the box in the native tensor, one for each of its axes.
            sizes: of the box, likewise.

        Returns:
            The box in the canonical tensor, with size 1 in the axes whose index is in the native name.
        """
        num_leading = len(self.origin) - len(offsets)
        low = tuple(o + n for o, n in zip(self.origin, (0,) * num_leading + offsets, strict=True))
        return low, (1,) * num_leading + sizes

    def to_native(self, box: Box, ndim: int) -> Box:
        """Convert a canonical box inside this one to coordinates of the native tensor, which has `ndim` axes.

        Args:
            box: in the canonical tensor.
            ndim: number of axes of the native tensor; the canonical one has one more for each index in the native name.
        """
        num_leading = len(self.origin) - ndim
        offsets = zip(box[0][num_leading:], self.origin[num_leading:], strict=True)
        return tuple(low - o for low, o in offsets), box[1][num_leading:]

    @property
    def layers(self) -> range | None:
        """The decoder layers in it; None for layers of multi-token prediction, which are counted apart."""
        if LAYER not in self.axes or self.name.startswith("mtp."):
            return None
        return range(self.origin[0], self.origin[0] + self.sizes[0])


def canonical_box(key: str, shape: tuple[int, ...]) -> CanonicalBox:
    """Return the box that the tensor called `key` is; a name that follows no rule is canonical itself.

    Args:
        key: native name, of Megatron-Core or Hugging Face.
        shape: of the whole native tensor.
    """
    name, half = key, None
    axes: tuple[str, ...] = ()
    index: tuple[int, ...] = ()
    if (match := _LAYERS.match(name)) and (match[2] or shape):  # without a number they are stacked in the tensor
        name, axes, index = match[1] + match[3], (LAYER,), (int(match[2]),) if match[2] else ()
    name = _HF_WHOLE.sub(r"\1", name)
    if (match := _NUMBERED_EXPERT.search(name)) and (index or not axes):
        name = name[: match.start(1)] + name[match.end() :]
        axes, index = (*axes, EXPERT), (*index, int(match[1]))
        if match := _HF_HALVES.search(name):
            name, half = name[: match.start()] + "gate_up_proj", ("gate", "up").index(match[1])
        name = _HF_WHOLE.sub(r"\1", name)
    elif _STACKED_EXPERTS.search(name) and len(shape) >= len(axes) - len(index) + 1:
        axes = (*axes, EXPERT)
    if match := _HALVES.search(name):
        name, half = name[: match.end(1)], "wv".index(match[2])
    for fused, norm in _FUSED_NORMS.items():
        name = name.replace(fused, norm)
    name = _MTP_LAYER.sub(rf"\1{MEGATRON[MEGATRON_CORE].mtp_layer}.", name)
    origin = [*index, *(0 for _ in shape)]
    if half and len(origin) > len(axes):
        origin[len(axes)] = shape[len(axes) - len(index)]  # the rows of `up` follow as many of `gate`
    return CanonicalBox(name, axes, tuple(origin), (1,) * len(index) + shape)
