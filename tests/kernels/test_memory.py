"""NVIDIA's memory checker finds nothing in one small case of each kernel, and finds a planted fault (GPU only)."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from compare import inputs_on, values_and_gradients
from minidsv3.kernels import use_kernels
from minidsv3.kernels.backend import INTERPRETED, tl, triton
from minidsv3.kernels.registry import OPERATIONS

TOOL = shutil.which("compute-sanitizer")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not TOOL, reason="needs a GPU and compute-sanitizer")]
FAULTS = 9      # the tool's exit status if it found something


def checked(*names: str) -> subprocess.CompletedProcess:
    """This file as a program under the checker; without torch's allocator every tensor has an end that it knows."""
    command = [TOOL, "--tool", "memcheck", "--error-exitcode", str(FAULTS), sys.executable, __file__, *names]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_checker_finds_nothing():
    done = checked(*OPERATIONS)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_checker_finds_a_planted_fault():
    assert checked("planted").returncode == FAULTS


@triton.jit
def _write_far_outside(X):
    tl.store(X + (1 << 28), 1.0)


def main(names: list[str]) -> None:
    if names == ["planted"]:
        _write_far_outside[(1,)](torch.zeros(4, device="cuda"))
        torch.cuda.synchronize()
    for name in names:
        operation = OPERATIONS.get(name)
        if operation:
            dtype = next(dtype for dtype in operation.dtypes if dtype != torch.float64)
            for case in list(operation.cases)[:2]:
                with use_kernels("triton"):
                    values_and_gradients(operation, operation.function, inputs_on(operation, case, dtype, "cuda"))
            torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
