"""What experts received, along tokens: experts that nobody chose, one token, rows that fill no tile, odd codes."""

import torch

from ..operation import Operation, compiled
from ..permute import Permutation, sort_by_expert_reference
from ..permute_columns import permute_columns, permute_columns_reference
from ..quantize import TINY, quantize_tiles_reference


def _places(tokens: int, experts: int, chosen: int, align: int = 1, used: int | None = None) -> Permutation:
    """`chosen` of the first `used` experts for each token; one may be chosen twice."""
    choices = torch.randint(used or experts, (tokens, chosen))
    load = torch.zeros(experts).scatter_add_(0, choices.flatten(), torch.ones(choices.numel()))
    return sort_by_expert_reference(choices, load, align)


def _received(width: int, *size: int, pow2: bool = True, to_pow2: bool = True, least: float = 1e-4, **more):
    """Codes and scales of tokens of very different sizes, where they go, and how they are quantised again."""
    def build(dtype: torch.dtype) -> tuple:
        fall = torch.exp2(torch.randint(-12, 5, (size[0], 1))) * torch.logspace(1, -2, width)
        tiles = quantize_tiles_reference(torch.randn(size[0], width) * fall, pow2, least)
        return *tiles, to_pow2, least, *_places(*size, **more)
    return build


def _odd(dtype: torch.dtype) -> tuple:
    """Among 40 tokens one of zeros, one of NaN, and one of gradients that are very small."""
    x = torch.randn(40, 200)
    x[3], x[17, 130], x[25] = 0, float("nan"), x[25] * 2.0**-70
    return *quantize_tiles_reference(x, True, TINY), True, TINY, *_places(40, 6, 2, align=128)


def _full(width: int, *size: int, align: int) -> tuple:
    """One token's tiles for all: only sizes matter."""
    tokens, tiles = size[0], -(-width // 128)
    codes = torch.randn(tokens, width, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    return codes, torch.full((tiles, tokens), 2.0**-6), True, 1e-4, *_places(*size, align=align)


def _apart(function):
    """`function` of a permutation's parts."""
    return lambda codes, scales, pow2, least, *parts: function(codes, scales, Permutation(*parts), pow2, least)


OPERATION = Operation(
    "permute_columns", _apart(permute_columns), _apart(permute_columns_reference), dtypes=(torch.float32,),
    tolerance={torch.float32: 0.0},
    cases={"7 x 200": _received(200, 7, 5, 2), "300 x 272, aligned": _received(272, 300, 6, 3, align=128, used=4),
           "one token": _received(144, 1, 8, 3, align=128), "one choice": _received(40, 90, 3, 1, align=16),
           "no token": _received(128, 0, 8, 3), "odd": _odd,
           "scales of any size": _received(136, 50, 4, 2, pow2=False, to_pow2=False, align=128)},
    shapes={"16384 x 8 x 7168, aligned": lambda: _full(7168, 16384, 256, 8, align=128)},
    peers={"compiled definition": compiled(_apart(permute_columns_reference))})
