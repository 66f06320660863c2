"""Tokens on their way to their experts and back; experts that nobody chose, one that everybody chose, padding."""

import torch

from ..operation import Operation, compiled, leaf
from ..permute import (Permutation, permute, permute_reference, permute_tiles, permute_tiles_reference, sort_by_expert,
                       sort_by_expert_reference, unpermute, unpermute_reference)
from ..quantize import quantize_tiles_reference


def _choices(tokens: int, experts: int, chosen: int, used: int | None = None):
    """`chosen` of the first `used` experts for each token, and the load."""
    order = torch.rand(tokens, used or experts).argsort(-1)[:, :chosen].contiguous()
    load = torch.zeros(experts).scatter_add_(0, order.flatten(), torch.ones(tokens * chosen))
    return order, load


def _places(*size: int, align: int = 1, **more) -> Permutation:
    return sort_by_expert_reference(*_choices(*size, **more), align)


def _sorted(*size: int, **more):
    return lambda dtype: _choices(*size, **more)


def _tokens(width: int, *size: int, **more):
    """x [N, width], and where it goes."""
    return lambda dtype: (leaf(size[0], width, dtype=dtype), *_places(*size, **more))


def _rows(width: int, *size: int, **more):
    """Rows, where they come from, and the router's weights."""
    def build(dtype: torch.dtype) -> tuple:
        places = _places(*size, **more)
        weights = torch.rand(size[0], size[2], dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        return leaf(len(places.sources), width, dtype=dtype), weights, *places
    return build


def _tiles(width: int, *size: int, **more):
    """Codes and scales, and where they go."""
    def build(dtype: torch.dtype) -> tuple:
        return *quantize_tiles_reference(torch.randn(size[0], width, dtype=dtype)), *_places(*size, **more)
    return build


FULL, MINI = (8192, 256, 8), (16384, 64, 8)     # tokens, experts, choices of a token

SORT = Operation(
    "sort_by_expert", sort_by_expert, sort_by_expert_reference, dtypes=(torch.float32,),
    cases={"7 tokens": _sorted(7, 5, 2), "one token": _sorted(1, 8, 3), "no token": _sorted(0, 8, 3),
           "150 tokens, idle experts": _sorted(150, 12, 4, used=9), "all to one": _sorted(130, 4, 1, used=1)},
    shapes={"65536 choices, 256 experts": lambda: _choices(*FULL),
            "131072 choices, 64 experts": lambda: _choices(*MINI),
            "524288 choices, 256 experts": lambda: _choices(65536, 256, 8)},
    peers={"stable argsort": lambda experts, load: experts.flatten().argsort(stable=True)})

PERMUTE = Operation(
    "permute", lambda x, *places: permute(x, Permutation(*places)),
    lambda x, *places: permute_reference(x, Permutation(*places)),
    cases={"7 x 24": _tokens(24, 7, 5, 2), "33 x 40, aligned": _tokens(40, 33, 6, 4, align=16),
           "one token": _tokens(16, 1, 8, 3), "no token": _tokens(16, 0, 8, 3),
           "mostly padding": _tokens(24, 2, 8, 3, align=16), "wide": _tokens(1100, 2, 4, 2)},
    shapes={"8192 x 8 x 7168": lambda: _tokens(7168, *FULL)(torch.bfloat16),
            "16384 x 8 x 1024": lambda: _tokens(1024, *MINI)(torch.bfloat16)},
    peers={"index_select": lambda x, rows, sources, ends: x.index_select(0, sources // rows.shape[1])},
    times_backward=True)

PERMUTE_TILES = Operation(
    "permute_tiles", lambda codes, scales, *places: permute_tiles(codes, scales, Permutation(*places)),
    lambda codes, scales, *places: permute_tiles_reference(codes, scales, Permutation(*places)),
    dtypes=(torch.float32,),
    cases={"7 x 200": _tiles(200, 7, 5, 2), "33 x 128, aligned": _tiles(128, 33, 6, 4, align=16),
           "mostly padding": _tiles(128, 2, 8, 3, align=16), "no token": _tiles(128, 0, 8, 3)},
    shapes={"8192 x 8 x 7168, aligned": lambda: _tiles(7168, *FULL, align=128)(torch.bfloat16)})

UNPERMUTE = Operation(
    "unpermute", lambda rows, weights, *places: unpermute(rows, Permutation(*places), weights),
    lambda rows, weights, *places: unpermute_reference(rows, Permutation(*places), weights),
    cases={"7 x 24": _rows(24, 7, 5, 2), "33 x 40, aligned": _rows(40, 33, 6, 4, align=16),
           "one token": _rows(16, 1, 8, 3), "no token": _rows(16, 0, 8, 3),
           "mostly padding": _rows(24, 2, 8, 3, align=16), "wide": _rows(1100, 2, 4, 2)},
    shapes={"8192 x 8 x 7168": lambda: _rows(7168, *FULL)(torch.bfloat16),
            "16384 x 8 x 1024": lambda: _rows(1024, *MINI)(torch.bfloat16)},
    peers={"compiled definition": compiled(
        lambda rows, weights, *places: unpermute_reference(rows, Permutation(*places), weights))},
    times_backward=True)
