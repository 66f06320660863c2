"""The activation and its quantisation, and the backward pass from floats and from codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operation import Operation, compiled
from ..quantize import quantize_tiles_reference
from ..swiglu_quantize import (swiglu_quantize, swiglu_quantize_backward, swiglu_quantize_backward_reference,
                               swiglu_quantize_reference)

DTYPES = (torch.float32, torch.bfloat16)


def _inputs(rows: int, width: int):
    return lambda dtype: _decided(*torch.randn(2, rows, width).to(dtype))


def _halves(dtype: torch.dtype) -> tuple:
    """Two views of one tensor [rows, 2 width]."""
    gate, up = torch.randn(70, 2 * 136).to(dtype).chunk(2, -1)
    return gate, torch.cat([gate, _decided(gate, up)[1]], -1).chunk(2, -1)[1]


def _odd_tiles(dtype: torch.dtype) -> tuple:
    """A tile of zeros, one that holds inf, one with a NaN; the others are finite."""
    gate, up = _inputs(130, 136)(dtype)
    gate[:128, :128], up[3, 130], gate[128, 5] = 0, float("inf"), float("nan")
    return gate, up


def _decided(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`up` without the values whose product lies within 1e-4 of the middle between two codes: exp is not rounded
    alike everywhere, so which of the two is nearer is not for a kernel to get right."""
    product = F.silu(gate.float()) * up.float() * (1 if weights is None else weights[:, None])
    for x, at in ((product, up), (product.T, up.T)):
        scales = quantize_tiles_reference(x)[1].T.repeat_interleave(128, 1)[:, :x.shape[1]]
        low, high = ((x / scales * near).to(torch.float8_e4m3fn).float() for near in (1 - 1e-4, 1 + 1e-4))
        at[low != high] = 0
    return gate, up


CASES = {"7 x 200": _inputs(7, 200), "one row": _inputs(1, 24), "halves": _halves, "odd tiles": _odd_tiles,
         "no rows": _inputs(0, 40)}


def _with_slope(build):
    return lambda dtype: (*(inputs := build(dtype)), torch.randn_like(inputs[0]))


def _coded(rows: int, width: int):
    """gate and up as codes with their scales: what training keeps."""
    def build(dtype: torch.dtype) -> tuple:
        (gate, gate_scales), (up, up_scales) = (quantize_tiles_reference(x) for x in torch.randn(2, rows, width))
        return gate, up, torch.randn(rows, width).to(dtype), False, gate_scales, up_scales
    return build


def _weighted(rows: int, width: int):
    """Rows with the router's weights: from floats, and weights that do not lie side by side."""
    def build(dtype: torch.dtype) -> tuple:
        weights = torch.rand(rows, 2)[:, 0]
        gate, up = _decided(*torch.randn(2, rows, width).to(dtype), weights)
        return gate, up, torch.randn(rows, width).to(dtype), True, None, None, weights
    return build


def _weighted_codes(rows: int, width: int):
    """What an expert keeps. Its last rows are padding: zeros, which may have any weight."""
    def build(dtype: torch.dtype) -> tuple:
        gate, up, slope, pow2, *scales = _coded(rows, width)(dtype)
        for x in (gate, up):
            x.view(torch.uint8)[rows // 2:] = 0
        slope[rows // 2:] = 0
        return gate, up, slope, pow2, *scales, torch.rand(rows)
    return build


def _full(rows: int, width: int) -> tuple:
    return torch.randn(rows, 2 * width, dtype=torch.bfloat16).chunk(2, -1)


def _full_codes(rows: int, width: int) -> tuple:
    gate, up = torch.randn(rows, 2 * width).to(torch.float8_e4m3fn).chunk(2, -1)
    gate_scales, up_scales = (torch.rand(2 * width // 128, rows) + 0.5).chunk(2)
    return gate, up, torch.randn(rows, width, dtype=torch.bfloat16), False, gate_scales, up_scales


OPERATION = Operation(
    "swiglu_quantize", swiglu_quantize, swiglu_quantize_reference, cases=CASES, dtypes=DTYPES,
    tolerance=dict.fromkeys(DTYPES, 1e-5), shapes={"32768 x 2048": lambda: _full(32768, 2048)},
    peers={"compiled definition": compiled(swiglu_quantize_reference), "eager definition": swiglu_quantize_reference})
BACKWARD = Operation(
    "swiglu_quantize_backward", swiglu_quantize_backward, swiglu_quantize_backward_reference,
    cases={name: _with_slope(build) for name, build in CASES.items()} | {
        "codes": _coded(130, 140), "weighted": _weighted(20, 200), "weighted codes": _weighted_codes(130, 140),
        "weighted, no rows": _weighted(0, 40), "weighted, no columns": _weighted(3, 0)}, dtypes=DTYPES,
    shapes={"32768 x 2048": lambda: (*_full(32768, 2048), torch.randn(32768, 2048, dtype=torch.bfloat16)),
            "32768 x 2048 from FP8": lambda: _full_codes(32768, 2048),
            "32768 x 2048 from FP8, weighted": lambda: (*_full_codes(32768, 2048), torch.rand(32768))},
    peers={"compiled definition": compiled(swiglu_quantize_backward_reference),
           "eager definition": swiglu_quantize_backward_reference})
