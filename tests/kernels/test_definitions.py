"""On a CPU some operations go another way than their definition spells out, or write their gradient themselves: values
and gradients are the definition's all the same."""

import pytest
import torch

from compare import assert_alike, inputs_on, values_and_gradients
from minidsv3.kernels import rope, rope_reference, use_kernels
from minidsv3.kernels.registry import OPERATIONS

CASES = [pytest.param(OPERATIONS[name], case, dtype, id=f"{name}-{case}-{dtype}".replace("torch.", ""))
         for name in ("permute", "rms_norm", "rope", "unpermute", "weighted_swiglu")
         for case in OPERATIONS[name].cases for dtype in OPERATIONS[name].dtypes]


@pytest.mark.parametrize("operation, case, dtype", CASES)
def test_a_cpu_computes_the_definition(operation, case, dtype):
    inputs = inputs_on(operation, case, dtype, "cpu")
    with use_kernels("torch"):
        ours = values_and_gradients(operation, operation.function, inputs)
    assert_alike(ours, values_and_gradients(operation, operation.reference, inputs), operation.tolerance[dtype])


def test_weights_that_are_none_have_the_definition_s_gradient_too():
    """How the model calls `unpermute`."""
    rows, _, *places = inputs_on(OPERATIONS["unpermute"], "33 x 40, aligned", torch.float64, "cpu")
    ours, theirs = (values_and_gradients(OPERATIONS["unpermute"], function, (rows, None, *places))
                    for function in (OPERATIONS["unpermute"].function, OPERATIONS["unpermute"].reference))
    assert_alike(ours, theirs, 1e-12)


def test_pairs_may_begin_anywhere():
    """A complex number wants an even address."""
    x, angles = torch.randn(1 + 2 * 5 * 3 * 8)[1:].view(2, 5, 3, 8), torch.randn(1, 5, 4)
    tables = angles.cos(), angles.sin()
    torch.testing.assert_close(rope(x, *tables), rope_reference(x, *tables))
