"""Compiles for an H100 or H200 (sm_90a), without one, what the operations launch at full size; prints a JSON line each.

    TRITON_INTERPRET=0 python tests/kernels/compile_gate.py rms_norm rope       (no names: all operations)

Inputs are empty tensors of the registry's `shapes`, launches are recorded instead of made, and every recorded kernel is
compiled with the very types, constants and options of its launch. So whatever an operation would choose is what is
looked at.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from minidsv3.kernels import backend, use_kernels  # noqa: E402
from minidsv3.kernels.operation import Operation  # noqa: E402
from minidsv3.kernels.registry import OPERATIONS  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "LDL", "STL")   # FP8 and BF16 products, TMA, spills
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}


def launches(operation: Operation, shape: str) -> list[tuple[JITFunction, tuple, dict]]:
    """What the operation launches for `shape`, forward and backward: (kernel, arguments, options)."""
    found = []
    with torch.device("meta"):
        inputs = operation.shapes[shape]()
    inputs = tuple(allocated(x) if isinstance(x, torch.Tensor) else x for x in inputs)
    with recorded(found), use_kernels("triton"):
        results = operation.function(*inputs, **operation.options)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        through = [y for y in results if isinstance(y, torch.Tensor) and y.requires_grad]
        if through:
            leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(through, leaves, [torch.empty_like(y) for y in through])
    return found


def allocated(x: torch.Tensor) -> torch.Tensor:
    """Memory that is never touched stands for `x`; indices are 0, so that torch can follow them."""
    make = torch.empty_strided if x.is_floating_point() else lambda *a, **k: torch.empty_strided(*a, **k).zero_()
    return make(x.shape, x.stride(), dtype=x.dtype, device="cpu").requires_grad_(x.requires_grad)


@contextmanager
def recorded(found: list) -> Iterator[None]:
    """Within, launching a kernel adds it to `found`, and the CPU passes for a GPU."""
    launch, JITFunction.run = JITFunction.run, lambda self, *a, grid, warmup, **k: found.append((self, a, k))
    was, backend.INTERPRETED = backend.INTERPRETED, True
    try:
        yield
    finally:
        JITFunction.run, backend.INTERPRETED = launch, was


def source_of(kernel: JITFunction, arguments: tuple, options: dict) -> tuple[ASTSource, dict]:
    """The kernel with the types and constants of this launch, and the compiler's options."""
    by_name = dict(zip(kernel.arg_names, arguments)) | options
    signature, constants, divisible = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = by_name.pop(parameter.name, parameter.default)
        name = type_name(value)
        if parameter.is_constexpr or value is None or name == "i32" and value == 1:
            signature[parameter.name], constants[(position,)] = "constexpr", value
            continue
        signature[parameter.name] = name
        if name[0] == "*" or name in ("i32", "i64") and value % 16 == 0:
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource if not kernel.is_gluon() else gluon_source()
    return source(kernel, signature, constants, divisible), by_name


def gluon_source():
    from triton.experimental.gluon._runtime import GluonASTSource
    return GluonASTSource


def type_name(value) -> str:
    """Triton's name of a launch argument's type."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):
        layout = getattr(value, "layout", None)
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{f',{layout!r}' if layout else ''}>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -2**31 <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def resources(kernel: JITFunction, arguments: tuple, options: dict) -> dict:
    """Registers a thread, bytes of stack and shared memory, whether matrices are multiplied, here or in a function that
    is called, and how often each of `INSTRUCTIONS` occurs."""
    source, options = source_of(kernel, arguments, options)
    binary = triton.compile(source, target=HOPPER, options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        code, usage = (subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
                       for what in ("--dump-sass", "--dump-resource-usage"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": binary.metadata.shared,
            "warps": binary.metadata.num_warps,
            "multiplies": bool(re.search(r"\btt\.dot\b|warp_group_dot", binary.asm["ttgir"])),
            **{name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}}


def report(names: Iterable[str]) -> Iterator[dict]:
    """One entry for each kernel that the operations launch, each compiled once."""
    for name in names:
        done = set()
        for shape in OPERATIONS[name].shapes:
            for kernel, arguments, options in launches(OPERATIONS[name], shape):
                source, rest = source_of(kernel, arguments, options)
                key = (source.hash(), str(sorted(rest.items())))
                if key not in done:
                    done.add(key)
                    yield {"operation": name, "shape": shape, "kernel": kernel.fn.__name__,
                           **resources(kernel, arguments, options)}


if __name__ == "__main__":
    for entry in report(sys.argv[1:] or OPERATIONS):
        print(json.dumps(entry), flush=True)
