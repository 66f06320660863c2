"""Attention over the latent cache: rows of very different lengths, contiguous and in pages, one query or two."""

import torch
from torch import Tensor

from ..mla_decode import mla_decode, mla_decode_reference
from ..operation import Operation, compiled


def _inputs(lengths: list[int], queries: int, heads: int, capacity: int, rank: int = 16, rope: int = 8,
            size: float = 1.0):
    """`size` scales the logits."""
    def build(dtype: torch.dtype) -> tuple:
        query = torch.randn(len(lengths), queries, heads, rank + rope, dtype=dtype) * size
        cache = torch.randn(len(lengths), capacity, rank + rope, dtype=dtype)
        return query, cache, torch.tensor(lengths, dtype=torch.int32), rank, 0.14, None
    return build


def _paged(lengths: list[int], queries: int, heads: int, page: int, rank: int = 16, rope: int = 8):
    """Every sequence has room for its longest; pages lie in no order, and those that hold nothing are -1."""
    def build(dtype: torch.dtype) -> tuple:
        query, _, counts, *rest = _inputs(lengths, queries, heads, 1, rank, rope)(dtype)
        needed = -(-torch.tensor(lengths) // page)
        pages = torch.full((len(lengths), int(needed.max())), -1, dtype=torch.int32)
        order = torch.randperm(int(needed.sum())).int().split(needed.tolist())
        for own, some in zip(pages, order, strict=True):
            own[:len(some)] = some
        return query, torch.randn(int(needed.sum()), page, rank + rope, dtype=dtype), counts, *rest[:-1], pages
    return build


def _strided(dtype: torch.dtype) -> tuple:
    """One layer of a cache with room for more tokens; queries of two batches apart; int64 lengths."""
    query, cache, lengths, rank, scale, _ = _inputs([128, 7], 1, 3, 160)(dtype)
    query = torch.stack((query, query + 1), 1)[:, 0]
    return query, cache[:, :128], lengths.long(), rank, scale, None


def _large_logits(dtype: torch.dtype) -> tuple:
    """Whole numbers, so that logits of several hundred are exact; exp of them would overflow."""
    query, cache, *rest = _inputs([70, 130], 1, 2, 130)(dtype)
    return (query * 4).round(), (cache * 4).round(), *rest


def _full(batch: int, context: int, queries: int, heads: int, page: int | None = None):
    """Sequences of one length, at the ranks of the full model."""
    def build() -> tuple:
        shape = (batch, context) if page is None else (batch * context // page, page)
        pages = None if page is None else torch.arange(shape[0], dtype=torch.int32).flip(0).view(batch, -1)
        return (torch.randn(batch, queries, heads, 576, dtype=torch.bfloat16),
                torch.randn(*shape, 576, dtype=torch.bfloat16), torch.full((batch,), context, dtype=torch.int32), 512,
                0.135, pages)
    return build


def bmm_absorbed(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float,
                 pages: Tensor | None) -> Tensor:
    """Two batched products and a softmax; logits and probabilities go through memory. It has no pages and takes all
    tokens for seen, which is less work."""
    if pages is not None:
        raise ValueError("bmm takes a contiguous cache only")
    s = torch.bmm(query.flatten(1, 2), cache.mT) * scale
    p = s.softmax(-1, dtype=torch.float32).to(cache.dtype)
    return torch.bmm(p, cache[..., :rank]).unflatten(1, query.shape[1:3])


def _flops(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float, pages: Tensor | None) -> float:
    """Of full caches: a product with every row for the logit, one with every latent for the output."""
    capacity = cache.shape[1] * (1 if pages is None else pages.shape[1])
    return 2 * query.shape[:3].numel() * capacity * (query.shape[3] + rank)


OPERATION = Operation(
    "mla_decode", mla_decode, mla_decode_reference,
    cases={"1, 70, 200": _inputs([1, 70, 200], 1, 3, 200), "two queries": _inputs([64, 97, 2], 2, 20, 100),
           "pages": _paged([65, 1, 130], 1, 4, 64), "long pages, two queries": _paged([128, 129], 2, 5, 128),
           "wide": _inputs([70], 1, 70, 72, 64, 16), "no tokens": _inputs([0, 5, 1], 2, 2, 8),
           "odd widths": _inputs([40, 3], 1, 2, 40, 24, 4), "no sequence": _inputs([], 1, 2, 8),
           "no cache": _inputs([0], 1, 2, 0), "strided": _strided, "large logits": _large_logits},
    shapes={"b128, context 4096, 128 heads": _full(128, 4096, 1, 128),
            "b128, context 4096, 16 heads": _full(128, 4096, 1, 16),
            "b128, context 4096, 16 heads, 2 queries": _full(128, 4096, 2, 16),
            "b128, context 4096, 128 heads, pages of 64": _full(128, 4096, 1, 128, 64),
            "b4, context 16384, 128 heads": _full(4, 16384, 1, 128)},
    peers={"bmm absorbed": bmm_absorbed, "compiled": compiled(mla_decode_reference)}, flops=_flops)
