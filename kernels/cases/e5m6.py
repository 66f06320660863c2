"""E5M6 at widths that do and do not fill tiles, words and pairs, and at those of attention's output."""

import torch

from ..e5m6 import dequantize_e5m6, dequantize_e5m6_reference, quantize_e5m6, quantize_e5m6_reference
from ..operation import Operation, compiled

DTYPES = (torch.float32, torch.bfloat16)
EXACT = dict.fromkeys(DTYPES, 0.0)


def _spread(*shape: int):
    """Normal random numbers, rows of very different sizes: from below the least amax up to the largest floats."""
    def build(dtype: torch.dtype) -> tuple:
        x = torch.randn(*shape) * torch.exp2(torch.randint(-40, 120, (shape[0], 1)).float())
        return ((x * torch.exp2(torch.randint(-22, 1, shape).float())).to(dtype),)
    return build


def _view(dtype: torch.dtype) -> tuple:
    """Every second column of a transposed, wider matrix."""
    return (torch.randn(150, 40).to(dtype).T[10:30, ::2],)


def _odd_tiles(dtype: torch.dtype) -> tuple:
    """Rows of zeros, inf, -inf, NaN and the largest numbers; the second tile of each is like the others'."""
    x = torch.randn(7, 201).to(dtype)
    x[0], x[1, 3], x[2, 127], x[3, 200] = 0, float("inf"), float("-inf"), float("nan")
    x[4, 0] = -0.99 * torch.finfo(dtype).max
    x[5, :64] = -0.0
    return (x,)


def _ties(dtype: torch.dtype) -> tuple:
    """With amax 65024 the scale is 1: every number, every middle between two, and its neighbours on both sides."""
    numbers = (torch.arange(0, 0x7C0, dtype=torch.int16) << 4).view(torch.float16).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, middles * (1 + 2**-23), middles * (1 - 2**-23), numbers[-1:]])
    values = torch.cat([values, torch.zeros(-len(values) % 127)]).unflatten(0, (-1, 127))
    values = torch.cat([values, torch.full_like(values[:, :1], -65024.0)], 1)
    return (torch.cat([values, -values]).view(6, -1).to(dtype),)


CASES = {"7 x 200": _spread(7, 200), "20 x 259": _spread(20, 259), "one column": _spread(33, 1),
         "one row": _spread(1, 384), "half a tile": _spread(5, 66), "view": _view, "odd tiles": _odd_tiles,
         "ties": _ties, "no rows": _spread(0, 40)}
SHAPES = ((4096, 16384), (16384, 16384))


def _packed(build):
    """Bytes and scales of a matrix that `build` makes, its width, and the dtype to return to."""
    def inputs(dtype: torch.dtype) -> tuple:
        x, = build(dtype)
        return (*quantize_e5m6_reference(x), x.shape[1], dtype)
    return inputs


def _bytes(rows: int, width: int) -> tuple:
    packed = torch.randint(0, 256, (rows, 3 * width // 2), dtype=torch.uint8)
    return packed, torch.ones(width // 128, rows), width, torch.bfloat16


QUANTIZE = Operation(
    "quantize_e5m6", quantize_e5m6, quantize_e5m6_reference, cases=CASES, dtypes=DTYPES, tolerance=EXACT,
    shapes={f"{rows} x {width}": lambda size=(rows, width): (torch.randn(size, dtype=torch.bfloat16),)
            for rows, width in SHAPES},
    peers={"compiled definition": compiled(quantize_e5m6_reference), "eager definition": quantize_e5m6_reference})
DEQUANTIZE = Operation(
    "dequantize_e5m6", dequantize_e5m6, dequantize_e5m6_reference,
    cases={name: _packed(build) for name, build in CASES.items()}, dtypes=DTYPES, tolerance=EXACT,
    shapes={f"{rows} x {width}": lambda size=(rows, width): _bytes(*size) for rows, width in SHAPES},
    peers={"compiled definition": compiled(dequantize_e5m6_reference), "eager definition": dequantize_e5m6_reference})
