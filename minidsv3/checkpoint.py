"""Weights in the hub's layout: a folder that transformers, inference engines and the official demo's converter read.

    config.json   model-0000i-of-0000n.safetensors   model.safetensors.index.json   [tokenizer.json, tokenizer_config.json]

Two things differ between the memory and the hub (names: DeepSeek-V3's README_WEIGHTS.md). Experts are fused in memory
and separate on the hub, and the hub repeats the embedding and the head inside every MTP module, where we share them.
The routers' biases are fp32 in every checkpoint; FP8 weights come with a scale for each block of 128 x 128 (report 3.3.2).
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .config import ModelConfig
from .durable import CheckpointError, whole_folder
from .model import Transformer

__all__ = ["CheckpointError", "dequantize_blocks", "hub_tensors", "load_checkpoint", "load_tokenizer", "save_checkpoint"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BIAS, SCALE = "e_score_correction_bias", "_scale_inv"
BLOCK = 128
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OURS = ("config.json", "generation_config.json", INDEX, "model*.safetensors", "tokenizer.json", "tokenizer_config.json")


def hub_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's values under the hub's names, as views: reading them saves a checkpoint, writing them loads one."""
    for name, tensor in model.state_dict().items():
        experts, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, -1))):
                yield f"{experts}.{expert}.gate_proj.weight", gate
                yield f"{experts}.{expert}.up_proj.weight", up
        elif experts.endswith(".experts"):
            for expert, down in enumerate(tensor):
                yield f"{experts}.{expert}.down_proj.weight", down
        else:
            yield name, tensor


# ---- saving -----------------------------------------------------------------------------------------------------

def save_checkpoint(model: Transformer, path: str | Path, dtype: str = "bf16", tokenizer: Tokenizer | None = None,
                    shard_bytes: int = 5 * 10**9) -> None:
    """Writes the model as the hub's folder `path`, in bf16 or fp32 (routers' biases: fp32), tokenizer included if given.

    The folder appears whole or not at all and may take the place of an older checkpoint, never of anything else. A shard
    holds at most `shard_bytes` bytes (or one tensor) and is all that is in memory beside the model. Raises
    `CheckpointError` for another dtype, a tokenizer with more ids than the model, a folder of other things, a full disk.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; a checkpoint is saved as {' or '.join(DTYPES)}")
    _refuse_to_replace(path)
    shards = _shards(model, DTYPES[dtype], shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    size = sum(_bytes(tensor, name, DTYPES[dtype]) for shard in shards for name, tensor in shard)
    names = {name: file for file, shard in zip(files, shards) for name, _ in shard}
    with whole_folder(path) as new:
        _write_json(new / "config.json", model.config.to_hub() | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")})
        for file, shard in zip(files, shards):
            stored = {name: tensor.to("cpu", _stored_dtype(name, DTYPES[dtype]), copy=True) for name, tensor in shard}
            save_file(stored, new / file, metadata={"format": "pt"})
        _write_json(new / INDEX, {"metadata": {"total_size": size}, "weight_map": names})
        if tokenizer is not None:
            _write_tokenizer(new, tokenizer, model.config)


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(BIAS) else dtype


def _bytes(tensor: Tensor, name: str, dtype: torch.dtype) -> int:
    return tensor.numel() * _stored_dtype(name, dtype).itemsize


def _shards(model: Transformer, dtype: torch.dtype, limit: int) -> list[list[tuple[str, Tensor]]]:
    """Consecutive tensors, as many as fit into `limit` bytes."""
    shards, room = [], 0
    for name, tensor in hub_tensors(model):
        size = _bytes(tensor, name, dtype)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append((name, tensor))
        room -= size
    return shards


def _refuse_to_replace(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder, so choose another name")
    others = sorted(file.name for file in path.iterdir() if not any(file.match(pattern) for pattern in OURS))
    if others:
        raise CheckpointError(f"{path} holds what no checkpoint does ({', '.join(others[:3])}); "
                              "choose an empty folder, a new one or one with an older checkpoint")


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """tokenizer.json and what transformers' AutoTokenizer wants beside it."""
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model {config.vocab_size}; "
                              "it must be the tokenizer that the model was trained with")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings,
        "bos_token": tokenizer.id_to_token(config.bos_token_id), "eos_token": tokenizer.id_to_token(config.eos_token_id),
        "clean_up_tokenization_spaces": False})


# ---- loading ----------------------------------------------------------------------------------------------------

def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a hub folder: ours, DeepSeek's (BF16 or FP8) or one written by transformers 5.

    `dtype` None keeps the stored one, which for FP8 is that of what was not quantised (bf16); the routers' biases are at
    least fp32. The model is built without memory and filled tensor by tensor, so that it is in memory once. A folder
    without the MTP modules that its config promises (transformers writes such) is loaded without them, with a warning.
    Raises `CheckpointError` for a missing, superfluous or mis-shaped tensor and a truncated or missing file.
    """
    folder = Path(path)
    config = ModelConfig.from_hub(folder)
    stored = StoredTensors(folder)
    config = _without_absent_mtp(config, stored)
    with torch.device("meta"):
        model = Transformer(config)
    places = dict(hub_tensors(model))
    shared = {f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers, len(model.model.layers))
              for name in ("embed_tokens.weight", "shared_head.head.weight")}
    stored.compare({name: list(place.shape) for name, place in places.items()}, optional=shared)
    model.to(dtype or stored.read("model.embed_tokens.weight").dtype).to_empty(device=device)
    for name, place in hub_tensors(model):
        if name not in shared:
            place.copy_(stored.read(name))
        elif name in stored and not torch.equal(stored.read(name).to(place), place):
            original = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
            raise CheckpointError(f"{name} in {stored.file(name)} differs from {original}; the two are one tensor in the model")
    return model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved beside a checkpoint. Raises `CheckpointError` if there is none or it cannot be read."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"there is no tokenizer.json in {path}; save the checkpoint with its tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:   # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} is not a tokenizer ({error})") from error


def _without_absent_mtp(config: ModelConfig, stored: "StoredTensors") -> ModelConfig:
    promised, main = config.num_nextn_predict_layers, config.num_hidden_layers
    if not promised or any(name.startswith(f"model.layers.{main}.") for name in stored.names):
        return config
    warnings.warn(f"{stored.folder} has no tensors for the {promised} MTP module(s) of its config; "
                  "the model is loaded without them", stacklevel=3)
    return config.replace(num_nextn_predict_layers=0)


def dequantize_blocks(weight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight [M, K] FP8 times its block's entry of scales [ceil(M / 128), ceil(K / 128)], in fp32, as `dtype`.

    The last block of a dimension may be short: 576 rows have 5 scales. Raises `CheckpointError` for another grid.
    """
    rows, columns = weight.shape
    grid = [-(-rows // BLOCK), -(-columns // BLOCK)]
    if list(scales.shape) != grid:
        raise CheckpointError(f"a weight of shape {list(weight.shape)} has scales of shape {list(scales.shape)}; "
                              f"blocks of {BLOCK} x {BLOCK} need {grid}")
    each = scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * each).to(dtype)


class StoredTensors:
    """The tensors of a folder's safetensors files by name, read when asked for. Pickled files are refused, unread."""

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

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def file(self, name: str) -> Path:
        return self._where[name][0]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype; FP8 weights times their scales, in bf16's place fp32 (the caller rounds once)."""
        tensor = self._where[name][1].get_tensor(name)
        if tensor.dtype is not torch.float8_e4m3fn:
            return tensor
        if name + SCALE not in self._scales:
            raise CheckpointError(f"{name} in {self.file(name)} is FP8 but has no {name}{SCALE}; without scales it means nothing")
        try:
            return dequantize_blocks(tensor, self._where[name + SCALE][1].get_tensor(name + SCALE))
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.file(name)}: {error}") from error

    def compare(self, shapes: dict[str, list[int]], optional: set[str]) -> None:
        """Raises `CheckpointError` naming the first tensor that is missing, superfluous or of another shape."""
        missing = sorted(shapes.keys() - self.names - optional)
        if missing:
            raise CheckpointError(f"{self.folder} has no tensor {missing[0]}{_more(missing)}; its config.json asks for it")
        extra = sorted(self.names - shapes.keys()) + sorted(s for s in self._scales if s.removesuffix(SCALE) not in shapes)
        if extra:
            raise CheckpointError(f"{extra[0]} in {self.file(extra[0])}{_more(extra)} has no place in the model of config.json")
        for name in self.names:
            found = self._where[name][1].get_slice(name).get_shape()
            if found != shapes[name]:
                raise CheckpointError(f"{name} in {self.file(name)} has shape {found}; config.json asks for {shapes[name]}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted({folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of shards ({type(error).__name__}: {error})") from error
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {pickled[0]} is not opened, for unpickling runs code: convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{file} is missing{hint}")
    return files
