"""The loss kernel's own rules: its gradient lies where the logits were, and what follows from that."""

import pytest
import torch

from minidsv3.kernels import cross_entropy, use_kernels
from test_operations import DEVICE


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 33, device=DEVICE).requires_grad_(), torch.randint(33, (5,), device=DEVICE)


def test_the_gradient_takes_the_logits_memory():
    logits, targets = drawn()
    wanted, = torch.autograd.grad(cross_entropy(logits.double(), targets).sum(), logits)
    with use_kernels("triton"):
        gradient, = torch.autograd.grad(cross_entropy(logits, targets).sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert (gradient - wanted).abs().max() < 1e-6 and torch.equal(gradient, logits.detach())


def test_a_second_backward_is_refused():
    logits, targets = drawn()
    with use_kernels("triton"):
        loss = cross_entropy(logits, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_needs_the_logits_afterwards_is_refused():
    """exp keeps its result for backward: the logits. Their gradient must not pass for them."""
    x, targets = drawn()
    logits = x.exp()
    with use_kernels("triton"):
        loss = cross_entropy(logits, targets).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("target", [-1, 33])
def test_a_target_outside_the_vocabulary_gives_nan(target):
    logits, targets = drawn()
    targets[2] = target
    with use_kernels("triton"):
        losses = cross_entropy(logits, targets)
    assert losses.isnan().tolist() == [False, False, True, False, False]
