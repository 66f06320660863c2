"""Which code computes an operation: its PyTorch definition or its Triton kernel, by one switch.

    auto     the kernel for tensors on a CUDA device, the definition elsewhere       (the default)
    triton   the kernel, or a refusal
    torch    the definition

Without an accelerator `triton` runs kernels in Triton's interpreter, on CPU tensors: right and slow, for tests and for
the course. `triton` and `tl` come from here, because macOS and Windows have none and must still import the package; so
do `gluon`, `gl` and `hopper`, for kernels that place data and divide work among warps themselves.
"""

import os
from functools import lru_cache

import torch
from torch import Tensor

if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")   # Triton reads it when a kernel is defined
try:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:
    class _Missing:
        """Takes the place of Triton while kernels are defined; `uses_triton` sees to it that none is launched."""
        def __getattr__(self, name: str) -> "_Missing":
            return self

        def __call__(self, *arguments, **options) -> "_Missing":
            return self

    triton = tl = gluon = gl = hopper = _Missing()
    AVAILABLE = INTERPRETED = False
else:
    AVAILABLE, INTERPRETED = True, triton.knobs.runtime.interpret
    if INTERPRETED:
        from . import interpreter
        interpreter.install()

CHOICES = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
INTEGERS = (torch.int64, torch.int32)
_choice = "auto"


class use_kernels:
    """`use_kernels("torch")` switches for the whole process; as a context manager, until its end.

    Raises ValueError for a name that is not one of `CHOICES`.
    """

    def __init__(self, choice: str):
        global _choice
        if choice not in CHOICES:
            raise ValueError(f"kernels cannot be {choice!r}; the choices are {', '.join(CHOICES)}")
        self.before, _choice = _choice, choice

    def __enter__(self) -> "use_kernels":
        return self

    def __exit__(self, *error) -> None:
        global _choice
        _choice = self.before


def uses_triton(*tensors: Tensor) -> bool:
    """Whether the kernel computes on these tensors. In FP64 the definition does: it alone keeps FP64 throughout.

    Raises ValueError where `triton` was asked for and cannot be.
    """
    if _choice == "torch" or _choice == "auto" and tensors[0].device.type != "cuda":
        return False
    fits = all(tensor.dtype in FLOATS or tensor.dtype in INTEGERS for tensor in tensors)
    if _choice == "auto":
        return AVAILABLE and fits
    device = "cpu" if INTERPRETED else "cuda"
    if not AVAILABLE:
        raise ValueError("kernels were set to 'triton', and Triton is not installed; set them to 'torch'")
    if not fits or any(tensor.device.type != device for tensor in tensors):
        given = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise ValueError(f"kernels were set to 'triton', which needs at most 32 bits a float on {device}; got {given}")
    return True


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: how many programs a persistent kernel starts. A CPU stands for an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
