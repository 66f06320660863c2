"""The loss over the vocabulary, with and without the output head in front of it."""

import torch
import torch.nn.functional as F

from ..cross_entropy import cross_entropy, cross_entropy_reference, linear_cross_entropy, linear_cross_entropy_reference
from ..operation import Operation, compiled, leaf


def _inputs(tokens: int, words: int):
    return lambda dtype: (leaf(tokens, words, dtype=dtype), torch.randint(0, words, (tokens,)))


def _head_inputs(tokens: int, words: int, width: int = 24):
    return lambda dtype: (leaf(tokens, width, dtype=dtype), leaf(words, width, dtype=dtype),
                          torch.randint(0, words, (tokens,)), torch.rand(tokens))


def _rows_apart(dtype: torch.dtype) -> tuple:
    """Logits inside wider rows; the last ones are so large that their exponentials overflow."""
    logits = torch.randn(5, 40, dtype=dtype)[:, 3:36]
    logits[-1] *= 400
    return logits.requires_grad_(), torch.randint(0, 33, (5,))


def _words_ruled_out(dtype: torch.dtype) -> tuple:
    """Logits of -inf, as masks leave them: more of them in front than the kernel takes at once, or behind."""
    logits = torch.randn(2, 9001, dtype=dtype)
    logits[0, :8500], logits[1, 500:] = float("-inf"), float("-inf")
    return logits.requires_grad_(), torch.tensor([8700, 3])


SIZES = {"one token": (1, 8), "7 x 24": (7, 24), "33 x 40": (33, 40), "129 x 16": (129, 16)}
OPERATION = Operation(
    "cross_entropy", cross_entropy, cross_entropy_reference,
    cases={name: _inputs(*size) for name, size in SIZES.items()} | {
        "rows apart": _rows_apart, "several blocks": _inputs(3, 9001), "words ruled out": _words_ruled_out},
    shapes={"4096 x 129280": lambda: _inputs(4096, 129280)(torch.bfloat16)},
    peers={"eager": lambda logits, targets: F.cross_entropy(logits.float(), targets, reduction="none"),
           "compiled definition": compiled(cross_entropy_reference)}, times_backward=True)
LINEAR = Operation(
    "linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_reference,
    cases={name: _head_inputs(*size) for name, size in SIZES.items()})
