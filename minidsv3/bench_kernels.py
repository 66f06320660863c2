"""Speed of the kernels on a GPU: every operation of the registry at full size, with its peers beside it.

A number is the median of replays of a CUDA graph that calls a contender once for each of several copies of its inputs,
after the L2 cache was emptied: nobody finds its inputs in the cache, and no launch from Python is in the time. The
ceilings (copying, BF16 and FP8 products of torch) are measured in the same run.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .kernels import use_kernels
from .kernels.operation import Operation
from .kernels.registry import OPERATIONS

OURS = "minidsv3"
CACHE = 2**28            # bytes written to empty the L2 cache (50 MB on an H100)
INPUTS = 2**28           # bytes of inputs that the copies of one contender take together, at least
MOST_COPIES = 16
GEMM = 8192              # size of the products that set the ceilings


def bench_kernels(out: Path, only: Iterable[str] = ()) -> dict:
    """Times the operations (all, or those named in `only`), writes `out` (JSON) and returns it.

    Raises ValueError without a CUDA device or for an unknown name.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench kernels needs a CUDA device; on a CPU kernels are interpreted, which is no measurement")
    if unknown := set(only) - set(OPERATIONS):
        raise ValueError(f"there is no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    wanted = [operation for operation in OPERATIONS.values() if not only or operation.name in only]
    results = {"command": " ".join(["python -m minidsv3", *sys.argv[1:]]), "machine": machine(),
               "ceilings": ceilings(), "entries": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    for operation in tqdm(wanted, desc="bench kernels", unit="operation"):
        for shape in operation.shapes:
            for backward in (False, True)[:1 + operation.times_backward]:
                results["entries"].append(entry(operation, shape, backward))
                out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def entry(operation: Operation, shape: str, backward: bool) -> dict:
    """One line of the table: bytes that must be moved, FLOPs, and milliseconds of everybody. A contender that fails
    leaves its error in place of a number."""
    contenders = {OURS: operation.function, **operation.peers}
    times, bytes_moved, flops = {}, 0, None
    for name, function in contenders.items():
        torch.cuda.empty_cache()
        copies = copies_of_inputs(operation.shapes[shape])
        if name == OURS:
            bytes_moved = traffic(operation, copies[0], backward)
            flops = operation.flops(*copies[0]) * (1 + backward * operation.backward_flops) if operation.flops else None
        try:
            with use_kernels("auto"):
                times[name] = milliseconds([call(operation, function, inputs, backward) for inputs in copies])
        except Exception as error:   # a peer may lack a kernel for this machine
            times[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return {"operation": operation.name, "shape": shape, "pass": "forward and backward" if backward else "forward",
            "bytes": bytes_moved, "flops": flops, "ms": times}


def call(operation: Operation, function: Callable, inputs: tuple, backward: bool) -> Callable[[], object]:
    """The contender on one copy of the inputs; with `backward`, its gradients for a slope of ones as well."""
    if not backward:
        return lambda: function(*(x.detach() if isinstance(x, Tensor) else x for x in inputs), **operation.options)
    leaves = leaves_of(inputs)

    def both() -> object:
        result = floats(function(*inputs, **operation.options))
        return torch.autograd.grad(result, leaves, [slope_of(y) for y in result])
    return both


_slopes: dict[tuple, Tensor] = {}


def slope_of(y: Tensor) -> Tensor:
    """Ones like `y`, made once: filling them is not what is timed."""
    key = (y.shape, y.dtype)
    if key not in _slopes:
        _slopes[key] = torch.ones_like(y)
    return _slopes[key]


def leaves_of(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def floats(result) -> list[Tensor]:
    """What gradients flow through."""
    parts = [result] if isinstance(result, Tensor) else result
    return [y for y in parts if isinstance(y, Tensor) and y.requires_grad]


def copies_of_inputs(build: Callable[[], tuple], device: str = "cuda") -> list[tuple]:
    """As many as it takes for none to lie in the cache when its turn comes."""
    with torch.device(device):
        first = build()
        size = sum(x.nbytes for x in first if isinstance(x, Tensor))
        count = min(max(1, -(-INPUTS // size)), MOST_COPIES)
        return [first] + [build() for _ in range(count - 1)]


def traffic(operation: Operation, inputs: tuple, backward: bool) -> int:
    """Bytes that must be moved at the least: inputs read and outputs written once; backward reads inputs and slopes and
    writes gradients."""
    read = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
    result = operation.function(*inputs, **operation.options)
    written = sum(y.nbytes for y in ([result] if isinstance(result, Tensor) else result)
                  if isinstance(y, Tensor) and not any(y is x for x in inputs))
    if not backward:
        return read + written
    return 2 * (read + written) + sum(x.nbytes for x in leaves_of(inputs))


def milliseconds(calls: Callable[[], object] | list[Callable[[], object]], repeats: int = 15) -> float:
    """Median time of one call on the GPU: the calls are recorded into a CUDA graph, the L2 cache is emptied before each
    replay."""
    calls = calls if isinstance(calls, list) else [calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in calls[:2]:    # compiles and warms up
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in calls:
            run()
    dirt = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dirt.zero_()
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / len(calls)


def ceilings() -> dict[str, float]:
    """What the machine reaches: GB/s of a large copy (read + written), TFLOPS of large BF16 and FP8 products."""
    with torch.device("cuda"):
        source, target = torch.empty(2, 2**30, dtype=torch.bfloat16).normal_()
        a, b = torch.randn(2, GEMM, GEMM, dtype=torch.bfloat16)
        one = torch.ones(())
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    flops = 2 * GEMM**3
    fp8 = milliseconds(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16))
    copying = milliseconds(lambda: torch.neg(source, out=target))   # a kernel: copy_ would become a copy engine's work
    return {"copy_gb_s": round(2 * source.nbytes / copying / 1e6, 1),
            "bf16_tflops": round(flops / milliseconds(lambda: F.linear(a, b)) / 1e9, 1),
            "fp8_tflops": round(flops / fp8 / 1e9, 1)}


def machine() -> dict[str, str | int]:
    """What the numbers hang on."""
    import triton
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "processors": properties.multi_processor_count, "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton.__version__}
