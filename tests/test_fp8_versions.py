"""Codes of a weight follow every optimiser's step: torch's fused kernels change weights without counting it."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from minidsv3 import optim
from minidsv3.fp8 import to_fp8
from minidsv3.train import autocast

OPTIMISERS = {
    "ours, BF16 moments": lambda weights: optim.AdamW(weights, lr=0.1, moments=torch.bfloat16),
    "ours, FP32 moments": lambda weights: optim.AdamW(weights, lr=0.1),
    "torch's, fused": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
    "torch's SGD": lambda weights: torch.optim.SGD(weights, lr=10.0),
}


def losses_after_a_step(build) -> tuple[float, float]:
    """Of the model that took the step, and of a new model with the same weights."""
    model, tokens = to_fp8(tiny_model(dtype=torch.float32)), tiny_tokens(2, 17)
    optimizer = build(model.parameters())

    def loss(of) -> torch.Tensor:
        with autocast(torch.device("cpu"), "bf16"):
            return of.loss(tokens).main

    loss(model).backward()
    optimizer.step()
    fresh = to_fp8(tiny_model(seed=1, dtype=torch.float32))
    fresh.load_state_dict(model.state_dict())
    return loss(model).item(), loss(fresh).item()


@pytest.mark.parametrize("build", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_step_changes_the_codes(build):
    stepped, fresh = losses_after_a_step(build)
    assert stepped == fresh


def test_without_counting_the_codes_stay(monkeypatch):
    """If this fails, torch counts by itself and `fp8_linear.count_step` can go."""
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda weights: None)
    stepped, fresh = losses_after_a_step(OPTIMISERS["torch's, fused"])
    assert stepped != fresh
