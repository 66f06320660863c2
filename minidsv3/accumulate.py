"""How Hopper's tensor cores add FP8 products, and what promotion mends, in plain torch (report sections 3.3.2, 3.5.2).

What is modelled, and what an H200 does to the last bit: cuBLAS without promotion and our `fp8_gemm` with it gave the
model's sums for all random numbers that we tried, K = 32 ... 16384 (tools/tensor_cores.py, results/tensor_cores.json).

    1.  One step takes 32 products and the sum so far. All 33 are aligned to the largest of them by their exponents;
        a product's exponent is the sum of its factors' exponents.
    2.  Each keeps 14 bits of that alignment, of which the first stands for the largest exponent. Bits below are cut
        off, towards zero. What is left adds up exactly, and the result is cut to 14 bits as well.
    3.  Promotion: after every N_C = 128 products the sum is added to one in FP32 and starts again at zero.

Steps 1 and 2 are section 3.5.2's sentence, which leaves open that the sum so far is one of the aligned, which way bits
are cut, and what a product's exponent is; the probes found these.

So a product far smaller than the sum so far loses its low bits alone, before it meets the other 31: of positive numbers
each loses half a step on average, 32 times as much as if their sum were cut once.
"""

import torch
from torch import Tensor

from .formats import octave

CHUNK, BITS = 32, 14
PROMOTION = 128         # N_C, four steps of 32 products


def accumulate(a: Tensor, b: Tensor, promote_every: int | None = PROMOTION, bits: int = BITS,
               chunk: int = CHUNK) -> Tensor:
    """a b^T as tensor cores with a short accumulator add it: a [M, K], b [N, K] -> [M, N] in FP32.

    a and b hold values of FP8 codes, without scales. `promote_every` counts values of K, None promotes never. Every
    step is exact in FP32 but for what is cut off: 33 numbers of at most 15 bits add up to at most 21.
    Raises ValueError for shapes that do not fit and for a `promote_every` that is no multiple of `chunk`.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"accumulate got a {list(a.shape)} and b {list(b.shape)}; it needs [M, K] and [N, K]")
    if promote_every is not None and (promote_every < chunk or promote_every % chunk):
        raise ValueError(f"promote_every is {promote_every}; it must be a multiple of the {chunk} products that are "
                         f"added at once, or None")
    a, b = a.float()[:, None], b.float()[None]
    total = short = a.new_zeros(a.shape[0], b.shape[1])
    for end, x, y in zip(range(chunk, a.shape[2] + chunk, chunk), a.split(chunk, 2), b.split(chunk, 2)):
        short = add_short(short, x * y, (octave(x) * octave(y)).amax(2), bits)
        if promote_every is not None and end % promote_every == 0:
            total, short = total + short, torch.zeros_like(short)
    return total + short


def add_short(short: Tensor, products: Tensor, largest: Tensor | None = None, bits: int = BITS) -> Tensor:
    """One step: the sum so far [..] and products [.., n] -> [..], all aligned, each cut to `bits` bits, the sum too.

    `largest` [..] holds the largest of the products' exponents as 2^n, by default that of their values.
    """
    largest = torch.maximum(octave(short), octave(products).amax(-1) if largest is None else largest)
    return cut(cut(products, largest[..., None], bits).sum(-1) + cut(short, largest, bits), bits=bits)


def cut(x: Tensor, largest: Tensor | None = None, bits: int = BITS) -> Tensor:
    """x towards zero to `bits` bits, of which the first stands for `largest` = 2^n (by default x's own octave)."""
    step = (octave(x) if largest is None else largest).clamp(min=2.0 ** -100) * 2.0 ** (1 - bits)
    return (x / step).trunc() * step
