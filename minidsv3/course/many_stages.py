"""Chapter 07 on real processes: a small model cut into stages, and one step by every rank of a process group."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..model import Transformer
from ..parallel.pipeline import Pipeline
from .toys import uneven_model

WEIGHTS = {"mtp_weight": 0.3, "balance_weight": 0.1}


def small_model() -> Transformer:
    """8 layers, seven of them with 12 experts, and an MTP module, in float64; the same on every rank."""
    return uneven_model(seed=0, num_hidden_layers=8)


def batch(sequences: int = 8) -> Tensor:
    """Random tokens, [sequences, 9] int64; every sequence is a micro-batch."""
    return torch.randint(29, (sequences, 9), generator=torch.Generator().manual_seed(1))


def on_a_rank(schedules: list[str], sum_copies: bool = True) -> dict[str, dict]:
    """What a rank runs: one step of the batch by each schedule, on fresh stages.

    Returns for each the loss of the whole batch, the gradients of the rank's weights by name, the tokens that each
    expert got in each layer with experts, and which ranks hold a weight that stands twice. Without `sum_copies` the
    copies' gradients stay apart, which is wrong.
    """
    return {schedule: _step(schedule, sum_copies) for schedule in schedules}


def _step(schedule: str, sum_copies: bool) -> dict:
    model = small_model()
    pipeline = Pipeline(model.config, schedule, model.state_dict())
    if not sum_copies:
        pipeline._sum_copies = lambda: None
    losses = pipeline.step(batch(), **WEIGHTS)
    gradients = {name: weight.grad for name, weight in pipeline.weights().items()}
    return {"rank": dist.get_rank(), "loss": losses.total, "load": losses.load, "gradients": gradients,
            "copied": {name: list(ranks) for name, ranks in pipeline.copied.items()}}
