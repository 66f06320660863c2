"""The quantisers at sizes that do and do not fill their tiles, and at the model's own."""

import torch

from ..operation import Operation, compiled
from ..quantize import (TINY, dequantize_blocks, dequantize_blocks_reference, quantize_blocks,
                        quantize_blocks_reference, quantize_columns, quantize_columns_reference, quantize_tiles,
                        quantize_tiles_reference)

DTYPES = (torch.float32, torch.bfloat16)
EXACT = dict.fromkeys(DTYPES, 0.0)


def _normal(*shape: int):
    """Normal random numbers that fall off along both axes, so that small codes occur too."""
    fall = torch.logspace(1, -1, shape[-2])[:, None] * torch.logspace(2, -2, shape[-1])
    return lambda dtype: ((torch.randn(*shape) * fall.to(torch.get_default_device())).to(dtype),)


def _view(dtype: torch.dtype) -> tuple:
    """Every second column of a transposed, wider matrix."""
    return (torch.randn(150, 300).to(dtype).T[10:150, ::2],)


def _odd_tiles(dtype: torch.dtype) -> tuple:
    """A tile of zeros, one that holds inf, one with -inf and NaN; the others are finite."""
    x = torch.randn(130, 300).to(dtype)
    x[:128, :128] = 0
    x[3, 130], x[128, 140], x[128, 141] = float("inf"), float("-inf"), float("nan")
    return (x,)


def _gradient(dtype: torch.dtype) -> tuple:
    """Rows from 1 down to far below the smallest `least`."""
    fall = torch.exp2(torch.linspace(0, -100, 70))[:, None]
    return (torch.randn(70, 200) * fall.to(torch.get_default_device())).to(dtype), False, TINY


def _ties(dtype: torch.dtype) -> tuple:
    """With amax 448 the scale is 1: every code, every middle between two codes, and its neighbours on both sides."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, middles * (1 + 2**-7), middles * (1 - 2**-7), codes[-1:]])
    values = torch.cat([values, torch.zeros(-len(values) % 127)]).unflatten(0, (-1, 127))
    return (torch.cat([values, torch.full_like(values[:, :1], -448.0)], 1).to(dtype),)


MATRICES = {"7 x 200": _normal(7, 200), "one column": _normal(129, 1), "view": _view, "odd tiles": _odd_tiles,
            "ties": _ties, "no rows": _normal(0, 40), "gradient": _gradient}
WEIGHTS = {"7 x 200": _normal(7, 200), "latent": _normal(576, 130), "experts": _normal(3, 70, 200), "view": _view,
           "odd tiles": _odd_tiles, "no rows": _normal(0, 40)}


def _shapes(*sizes: tuple[int, ...]) -> dict:
    return {" x ".join(map(str, size)): lambda size=size: (torch.randn(size, dtype=torch.bfloat16),) for size in sizes}


def _quantiser(name: str, function, reference, cases: dict, shapes: dict) -> Operation:
    return Operation(name, function, reference, cases=cases, dtypes=DTYPES, tolerance=EXACT, shapes=shapes,
                     peers={"compiled definition": compiled(reference), "eager definition": reference})


def _coded(build):
    """Codes and scales of a matrix that `build` makes, and the dtype to return to."""
    return lambda dtype: (*quantize_blocks_reference(*build(dtype)), dtype)


def _codes(*size: int) -> tuple:
    blocks = (*size[:-2], -(-size[-2] // 128), -(-size[-1] // 128))
    return torch.randn(size).to(torch.float8_e4m3fn), torch.rand(blocks) + 0.5, torch.bfloat16


TILES = _quantiser("quantize_tiles", quantize_tiles, quantize_tiles_reference, MATRICES,
                   _shapes((8192, 7168), (4096, 7168)))
COLUMNS = _quantiser("quantize_columns", quantize_columns, quantize_columns_reference, MATRICES,
                     _shapes((8192, 7168), (4096, 7168)))
BLOCKS = _quantiser("quantize_blocks", quantize_blocks, quantize_blocks_reference, WEIGHTS,
                    _shapes((8192, 7168), (4096, 7168), (32, 2048, 7168)))
DEQUANTIZE = Operation(
    "dequantize_blocks", dequantize_blocks, dequantize_blocks_reference,
    cases={name: _coded(build) for name, build in WEIGHTS.items()}, dtypes=DTYPES, tolerance=EXACT,
    shapes={"8192 x 7168": lambda: _codes(8192, 7168), "32 x 2048 x 7168": lambda: _codes(32, 2048, 7168)},
    peers={"compiled definition": compiled(dequantize_blocks_reference),
           "eager definition": dequantize_blocks_reference})
