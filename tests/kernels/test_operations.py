"""Every operation of the registry: its kernel against its definition, interpreted on the CPU and, where there is one,
compiled on a GPU (`pytest -m gpu` with TRITON_INTERPRET=0)."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compare import assert_alike, fresh, inputs_on, outputs, values_and_gradients
from guarded import guarded
from minidsv3.kernels import uses_triton, use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.operation import Operation
from minidsv3.kernels.registry import OPERATIONS

DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [pytest.param(operation, case, dtype, id=f"{operation.name}-{case}-{dtype}".replace("torch.", ""))
         for operation in OPERATIONS.values() for case in operation.cases
         for dtype in operation.dtypes if dtype != torch.float64]
FIRST_CASES = [pytest.param(operation, next(iter(operation.cases)), operation.dtypes[0] if operation.dtypes[0] !=
                            torch.float64 else operation.dtypes[1], id=operation.name)
               for operation in OPERATIONS.values()]
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton_kernels():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or Triton's interpreter")
    with use_kernels("triton"):
        yield


@pytest.mark.parametrize("operation, case, dtype", CASES)
def test_kernel_equals_definition(operation: Operation, case: str, dtype: torch.dtype):
    inputs = inputs_on(operation, case, dtype, DEVICE)
    definition = values_and_gradients(operation, operation.reference, inputs)
    with guarded() as guards:
        apart = tuple(guards.around(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        ours = values_and_gradients(operation, operation.function, apart)
    assert_alike(ours, definition, operation.tolerance[dtype])


class OperatorCalls(TorchDispatchMode):
    """Which operators of ours were called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "minidsv3":
            self.calls.append((operator, arguments, options or {}))
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("operation, case, dtype", CASES)
def test_operators_keep_torch_library_s_rules(operation: Operation, case: str, dtype: torch.dtype):
    """Schema, fake implementation (meta tensors, torch.compile) and autograd registration, gradients included."""
    with OperatorCalls() as seen:
        values_and_gradients(operation, operation.function, inputs_on(operation, case, dtype, DEVICE))
    assert seen.calls, "no operator of ours was called: the case does not reach the kernel"
    for operator, arguments, options in seen.calls:
        fresh = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in arguments]
        narrow = any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in fresh)   # allclose takes no FP8
        torch.library.opcheck(operator, tuple(fresh), options, test_utils=(
            *(() if narrow else ("test_schema",)), "test_autograd_registration", "test_faketensor"))


def produced(x):
    """What an operation gets is another's result: torch 2.11 lets none write its gradient over a graph's input."""
    return x.clone() if isinstance(x, torch.Tensor) and x.requires_grad else x


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")   # what Dynamo itself does
@pytest.mark.parametrize("operation, case, dtype", FIRST_CASES)
def test_torch_compile_takes_the_kernel_in_one_graph(operation: Operation, case: str, dtype: torch.dtype):
    inputs = inputs_on(operation, case, dtype, DEVICE)
    whole = torch.compile(lambda *x, **o: outputs(operation.function(*map(produced, x), **o)), fullgraph=True,
                          backend="aot_eager")
    eager = values_and_gradients(operation, operation.function, fresh(inputs))
    torch._dynamo.reset()
    assert_alike(values_and_gradients(operation, whole, inputs), eager, operation.tolerance[dtype])


@pytest.mark.parametrize("operation, case, dtype", CASES)
def test_two_runs_give_the_same_bits(operation: Operation, case: str, dtype: torch.dtype):
    inputs = inputs_on(operation, case, dtype, DEVICE)
    first, *others = (bits_of(values_and_gradients(operation, operation.function, fresh(inputs)))
                      for _ in range(2 if INTERPRETED else 100))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def bits_of(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of each tensor: NaN equals NaN, and -0 is not 0."""
    return [x.contiguous().view(-1).view(torch.uint8) for x in results]


@pytest.mark.parametrize("operation, case, dtype", FIRST_CASES)
def test_the_comparison_sees_a_wrong_value(operation: Operation, case: str, dtype: torch.dtype):
    """A definition that is off in one value, by five times the tolerance, must fail the comparison."""
    inputs = inputs_on(operation, case, dtype, DEVICE)
    results = values_and_gradients(operation, operation.function, inputs)
    for position in range(len(results)):
        off = [x.clone() for x in results]
        flat = off[position].view(-1)
        flat = flat.view(torch.uint8) if flat.dtype.itemsize == 1 else flat     # FP8: another code
        largest = float(flat.float().abs().max())
        flat[-1] = (flat[-1].float() + max(1.0, 5 * operation.tolerance[dtype] * largest)).to(flat.dtype)
        with pytest.raises(AssertionError):
            assert_alike(off, results, operation.tolerance[dtype])


def test_a_write_outside_a_buffer_is_seen():
    with pytest.raises(AssertionError, match="4 bytes outside"), guarded():
        buffer = torch.empty(3, 5)
        buffer.as_strided((16,), (1,))[15] = 0.0


def test_float64_is_refused_where_a_kernel_was_asked_for():
    with pytest.raises(ValueError, match="32 bits a float.*got torch.float64 on"):
        uses_triton(torch.ones(2, dtype=torch.float64, device=DEVICE))
