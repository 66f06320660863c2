"""Reading the tensors of a hub folder by name: one safetensors file or many with an index, FP8 or not.

Nothing is unpickled. FP8 weights (report section 3.3.2) come with one fp32 scale for each block of 128 x 128 values,
stored as `{name}_scale_inv`; despite its name it is the factor: w = fp8 * scale.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .durable import CheckpointError
from .kernels import dequantize_blocks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALE, BLOCK = "_scale_inv", 128
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class StoredTensors:
    """The tensors in `folder` by their hub names, read when asked for. Scales belong to their weights and have no name.

    Raises `CheckpointError` for a missing, truncated or pickled file, naming it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._where = {}
        for file in _weight_files(folder):
            try:
                opened = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read: truncated or no safetensors file ({error})") from error
            self._where |= {name: (file, opened) for name in opened.keys()
                            if 0 not in opened.get_slice(name).get_shape()}   # transformers writes empty shared experts
        self._scales = {name for name in self._where if name.endswith(SCALE)}
        self.names = self._where.keys() - self._scales

    def file(self, name: str) -> Path:
        return self._where[name][0]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, FP8 weights times their scales in fp32 (so that the caller rounds once)."""
        tensor = self._where[name][1].get_tensor(name)
        is_fp8, is_scaled = tensor.dtype is torch.float8_e4m3fn, name + SCALE in self._scales
        if is_fp8 != is_scaled:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} in {self.file(name)} is {kind} and has {'a' if is_scaled else 'no'} "
                                  f"{name}{SCALE}; FP8 weights need their scales and others have none")
        if not is_fp8:
            return tensor
        try:
            return dequantize_blocks(tensor, self._where[name + SCALE][1].get_tensor(name + SCALE))
        except ValueError as error:
            raise CheckpointError(f"{name} in {self.file(name)}: {error}") from error

    def compare(self, shapes: Mapping[str, list[int]], optional: Set[str]) -> None:
        """Raises `CheckpointError` naming the first tensor that is missing, superfluous or of another shape."""
        missing = sorted(shapes.keys() - self.names - optional)
        if missing:
            raise CheckpointError(f"{self.folder} has no tensor {missing[0]}{_more(missing)}; "
                                  "its config.json asks for it")
        extra = sorted(name for name in self._where if name.removesuffix(SCALE) not in shapes)
        if extra:
            raise CheckpointError(f"{extra[0]} in {self.file(extra[0])}{_more(extra)} "
                                  "has no place in the model of config.json")
        for name in self.names:
            found = self._where[name][1].get_slice(name).get_shape()
            if found != shapes[name]:
                raise CheckpointError(f"{name} in {self.file(name)} has shape {found}; "
                                      f"config.json asks for {shapes[name]}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: Path) -> list[Path]:
    index, files = folder / INDEX, [folder / SINGLE]
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / shard for shard in shards})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of shards ({type(error).__name__}: {error})") from error
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing{_hint_at_pickles(folder)}")
    return files


def _hint_at_pickles(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    return f"; {pickled[0]} is not opened, for unpickling runs code: convert it to safetensors" if pickled else ""
