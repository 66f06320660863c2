"""Writing tensors as the hub stores them: shards of safetensors and an index, in BF16, FP32 or FP8.

    model.layers.3.self_attn.q_a_proj.weight             E4M3 codes [1536, 7168]
    model.layers.3.self_attn.q_a_proj.weight_scale_inv   FP32 [12, 56], one for each block of 128 x 128

"fp8" is the layout of the released weights (report section 3.3, README_WEIGHTS.md): the matrices of attention, FFNs and
experts are codes with scales, everything else is BF16. A scale is max |w| / 448 of its block, not rounded to a power of
two, and multiplies (w = code * scale) in spite of its name. The last block of a row or column may be short: 576 rows
have 5. The routers' biases are FP32 in every format.

Codes that are read and written again stay the same wherever a block reaches code 448, as every block does whose scale
was made by this rule (or whose |w| are all below 1e-4). Read in FP32, such a scale stays the same too; in BF16 it moves
with the largest weight, by a part in 256 at most and only the first time. Power-of-two scales (V3.1) leave 448 unused:
writing gives new scales and codes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .durable import CheckpointError
from .kernels import quantize_blocks
from .stored import BLOCK, INDEX, SCALE

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}   # of what is not quantised
QUANTISED = re.compile(r"\.(self_attn|mlp)\.(.+\.)?\w+_(proj|proj_with_mqa)\.weight$")
BIAS = "e_score_correction_bias"
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK]}

Read = Callable[[str], Tensor]   # a tensor of the model by its hub name


class Shards:
    """How tensors are laid out in files: consecutive ones share a shard of at most `limit` bytes (or one tensor, with
    its scales). `shapes` names them and gives their shapes. Raises `CheckpointError` for an unknown format.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: str, limit: int):
        if dtype not in FORMATS:
            *others, last = FORMATS
            raise CheckpointError(f"dtype is {dtype!r}; a checkpoint is saved as {', '.join(others)} or {last}")
        self.dtype, self.total_size = dtype, 0
        shards, room = [], 0
        for name, shape in shapes.items():
            size = self._bytes(name, shape)
            if not shards or size > room:
                shards.append([])
                room = limit
            shards[-1].append(name)
            room -= size
            self.total_size += size
        self.files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}

    def config(self) -> dict:
        """What config.json says about the format."""
        kind = str(FORMATS[self.dtype]).removeprefix("torch.")
        return {"torch_dtype": kind} | ({"quantization_config": QUANTIZATION} if self.dtype == "fp8" else {})

    def index(self) -> dict:
        """The content of model.safetensors.index.json; scales are tensors like others."""
        homes = {name: file for file, names in self.files.items() for name in names}
        scales = {name + SCALE: file for name, file in homes.items() if self.quantises(name)}
        return {"metadata": {"total_size": self.total_size}, "weight_map": homes | scales}

    def write(self, folder: Path, read: Read) -> None:
        """Writes the shards and the index. One shard is in memory at a time, beside what `read` holds."""
        for file, names in self.files.items():
            shard: dict[str, Tensor] = {}
            for name in names:
                shard |= self._stored(name, read(name))
            save_file(shard, folder / file, metadata={"format": "pt"})
        write_json(folder / INDEX, self.index())

    def quantises(self, name: str) -> bool:
        """Whether this tensor is stored as codes and scales."""
        return self.dtype == "fp8" and QUANTISED.search(name) is not None

    def _stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Always new memory: safetensors refuses tensors that share it, as MTP's embedding and head do."""
        if not self.quantises(name):
            return {name: tensor.to("cpu", self._plain(name), copy=True)}
        codes, scales = quantize_blocks(tensor)
        return {name: codes.cpu(), name + SCALE: scales.cpu()}

    def _bytes(self, name: str, shape: Sequence[int]) -> int:
        size = math.prod(shape)
        if not self.quantises(name):
            return size * self._plain(name).itemsize
        return size + torch.float32.itemsize * math.prod(-(-length // BLOCK) for length in shape)

    def _plain(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is not quantised."""
        return torch.float32 if name.endswith(BIAS) else FORMATS[self.dtype]


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
