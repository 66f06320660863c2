"""Weights in the hub's layout: a folder that transformers, inference engines and the official demo's converter read.

    config.json   model-0000i-of-0000n.safetensors   model.safetensors.index.json   tokenizer.json (if given)

Two things differ between the memory and the hub (names: DeepSeek-V3's README_WEIGHTS.md). Experts are fused in memory
and separate on the hub, and the hub repeats the embedding and the head inside every MTP module, where we share them.
Reading the files is `stored.py`, writing them in BF16, FP32 or FP8 `shards.py`, doing so safely `durable.py`.
"""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import ModelConfig
from .durable import CheckpointError, whole_folder
from .model import Transformer
from .shards import Shards, write_json
from .stored import INDEX, StoredTensors

__all__ = ["CheckpointError", "convert_checkpoint", "hub_tensors", "load_checkpoint", "load_tokenizer",
           "save_checkpoint"]

BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")   # what does not depend on the weights
OURS = ("config.json", INDEX, "model*.safetensors", *BESIDE)


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
    """Writes the model as the hub's folder `path`, in "bf16", "fp32" or "fp8" (see `shards.py`), with its tokenizer.

    The folder appears whole or not at all and may take the place of an older checkpoint, never of anything else. A
    shard holds at most `shard_bytes` bytes (or one tensor) and is all that is in memory beside the model. Raises
    `CheckpointError` for another dtype, a tokenizer with more ids than the model, a folder of other things, and when
    the system refuses to write (a full disk).
    """
    path, tensors = Path(path), dict(hub_tensors(model))
    shards = Shards({name: tensor.shape for name, tensor in tensors.items()}, dtype, shard_bytes)
    _refuse_to_replace(path)
    with whole_folder(path) as new:
        if tokenizer is not None:
            _write_tokenizer(new, tokenizer, model.config)
        write_json(new / "config.json", model.config.to_hub() | shards.config())
        shards.write(new, tensors.__getitem__)


def convert_checkpoint(source: str | Path, path: str | Path, dtype: str, shard_bytes: int = 5 * 10**9) -> None:
    """Writes the hub folder `source` as the hub folder `path` in another format, its tokenizer with it.

    No model is built and no GPU needed: one shard is in memory at a time, whatever the model's size. Values go through
    FP32 and are rounded once. Raises what `load_checkpoint` and `save_checkpoint` raise.
    """
    source, path = Path(source), Path(path)
    model, stored = _open(source)
    places, duplicates = dict(hub_tensors(model)), _duplicates(model.config)
    shards = Shards({name: place.shape for name, place in places.items()}, dtype, shard_bytes)
    _refuse_to_replace(path)
    with whole_folder(path) as new:
        for file in filter(Path.is_file, (source / name for name in BESIDE)):
            shutil.copyfile(file, new / file.name)
        write_json(new / "config.json", model.config.to_hub() | shards.config())
        shards.write(new, lambda name: stored.read(name if name in stored.names else duplicates[name]))


def _refuse_to_replace(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder, so choose another name")
    others = sorted(file.name for file in path.iterdir() if not any(file.match(pattern) for pattern in OURS))
    if others:
        raise CheckpointError(f"{path} holds what no checkpoint does ({', '.join(others[:3])}); "
                              "choose an empty folder, a new one or one with an older checkpoint")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """tokenizer.json and what transformers' AutoTokenizer wants beside it."""
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model "
                              f"{config.vocab_size}; it must be the tokenizer that the model was trained with")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings,
        "bos_token": tokenizer.id_to_token(config.bos_token_id),
        "eos_token": tokenizer.id_to_token(config.eos_token_id), "clean_up_tokenization_spaces": False})


# ---- loading ----------------------------------------------------------------------------------------------------

def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | str = "cpu") -> Transformer:
    """The model of a hub folder: ours, DeepSeek's (BF16 or FP8) or one written by transformers 5.

    `dtype` None keeps the stored one, for FP8 that of what was not quantised (bf16); routers' biases stay fp32. The
    model is built without memory and filled tensor by tensor from mapped files, so that it is in memory once (and in
    the system's file cache). A folder without the MTP modules that its config promises, as transformers writes it, is
    loaded without them, with a warning. Raises `ConfigError` for a config that is missing or wrong and
    `CheckpointError` for a missing, superfluous or mis-shaped tensor and a truncated or missing file.
    """
    model, stored = _open(Path(path))
    model.to(dtype or stored.read("model.embed_tokens.weight").dtype).to_empty(device=device)
    _fill(model, stored)
    return model


def _open(folder: Path) -> tuple[Transformer, StoredTensors]:
    """The folder's model without memory, and its tensors, which were found to be the model's by name and shape."""
    config, stored = ModelConfig.from_hub(folder), StoredTensors(folder)
    config = _without_absent_mtp(config, stored)
    with torch.device("meta"):
        model = Transformer(config)
    stored.compare({name: list(place.shape) for name, place in hub_tensors(model)}, optional=_duplicates(config).keys())
    return model, stored


def _duplicates(config: ModelConfig) -> dict[str, str]:
    """What the hub stores in every MTP module although it is the main model's: name -> the main model's name."""
    main, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
    originals = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    return {f"model.layers.{layer}.{name}.weight": original
            for layer in range(main, main + ahead) for name, original in originals.items()}


def _fill(model: Transformer, stored: StoredTensors) -> None:
    duplicates = _duplicates(model.config)
    for name, place in hub_tensors(model):
        if name not in duplicates:
            place.copy_(stored.read(name))
        elif name in stored.names and not stored.read(name).to(place).equal(place):   # the original was read before
            raise CheckpointError(f"{name} in {stored.file(name)} differs from {duplicates[name]}; "
                                  "the two are one tensor in the model")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved beside a checkpoint. Raises `CheckpointError` if there is none or it cannot be read."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"there is no tokenizer.json in {path}; save the checkpoint with its tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:   # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} is not a tokenizer ({error})") from error


def _without_absent_mtp(config: ModelConfig, stored: StoredTensors) -> ModelConfig:
    promised, main = config.num_nextn_predict_layers, config.num_hidden_layers
    if not promised or any(name.startswith(f"model.layers.{main}.") for name in stored.names):
        return config
    warnings.warn(f"{stored.folder} has no tensors for the {promised} MTP module(s) of its config; "
                  "the model is loaded without them", stacklevel=4)
    return config.replace(num_nextn_predict_layers=0)
