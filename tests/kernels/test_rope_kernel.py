"""What the registry's comparison does not say of rotation: its equation by hand, its refusals, and the usual faults."""

import pytest
import torch

from compare import assert_alike, inputs_on, values_and_gradients
from minidsv3.kernels import rope, use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.registry import OPERATIONS
from mutated import mutated
from test_operations import DEVICE

OPERATION = OPERATIONS["rope"]
pytestmark = [] if INTERPRETED else [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or Triton's interpreter")]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_by_hand(kernels: str):
    """A quarter turn of the first pair, none of the second: neighbours are a pair, and channels in front stay."""
    x = torch.tensor([7.0, 8.0, 9.0, 1.0, 2.0, 3.0, 4.0], device=DEVICE).view(1, 1, 1, 7)
    cos, sin = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 0.0]]]], device=DEVICE)
    with use_kernels(kernels):
        assert rope(x, cos, sin, nope=3).flatten().tolist() == [7.0, 8.0, 9.0, -2.0, 1.0, 3.0, 4.0]


def test_turning_back_gives_the_same():
    """The gradient of a turn is the turn back."""
    x, cos, sin, nope = inputs_on(OPERATION, "channels without position", torch.float32, DEVICE)
    with use_kernels("triton"):
        y = rope(x, cos, sin, nope)
        back, = torch.autograd.grad(y, x, y.detach())
    assert_alike([back], [x.detach()], 1e-6)


@pytest.mark.parametrize("case, right, wrong", [
    ("7 tokens", "x.reshape(HEADS, PROPE // 2, 2)", "x.reshape(HEADS, 2, PROPE // 2).permute(0, 2, 1)"),   # two halves
    ("7 tokens", "even * sin + odd * cos", "odd * cos - even * sin"),
    ("7 tokens", "-ctx.sign", "ctx.sign"),
    ("positions of their own", "cos.stride(0) if len(cos) > 1 else 0", "0"),
    ("channels without position", "tl.store(target + channel", "tl.store(target + channel + 1"),
    ("behind the latent", "token * token_stride", "token * ROPE"),
])
def test_the_comparison_sees_a_fault(tmp_path, case: str, right: str, wrong: str):
    inputs = inputs_on(OPERATION, case, torch.float32, DEVICE)
    theirs = values_and_gradients(OPERATION, OPERATION.reference, inputs)
    with use_kernels("triton"):
        assert_alike(values_and_gradients(OPERATION, rope, inputs), theirs, 1e-5)
        with pytest.raises(AssertionError):
            assert_alike(values_and_gradients(OPERATION, mutated("rope", right, wrong, tmp_path).rope, inputs), theirs,
                         1e-5)


@pytest.mark.parametrize("x, table, nope", [
    pytest.param((2, 5, 8), (1, 5, 4), 0, id="no heads"), pytest.param((2, 5, 2, 8), (5, 4), 0, id="no batch"),
    pytest.param((3, 5, 2, 8), (2, 5, 4), 0, id="two tables"), pytest.param((1, 5, 2, 8), (2, 5, 4), 0, id="of more"),
    pytest.param((2, 5, 2, 8), (1, 4, 4), 0, id="too few tokens"), pytest.param((2, 5, 2, 9), (1, 5, 4), 0, id="odd"),
    pytest.param((2, 5, 2, 8), (1, 5, 4), 2, id="too wide"), pytest.param((2, 5, 2, 8), (1, 5, 5), -2, id="negative"),
])
def test_refusals(x: tuple, table: tuple, nope: int):
    with pytest.raises(ValueError, match=r"x must be \[B, T, heads, nope \+ d\] and the tables \[B or 1, T, d/2\]"):
        rope(torch.zeros(x), torch.zeros(table), torch.zeros(table), nope)
