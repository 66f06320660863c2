"""The FP8 product by hand, what it refuses, adding in place, promotion, and that the comparison sees wrong scales."""

import json
import os
import subprocess
import sys

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import fp8_gemm, fp8_gemm_reference, use_kernels
from minidsv3.kernels.backend import INTERPRETED, tl, triton
from minidsv3.kernels.cases.fp8_gemm import TOLERANCE, codes, operands, scales
from minidsv3.kernels.fp8_gemm import aligned, dequantize_tiles, place, specialises
from test_compile_gate import GATE, faults
from test_operations import DEVICE

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
FP8, FP32 = torch.float8_e4m3fn, torch.float32


@pytest.fixture(autouse=True)
def on_the_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["triton", "torch"])
def either(request):
    with use_kernels(request.param):
        yield


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(FP8)


def test_every_block_has_its_own_scales(either):
    a_scales, b_scales = torch.tensor([[2.0, 1.0], [3.0, 10.0]]), torch.tensor([[5.0, 7.0]])
    out = fp8_gemm(ones(2, 144), a_scales, ones(8, 144), b_scales, FP32)
    assert out[:, 0].tolist() == [128 * 2 * 5 + 16 * 3 * 7, 128 * 1 * 5 + 16 * 10 * 7]
    assert torch.equal(out, out[:, :1].expand(2, 8))


def test_tiles_of_b_have_a_scale_for_each_of_its_rows(either):
    b_scales = torch.arange(1.0, 17).view(2, 8)
    out = fp8_gemm(ones(1, 144), torch.tensor([[2.0], [3.0]]), ones(8, 144), b_scales, FP32)
    assert out[0].tolist() == [128 * 2 * n + 16 * 3 * (8 + n) for n in range(1, 9)]


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("size", [(40, 24, 144), (5, 72, 1296), (515, 136, 272)])
def test_adds_in_place(either, size, tiles):
    inputs, start = operands(*size, tiles=tiles), torch.randn(size[:2])
    into = start.clone()
    assert fp8_gemm(*inputs, into=into) is into
    product = fp8_gemm_reference(*inputs, FP32)
    assert_alike([into], [start + product], TOLERANCE[FP32])
    with pytest.raises(AssertionError):
        assert_alike([into], [product], TOLERANCE[FP32])          # overwritten
    with pytest.raises(AssertionError):
        assert_alike([into], [start + 2 * product], TOLERANCE[FP32])


def test_adding_keeps_torch_library_s_rules():
    inputs = (*operands(5, 8, 1296), torch.randn(5, 8))
    torch.library.opcheck(torch.ops.minidsv3.fp8_gemm_add, inputs,
                          test_utils=("test_autograd_registration", "test_faketensor"))


def test_adding_compiles():
    inputs, into = operands(5, 8, 144), torch.zeros(5, 8)
    with use_kernels("triton"):
        torch.compile(lambda *x: fp8_gemm(*x, into=into), fullgraph=True, backend="aot_eager")(*inputs)
    assert_alike([into], [fp8_gemm_reference(*inputs, FP32)], TOLERANCE[FP32])


def test_sums_outside_of_the_tensor_cores_are_in_fp32():
    """A tensor core keeps 14 bits: after 448 * 448 it would lose all small sums that follow. Only a GPU can fail."""
    K = 2048
    a, b = torch.full((64, K), 0.25), torch.ones(64, K)
    a[:, 0], b[:, 0] = 448.0, 448.0
    with use_kernels("triton"):
        for rows in (64, 512):
            codes_of_a, scales_of_a = a.to(FP8).repeat(rows // 64, 1), torch.ones(K // 128, rows)
            out = fp8_gemm(codes_of_a, scales_of_a, b.to(FP8), torch.ones(1, K // 128), FP32)
            assert (out - (448 * 448 + 0.25 * (K - 1))).abs().max() <= 0.25 * 127      # the first block alone may lose


def scales_after_the_sum(a, a_scales, b, b_scales):
    wide = b_scales.mean(1).repeat_interleave(128)[:len(b)]
    return a.float() @ b.float().T * a_scales.mean(0)[:, None] * wide


WRONG = {
    "scales after the whole sum": scales_after_the_sum,
    "b's scales transposed": lambda a, s, b, t: fp8_gemm_reference(a, s, b, t.T.contiguous(), FP32),
    "the neighbour's row scale": lambda a, s, b, t: fp8_gemm_reference(a, s.roll(1, 1), b, t, FP32),
    "the next block's scale": lambda a, s, b, t: fp8_gemm_reference(a, s.roll(1, 0), b, t, FP32),
    "no scale of b": lambda a, s, b, t: dequantize_tiles(a, s) @ b.float().T,
    "half a block left out": lambda a, s, b, t: fp8_gemm_reference(a[:, :128], s[:1], b[:, :128], t[:, :1], FP32),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_comparison_sees(wrong):
    inputs = operands(70, 136, 176)
    with use_kernels("triton"):
        ours = fp8_gemm(*inputs)
    assert_alike([ours], [fp8_gemm_reference(*inputs)], TOLERANCE[torch.bfloat16])
    with pytest.raises(AssertionError):
        assert_alike([ours], [wrong(*inputs).bfloat16()], TOLERANCE[torch.bfloat16])


def refusals() -> dict:
    a, s, b, t = operands(8, 24, 144)
    return {
        "a .* torch.bfloat16; it needs a matrix of": (a.bfloat16(), s, b, t),
        "b .* torch.float8_e5m2": (a, s, b.to(torch.float8_e5m2), t),
        r"a with strides \[1, 8\]": (codes(144, 8).T, s, b, t),
        r"b with strides \[150, 1\]": (a, s, codes(24, 150)[:, :144], t),
        r"b of shape \[24, 128\]; rows must all be equally long \(144\)": (a, s, b[:, :128], t),
        r"a of shape \[8, 136\]; .* a multiple of 16": (codes(8, 144)[:, :136], s, codes(24, 144)[:, :136], t),
        r"a_scales \[8, 2\] .*; it needs \[2, 8\]": (a, s.T.contiguous(), b, t),
        r"a_scales .* torch.float64": (a, s.double(), b, t),
        r"a_scales .* strides \[1, 2\]": (a, s.T.contiguous().T, b, t),
        r"b_scales \[2, 2\] .*; it needs \[1, 2\]": (a, s, b, scales(2, 2)),
        r"b \[20, 144\]; it needs \[M, K\] and \[N, K\] with N a multiple of 8": (a, s, b[:20], t),
        r"a \[8, 1, 144\]": (a.view(8, 1, 144), s, b, t),
        "tensors on .*meta": (a, s, b, t.to("meta")),
        "cannot return torch.float16": (a, s, b, t, torch.float16),
        r"into \[8, 24\] torch.bfloat16": (a, s, b, t, FP32, torch.zeros(8, 24, dtype=torch.bfloat16)),
        r"into \[24, 8\]": (a, s, b, t, FP32, torch.zeros(24, 8)),
        r"into \[8, 24\] .* contiguous": (a, s, b, t, FP32, torch.zeros(24, 8).T),
    }


@pytest.mark.parametrize("number", range(17))
def test_refuses(either, number):
    sentence, inputs = list(refusals().items())[number]
    with pytest.raises(ValueError, match=sentence):
        fp8_gemm(*inputs)


def test_refuses_memory_that_tma_cannot_address():
    a, s, b, t = operands(8, 8, 16)
    with use_kernels("triton"), pytest.raises(ValueError, match="starts 8 bytes after a multiple of 16"):
        fp8_gemm(codes(144).narrow(0, 8, 128).view(8, 16), s, b, t)


@triton.jit
def _places(OUT, rows, columns):
    for t in range(rows * columns):
        i, j = place(t, rows, columns, 8)
        tl.store(OUT + i * columns + j, t)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (8, 2), (19, 3)])
def test_every_tile_has_its_turn_and_bands_go_down_first(rows, columns):
    turns = torch.full((rows, columns), -1, dtype=torch.int32)
    _places[(1,)](turns, rows, columns)
    assert turns.flatten().sort().values.tolist() == list(range(rows * columns))
    assert turns[:8, 0].tolist() == list(range(min(rows, 8)))


def test_lines_of_scales_are_aligned_for_tma():
    for odd in (scales(3, 5), scales(4, 8)[:, 1:6]):
        moved = aligned(odd)
        assert torch.equal(moved, odd) and moved.stride(0) % 4 == 0 and moved.data_ptr() % 16 == 0
    even = scales(3, 8)[:, :5]
    assert aligned(even) is even


def test_hopper_has_kernels_of_its_own():
    assert specialises(torch.device(DEVICE)) is not INTERPRETED


def test_the_readable_kernels_compile_for_hopper_too(tmp_path):
    """The compile gate sees what is launched there, and that are the others."""
    script = tmp_path / "readable.py"
    script.write_text(f"""
import json, sys
sys.path.insert(0, {str(GATE.parent)!r})
import compile_gate
from minidsv3.kernels import fp8_gemm, fp8_grouped_gemm
for name in ("fp8_gemm", "fp8_grouped_gemm"):
    sys.modules["minidsv3.kernels." + name].specialises = lambda device: False
for entry in compile_gate.report(["fp8_gemm", "fp8_wgrad", "fp8_grouped_gemm", "fp8_grouped_wgrad"]):
    print(json.dumps(entry))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {entry["kernel"] for entry in entries} == {"_gemm", "_wgrad", "_clear"}
    assert not [entry for entry in entries if faults(entry)]
