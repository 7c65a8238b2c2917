"""Modules with the parameters that Transformer Engine's have, and their arithmetic without its kernels."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm


class _Module(torch.nn.Module):
    """A module with the state that Transformer Engine keeps for eight bits: none, since nothing is computed in them."""

    fp8 = fp8_calibration = False

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype, self.fp8_meta = dtype, {"fp8_checkpoint": False}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0

    def add(self, name: str, *shape: int) -> None:
        """Register a parameter of ones."""
        self.register_parameter(name, torch.nn.Parameter(torch.ones(*shape, dtype=self.dtype)))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: int = 0,
        eps: float = 1e-5,
        params_dtype: torch.dtype = torch.float32,
        hidden_size: int = 0,  # its older name
        **_: Any,
    ) -> None:
        super().__init__(params_dtype)
        self.eps = eps
        self.add("weight", normalized_shape or hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


LayerNorm = RMSNorm


class Linear(_Module):
    """A column-parallel layer holds a part of the rows, a row-parallel one a part of the columns."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        super().__init__(params_dtype)
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.add("weight", rows, columns)
        if bias:
            self.add("bias", rows)
        else:
            self.bias = torch.empty(0)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        if self.return_bias:
            return linear(x, self.weight), self.bias
        return linear(x, self.weight, self.bias if self.use_bias else None)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5, **named: Any) -> None:
        super().__init__(in_features, out_features, **named)
        self.eps = eps
        self.add("layer_norm_weight", in_features)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        super().__init__(params_dtype)
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        for i in range(num_gemms):
            self.add(f"weight{i}", out_features, in_features)
            if bias:
                self.add(f"bias{i}", out_features)

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        biases = [getattr(self, f"bias{i}") if self.use_bias else None for i in range(self.num_gemms)]
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        added = [None] * self.num_gemms if self.return_bias else biases
        parts = zip(x.split(m_splits), weights, added, strict=True)
        out = torch.cat([linear(part, weight, bias) for part, weight, bias in parts])
        return (out, biases) if self.return_bias else out


class DotProductAttention(_Module):
    """Causal attention `[T, B, heads, dim]` → `[T, B, heads · dim of values]`, in full or over a window."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        window_size: tuple[int, int] | None = None,
        tp_size: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale, self.left = softmax_scale, window_size[0] if window_size else -1
        if softmax_type == "learnable":
            self.add("softmax_offset", num_attention_heads // tp_size)
        else:
            self.softmax_offset = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        groups = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(groups, 2) for tensor in (key, value))
        scores = torch.einsum("tbhd,sbhd->bhts", query, key) * (self.scale or query.shape[-1] ** -0.5)
        distance = torch.arange(len(query))[:, None] - torch.arange(len(key))
        outside = (distance < 0) | ((distance > self.left) if self.left >= 0 else False)
        scores = scores.masked_fill(outside, float("-inf"))
        if self.softmax_offset is not None:
            offsets = self.softmax_offset[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, offsets.to(scores.dtype)], -1)
        weights = scores.softmax(-1)[..., : len(key)]
        return torch.einsum("bhts,sbhd->tbhd", weights, value).flatten(2)


distributed = SimpleNamespace(CudaRNGStatesTracker=object)
ops = SimpleNamespace(Sequential=torch.nn.Sequential, FusibleOperation=torch.nn.Module)
