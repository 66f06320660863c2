"""The state of a training run, saved so that a run killed at any moment resumes from its last save, bit for bit.

    run/step-00000100/    model.safetensors  optimizer.safetensors  ..  state.json  manifest.json
    run/step-00000200/
    run/latest            "step-00000200"

Every save is a new folder (see `durable.py`), then the pointer `latest` is replaced, then old folders go. The manifest
has each file's size and SHA-256, so a torn file or a flipped bit is noticed and the save before it is used.

A state is any tree of dicts, lists, tuples, tensors, numbers and strings, which is what `state_dict()` returns; the
parts are saved under the tree's top keys. Nothing is pickled.
"""

import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .durable import CheckpointError, replace_file, whole_folder

__all__ = ["CheckpointError", "SavedState", "load_latest", "random_state", "save_state", "saved_steps",
           "set_random_state"]

POINTER, MANIFEST, TREE = "latest", "manifest.json", "state.json"
SHARDED = "sharded"      # the key of state.json that tells saves of many ranks (`parallel/saves.py`)
STEP_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")


class SavedState(NamedTuple):
    step: int
    state: dict[str, Any]
    folder: Path


# ---- save and load ----------------------------------------------------------------------------------------------

def save_state(folder: str | Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Saves `state` as `folder/step-{step}` and returns that path once it is safely on the disk.

    Tensors keep dtype and bits; tensors that share memory are stored once and share it again when loaded. The newest
    `keep` saves up to `step` remain. Raises `CheckpointError` for what cannot be stored (naming it) and when the
    system refuses to write; earlier saves are untouched then.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, (), tensors, {})
    with new_save(folder, step, keep) as new:
        for part, group in groupby(sorted(tensors), key=lambda name: name.split("/")[0]):
            save_file({name: tensors[name] for name in group}, new / f"{part}.safetensors")
        (new / TREE).write_text(json.dumps({"step": step, "state": tree}), encoding="utf-8")
    return save_folder(folder, step)


@contextmanager
def new_save(folder: str | Path, step: int, keep: int = 2) -> Iterator[Path]:
    """Yields an empty folder; what the block writes there becomes the newest save, whole or not at all, with a manifest
    of its files. The newest `keep` saves up to `step` remain. Raises `CheckpointError` as `save_state` does."""
    if step < 0 or keep < 1:
        raise CheckpointError(f"step is {step} and keep is {keep}; steps count from 0 and at least 1 save must stay")
    target = save_folder(folder, step)
    with whole_folder(target) as new:
        yield new
        sums = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    replace_file(target.with_name(POINTER), target.name)
    _prune(target.parent, step, keep)


def save_folder(folder: str | Path, step: int) -> Path:
    """Where the save of that step lies."""
    return Path(folder) / f"step-{step:08d}"


def load_latest(folder: str | Path) -> SavedState:
    """The last save whose files are all whole, tensors on the CPU. Warns and raises as `latest_whole` does."""
    return _read(latest_whole(folder))


def latest_whole(folder: str | Path) -> Path:
    """The folder of the last save whose files are all whole.

    Warns with a sentence for each damaged save that it passes over. Raises `CheckpointError` if `folder` holds no save,
    or none that is whole.
    """
    folder, found = Path(folder), []
    for candidate in _newest_first(folder):
        damage = _damage(candidate)
        if damage is None:
            return candidate
        found.append(damage)
        warnings.warn(f"{damage}; trying the save before it", stacklevel=3)
    if found:
        raise CheckpointError(f"no save in {folder} is whole: {'; '.join(found)}")
    raise CheckpointError(f"there is no saved state in {folder}; it would hold a folder step-00000001 or the like")


def is_sharded(folder: str | Path) -> bool:
    """Whether the saves in `folder` are of a run on many ranks. Damaged ones are left to those who load them."""
    for save in _newest_first(Path(folder)):
        try:
            return SHARDED in json.loads((save / TREE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return False


def saved_steps(folder: str | Path) -> list[int]:
    """The steps that have a save in `folder`, newest first, whole or not; empty if nothing was ever saved there."""
    return [_step(path) for path in _newest_first(Path(folder))]


def _newest_first(folder: Path) -> list[Path]:
    """The save that the pointer names, then the others from the newest to the oldest."""
    saves = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    pointer = folder / POINTER
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    return sorted(saves, key=lambda path: (path.name == named, _step(path), path.suffix == ""), reverse=True)


def _step(path: Path) -> int:
    return int(STEP_FOLDER.fullmatch(path.name)[1])


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes what is older than the newest `keep` saves, and what a killed save left behind."""
    past = [path for path in _newest_first(folder) if _step(path) <= step]
    for path in [*past[keep:], *folder.glob(".step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


# ---- integrity --------------------------------------------------------------------------------------------------

def _damage(save: Path) -> str | None:
    """A sentence about the first file that is not what the manifest says, or None if all are."""
    try:
        sums = json.loads((save / MANIFEST).read_text(encoding="utf-8"))
        for name, right in sums.items():
            file = save / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != right["size"]:
                return f"{file} has {file.stat().st_size} bytes where {right['size']} were written"
            if _sha256(file) != right["sha256"]:
                return f"{file} has changed since it was written (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{save / MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None if TREE in sums else f"{save / MANIFEST} does not list {TREE}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(save: Path) -> SavedState:
    document = json.loads((save / TREE).read_text(encoding="utf-8"))
    if SHARDED in document:
        raise CheckpointError(f"{save} was saved by a run on many ranks; read it with minidsv3.parallel.train.alone")
    tensors: dict[str, Tensor] = {}
    for file in save.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}   # not a view of the file
    return SavedState(document["step"], _unpack(document["state"], tensors), save)


# ---- trees to JSON and tensors, and back ------------------------------------------------------------------------

def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor], names: dict[tuple, str]) -> Any:
    """The tree as JSON. Tensors go to `tensors` under their path; `names` knows those that were met before.

    What JSON lacks is an object with one key: $tensor, $tuple, or $pairs for a dict whose keys are not plain strings.
    """
    def inner(key: Any, child: Any) -> Any:
        return _pack(child, (*path, str(key)), tensors, names)

    if isinstance(value, Tensor):
        return {"$tensor": _store(value.detach(), "/".join(path), tensors, names)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(key, child) for key, child in value.items()}
        return {"$pairs": [[inner("key", key), inner(key, child)] for key, child in value.items()]}
    if isinstance(value, (list, tuple)):
        children = [inner(index, child) for index, child in enumerate(value)]
        return children if isinstance(value, list) else {"$tuple": children}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"{'/'.join(path)} is of type {type(value).__name__}; "
                          "a state holds dicts, lists, tuples, tensors, numbers, strings and None")


def _store(tensor: Tensor, name: str, tensors: dict[str, Tensor], names: dict[tuple, str]) -> str:
    identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    known = names.setdefault(identity, name) if tensor.numel() else name
    if known == name:
        if name in tensors:
            raise CheckpointError(f"two tensors of the state are both called {name}; rename one of the keys")
        tensors[name] = tensor.contiguous()
    return known


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(child, tensors) for child in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(child, tensors) for child in value["$tuple"])
    if "$pairs" in value:
        return {_unpack(key, tensors): _unpack(child, tensors) for key, child in value["$pairs"]}
    return {key: _unpack(child, tensors) for key, child in value.items()}


# ---- random numbers ---------------------------------------------------------------------------------------------

def random_state() -> dict[str, Any]:
    """Where the global random generators stand: Python's, torch's on the CPU and on every GPU."""
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where `random_state` found them."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
