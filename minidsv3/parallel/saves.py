"""The state of a run on many ranks, written by all of them and read by as many as there are then.

    run/step-00000100/    shard-00001-model-00001-of-00001.safetensors  ..    what each rank wrote
                          state.json    manifest.json                         as in run_state.py

`torch.distributed.checkpoint` does the work: it knows each tensor by its name in the whole model and each shard by its
place in that tensor, so a run goes on with another mesh, another schedule, or as one process. Files are safetensors
(its HuggingFace storage) and JSON: nothing that is read later was pickled. A save appears whole or not at all.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from ..optim import EMA, MOMENTS, AdamW
from ..run_state import SHARDED, TREE, CheckpointError, latest_whole, new_save


def training_state(weights: Mapping[str, nn.Parameter], optimizer: AdamW, ema: EMA) -> dict[str, Tensor]:
    """What a save holds of each weight: its value, AdamW's two moments, its average. `weights` are named as in the
    whole model. Writing these tensors restores the run."""
    averages = {parameter: ema.values[name] for name, parameter in ema.model.named_parameters()}
    state = {}
    for name, parameter in weights.items():
        state |= {f"model/{name}": parameter.detach(), f"average/{name}": averages[parameter]}
        state |= {f"{kind}/{name}": optimizer.state_of(parameter)[kind] for kind in MOMENTS}
    return state


def save_sharded(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """All ranks together: each its own shards (DTensors) or copies of `tensors`, by name, and `facts`, which are JSON.

    Raises `CheckpointError` on every rank if one of them cannot write; earlier saves are untouched then.
    """
    with ExitStack() as save:       # rank 0's: closing it makes the save appear, an error removes it
        new = Path(on_rank_0(lambda: str(save.enter_context(new_save(folder, step)))))
        storage = HuggingFaceStorageWriter(str(new), save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=storage)
        except CheckpointException as error:
            raise CheckpointError(f"step {step} was not saved in {folder} ({_reason(error)}); "
                                  "what was saved before is untouched") from error
        document = json.dumps({"step": step, SHARDED: dict(facts)})
        on_rank_0(lambda: (new / TREE).write_text(document, encoding="utf-8"))
        on_rank_0(save.close)


def latest_facts(folder: Path) -> tuple[Path, int, dict[str, Any]]:
    """The newest whole save in `folder`, its step and its facts. Raises `CheckpointError` as `latest_whole` does, and
    for a save of one process."""
    save = Path(on_rank_0(lambda: str(latest_whole(folder))))
    document = json.loads((save / TREE).read_text(encoding="utf-8"))
    if SHARDED not in document:
        raise CheckpointError(f"{save} was saved by a run of one process; resume it without torchrun")
    return save, document["step"], document[SHARDED]


def load_sharded(save: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place, each rank its own shards. Raises `CheckpointError` for what the save does not have."""
    try:
        with warnings.catch_warnings():      # torch remarks that without a process group it loads for one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(save)))
    except CheckpointException as error:
        raise CheckpointError(f"{save} does not fit this run ({_reason(error)})") from error


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, for all ranks; if it is refused there, all ranks raise `CheckpointError`. Without
    a process group this process is rank 0."""
    if not dist.is_initialized():
        return work()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise CheckpointError(told[1])
    return told[0]


def _reason(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
