"""How Hopper's tensor cores add FP8 products, and what promotion mends, in plain torch (report sections 3.3.2, 3.5.2).

What is modelled, as section 3.5.2 tells it:

    1.  32 products are aligned to the largest of them, by their exponents: each keeps the highest 14 bits of that
        alignment, and bits below are cut off (towards zero).
    2.  The sum of the 32 is added to the accumulator, which "also employs 14-bit precision": both are aligned to the
        larger one and cut to 14 bits, and so is what comes out.
    3.  Promotion: after every N_C = 128 products the accumulator is added to a sum in FP32 and starts again at zero.

What is not known: the order of the 32, whether a bit more is kept somewhere, and which way a negative number is cut
(two's complements would cut downwards, which makes the error of sums round zero several times as large). Nothing is
tuned: the report's "nearly 2 %" at K = 4096 depends on the data and on the metric, and neither is given there.
"""

import torch
from torch import Tensor

from .formats import octave

CHUNK, BITS = 32, 14
PROMOTION = 128         # N_C, four instructions of 32 products


def accumulate(a: Tensor, b: Tensor, promote_every: int | None = PROMOTION, bits: int = BITS,
               chunk: int = CHUNK) -> Tensor:
    """a b^T as tensor cores with a short accumulator add it: a [M, K], b [N, K] -> [M, N] in FP32.

    a and b hold values of FP8 codes, without scales. `promote_every` counts values of K, None promotes never. Every
    step is exact in FP32 but for what is cut off: a product has 8 bits, a sum of 32 aligned ones at most 19.
    Raises ValueError for shapes that do not fit and for a `promote_every` that is no multiple of `chunk`.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"accumulate got a {list(a.shape)} and b {list(b.shape)}; it needs [M, K] and [N, K]")
    if promote_every is not None and (promote_every < chunk or promote_every % chunk):
        raise ValueError(f"promote_every is {promote_every}; it must be a multiple of the {chunk} products that are "
                         f"added at once, or None")
    a, b = a.float(), b.float()
    total = short = a.new_zeros(len(a), len(b))
    for start in range(0, a.shape[1], chunk):
        products = a[:, None, start:start + chunk] * b[None, :, start:start + chunk]
        short = add_short(torch.stack([short, add_short(products, bits)], -1), bits)
        if promote_every is not None and (start + chunk) % promote_every == 0:
            total, short = total + short, torch.zeros_like(short)
    return total + short


def add_short(terms: Tensor, bits: int = BITS) -> Tensor:
    """The sum of `terms` [.., n] over the last axis: aligned to the largest, each cut to `bits` bits, the sum too."""
    return cut(cut(terms, octave(terms).amax(-1, keepdim=True), bits).sum(-1), None, bits)


def cut(x: Tensor, largest: Tensor | None = None, bits: int = BITS) -> Tensor:
    """x towards zero to `bits` bits, of which the first stands for `largest` = 2^n (by default x's own octave)."""
    step = (octave(x) if largest is None else largest).clamp(min=2.0 ** -100) * 2.0 ** (1 - bits)
    return (x / step).trunc() * step
