"""Read the tensors of a Hugging Face checkpoint as a family publishes them, also where experts are fused."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_bai.checkpoint import hf_files
from megatron_bai.checkpoint.opened_files import OpenedFiles
from megatron_bai.errors import UserError
from megatron_bai.model import hf_mapping
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.param_mapping import EMBEDDING, ParamMapping

_OUTPUT_LAYER = "lm_head.weight"


class HFReader:
    """The tensors of a safetensors checkpoint by name, each read on request."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._file_of = hf_files.read_weight_map(self.directory)
        names = {hf_files.INDEX, *(self._file_of.values() or [hf_files.SINGLE])}
        self.opened = OpenedFiles(self.directory, names)
        if not self._file_of:
            try:
                with safe_open(self.directory / hf_files.SINGLE, "pt") as file:
                    self._file_of = dict.fromkeys(file.keys(), hf_files.SINGLE)
            except (OSError, SafetensorError) as error:
                raise UserError(f"no readable safetensors checkpoint at {directory}: {error}") from None

    def tensor_names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._file_of)

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, on the CPU.

        Raises:
            UserError: there is none of this name, or its file cannot be read.
        """
        try:
            tensor: torch.Tensor = self._open(name).get_tensor(name)
            return tensor
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(f"cannot read tensor {name} from {self.directory}: {error}") from None

    def _open(self, name: str) -> Any:
        """Open the file of a tensor, once."""
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = safe_open(self.directory / file, "pt")
            self.opened.require_same(file, os.stat(self.directory / file))
        return self._files[file]

    def fused_name(self, mapping: ParamMapping, index: tuple[int, ...]) -> str:
        """Return the name of the tensor here that holds a slice with those of other experts; empty where it is not.

        Args:
            mapping: of the kind of parameter.
            index: of the slice.
        """
        name = mapping.fused_name(index)
        return next((each for each in (name, f"{name}.weight") if name and each in self._file_of), "")

    def has_fused_experts(self, model: Architecture) -> bool:
        """Return whether experts of a layer are in one tensor, as transformers 5 holds them in memory."""
        return any(
            self.fused_name(kind, (layer,))
            for kind in model.mappings.values()
            if kind.fused
            for layer in model.layers(kind.layers)
        )

    def _names(self, mapping: ParamMapping, index: tuple[int, ...]) -> list[str]:
        """Return the names of a slice's tensors here: the published ones unless only others are there."""
        names, others = mapping.names(index), mapping.names(index, other=True)
        here = self._file_of.keys()
        return others if others and not here & set(names) and here >= set(others) else names

    def require_tensors_of(self, model: Architecture, compare_tied: bool = True) -> None:
        """Refuse a checkpoint that lacks a tensor of a model, or has others or of another shape.

        What its family drops may be there. A tied model may have its output layer stored a second
        time, as torch's own format has it.

        Args:
            model: the architecture.
            compare_tied: read that output layer, which must be the embedding; else headers alone are read.

        Raises:
            UserError: names the first of them.
        """
        needed: dict[str, tuple[int, ...]] = {}
        for kind in model.mappings.values():
            needed |= self._needed_shapes(kind, model)
        present = {name for name in self.tensor_names() if not model.family.is_dropped(name, model)}
        if model.tied and _OUTPUT_LAYER in present - needed.keys():
            if compare_tied:
                self._require_tied(model)
            present.remove(_OUTPUT_LAYER)
        if difference := sorted(needed.keys() ^ present):
            state = "missing" if difference[0] in needed else "unknown"
            raise UserError(
                f"{self.directory}: {len(difference)} tensors missing or unknown, first {difference[0]} ({state})"
            )
        for name, shape in needed.items():
            self._require_shape(name, self._shape(name), shape)

    def _needed_shapes(self, kind: ParamMapping, model: Architecture) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors here that a kind of parameter is read from."""
        slice_shape, found = kind.shape(model), {}
        parts = kind.published_shapes(model)
        for index in hf_mapping.slice_indices(kind, model):
            names = self._names(kind, index)
            fused = self.fused_name(kind, index)
            if fused and not set(names) & self._file_of.keys():
                found[fused] = (model.num_experts, *slice_shape)
            else:
                found |= zip(names, parts, strict=True)
        return found

    def _require_tied(self, model: Architecture) -> None:
        """Raise a UserError unless the stored output layer of a tied model is its embedding, element for element."""
        (name,) = model.mappings[EMBEDDING].hf
        if name in self._file_of and not torch.equal(self.read_tensor(name), self.read_tensor(_OUTPUT_LAYER)):
            raise UserError(
                f"{self.directory}: {_OUTPUT_LAYER} is not {name}, and config.json says that they are one: say"
                " tie_word_embeddings=false there, or remove the tensor"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its file's header.

        Raises:
            UserError: its file cannot be read.
        """
        try:
            return tuple(self._open(name).get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read tensor {name} from {self.directory}: {error}") from None

    def read_slice(self, mapping: ParamMapping, index: tuple[int, ...], model: Architecture) -> torch.Tensor:
        """Read one slice of a kind of parameter as Megatron has it.

        Args:
            mapping: of the kind.
            index: of the slice, `()`, `(layer,)` or `(layer, expert)`.
            model: the architecture.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        shape, names = mapping.shape(model), self._names(mapping, index)
        if names[0] not in self._file_of and (fused := self.fused_name(mapping, index)):
            self._require_shape(fused, self._shape(fused), (model.num_experts, *shape))
            return self._open(fused).get_slice(fused)[index[-1]]  # type: ignore[no-any-return]
        shapes = mapping.published_shapes(model)
        if mapping.experts_together:
            parts = zip(names, shapes, strict=True)
            return mapping.merge([self._read_expert(name, needed, index[-1]) for name, needed in parts], model)
        tensors = [self.read_tensor(name) for name in names]
        for name, tensor, needed in zip(names, tensors, shapes, strict=True):
            self._require_shape(name, tuple(tensor.shape), needed)
        return mapping.merge(tensors, model)

    def _read_expert(self, name: str, shape: tuple[int, ...], expert: int) -> torch.Tensor:
        """Read one expert's part of a tensor that has all of a layer, of shape `shape`."""
        if name not in self._file_of:
            raise UserError(f"cannot read tensor {name} from {self.directory}: there is none")
        self._require_shape(name, self._shape(name), shape)
        try:
            return self._open(name).get_slice(name)[expert]  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read tensor {name} from {self.directory}: {error}") from None

    def _require_shape(self, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
        """Raise a UserError unless a tensor has the shape that the model needs."""
        if found != needed:
            raise UserError(f"{self.directory}: {name} has shape {found}, the model needs {needed}")
