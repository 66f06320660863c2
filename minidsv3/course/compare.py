"""`check`: the notebook's version and the package's are equal, value by value.

What is printed names the tolerance and never the error, because errors differ from one CPU to the next.
"""

import torch
from torch import Tensor


def check(name: str, got: object, want: object, tol: float = 1e-10) -> None:
    """Prints `name: ok (tol ..)`, or raises AssertionError that names the first place where the two differ.

    Compares numbers, tensors of any dtype, strings, and tuples, lists and dicts of them. Numbers agree if
    |got - want| <= tol * max(1, |want|), so `tol` is relative for large values; with tol=0 they must be equal.
    NaN agrees with nothing, not even with NaN.
    """
    found = difference(got, want, tol)
    if found is not None:
        raise AssertionError(f"{name}: {found}")
    print(f"{name}: ok ({f'tol {tol:g}' if tol else 'exact'})")


def difference(got: object, want: object, tol: float, place: str = "") -> str | None:
    """A sentence on the first difference, by shape or index, that does not give `want` away; None if there is none."""
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(got) != set(want):
            return f"the keys{place} are {list(got) if isinstance(got, dict) else got!r}, but should be {list(want)}"
        return _first(difference(got[key], want[key], tol, f"{place} at {key!r}") for key in want)
    if isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            length = len(got) if isinstance(got, (tuple, list)) else None
            found = f"{length} values" if length is not None else f"a {type(got).__name__}"
            return f"found {found}{place}, where {len(want)} values are right"
        return _first(difference(g, w, tol, f"{place or ' at '}[{i}]") for i, (g, w) in enumerate(zip(got, want)))
    if isinstance(want, (Tensor, bool, int, float)):
        return _numbers(got, want, tol, place)
    return None if got == want else f"found {got!r}{place}, which is not right"


def _first(sentences) -> str | None:
    return next((sentence for sentence in sentences if sentence is not None), None)


def _numbers(got: object, want: Tensor | float, tol: float, place: str) -> str | None:
    if not isinstance(got, (Tensor, bool, int, float)):
        return f"found {type(got).__name__} {got!r}{place}, where a {type(want).__name__} is right"
    got, want = torch.as_tensor(got).detach(), torch.as_tensor(want).detach()
    if got.shape != want.shape:
        return f"the shape{place} is {list(got.shape)}, but should be {list(want.shape)}"
    wrong = ~_agree(got, want, tol)
    if not wrong.any():
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    if not index:
        return f"{got.item():,}{place} is not right"
    return (f"{int(wrong.sum()):,} of {wrong.numel():,} values{place} differ, the first at index {list(index)}, "
            f"which is {got[index].item():g}")


def _agree(got: Tensor, want: Tensor, tol: float) -> Tensor:
    """Where the two agree. Whole numbers are compared as such: float64 would round parameter counts above 2^53."""
    if got.is_floating_point() or want.is_floating_point():
        got, want = got.double(), want.double()
    elif want.dtype is torch.bool:
        got, want = got.long(), want.long()
    room = tol * want.abs().clamp(min=1)
    return (got == want) | ((got - want).abs() <= room) & want.isfinite()
