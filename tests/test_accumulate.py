"""The short accumulator: exact while few bits are needed, the model step by step, and what promotion mends."""

import math

import pytest
import torch

from minidsv3 import accumulate as module
from minidsv3.accumulate import accumulate, add_short, cut
from minidsv3.formats import E4M3, round_to


def operands(K: int, positive: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values of 16 rows each, uniform on [0, 1] or normal, scaled to 448."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if positive else torch.randn
    rows = [draw(16, K, generator=generator) for _ in range(2)]
    return tuple(round_to(x / x.abs().amax(1, keepdim=True) * 448, E4M3) for x in rows)


def exact(a, b):
    return a.double() @ b.double().T


def relative_error(a, b, promote_every) -> float:
    """The mean over entries of |error| / |sum|: for positive numbers, whose sums do not cancel."""
    return ((accumulate(a, b, promote_every) - exact(a, b)).abs() / exact(a, b).abs()).mean().item()


# ---- the model ----------------------------------------------------------------------------------------------------

def octave(value: float) -> float:
    return 2.0 ** (math.frexp(value)[1] - 1) if value else 0.0


def by_hand(a: list[float], b: list[float], promote_every: int | None, bits: int = 14) -> float:
    """The steps of the module's head for one entry, in Python's integers and floats."""
    def shortened(value, largest):
        step = largest * 2.0 ** (1 - bits)
        return int(value / step) * step if step else 0.0

    total = short = 0.0
    for start in range(0, len(a), 32):
        pairs = list(zip(a[start:start + 32], b[start:start + 32]))
        largest = max(octave(short), *(octave(x) * octave(y) for x, y in pairs))
        short = shortened(short, largest) + sum(shortened(x * y, largest) for x, y in pairs)
        short = shortened(short, octave(short))
        if promote_every and (start + 32) % promote_every == 0:
            total, short = torch.tensor(total).float().add(short).item(), 0.0
    return torch.tensor(total).float().add(short).item()


@pytest.mark.parametrize("K", [32, 40, 128, 200, 512])
@pytest.mark.parametrize("promote_every", [None, 32, 128])
@pytest.mark.parametrize("positive", [True, False])
def test_the_model_is_its_three_steps(K, promote_every, positive):
    a, b = operands(K, positive)
    got = accumulate(a[:3], b[:2], promote_every)
    assert got.tolist() == [[by_hand(x, y, promote_every) for y in b[:2].tolist()] for x in a[:3].tolist()]


def test_few_bits_are_added_exactly():
    """Whole numbers: sums stay below 2^14, so nothing is cut off."""
    a, b = torch.randint(-3, 4, (5, 1024)).float(), torch.randint(-3, 4, (7, 1024)).float()
    for promote_every in (None, 128):
        assert torch.equal(accumulate(a, b, promote_every), (a @ b.T))
    assert torch.equal(accumulate(0 * a, b), torch.zeros(5, 7))


def test_bits_below_the_fourteenth_are_cut_off():
    terms = torch.tensor([8192.0, 1.0, 0.75, 0.5])
    assert add_short(torch.tensor(0.0), terms) == 8193                    # one bit less than 1: gone
    assert add_short(torch.tensor(0.0), -terms) == -8193                  # towards zero
    assert add_short(torch.tensor(8192.0), terms[1:]) == 8193             # beside the sum so far as beside a product
    assert add_short(torch.tensor(0.0), torch.tensor([8192.0, 8192.0, 1.0])) == 16384       # the result has 15 bits
    assert cut(torch.tensor(16387.0)) == 16386 and cut(torch.tensor(-16387.0)) == -16386


def test_many_small_products_are_lost_one_by_one():
    """2^14, and then 32 times 1.5: steps of 2 beside it, so that 48 are lost. All in one step with -2^14 nothing is
    left; one step later, beside nothing large, they are all there."""
    a, b = torch.zeros(3, 96), torch.ones(1, 96)
    a[:, 0] = 16384
    a[0, 32:64], a[1, 1:32], a[2, 64:] = 1.5, 1.5, 1.5
    a[1, 31] = a[2, 32] = -16384
    assert accumulate(a, b, None).flatten().tolist() == [16384, 0, 48]
    assert accumulate(a, b, 32).flatten().tolist() == [16384 + 48, 0, 48]


def test_the_exponent_of_a_product_is_that_of_its_factors():
    """1.75^2 = 3.0625 has exponent 0 here and not 1: beside it 2^-13 is kept, though its own octave begins at 2."""
    a, b = torch.zeros(1, 32), torch.ones(1, 32)
    a[0, :2], b[0, :2] = torch.tensor([1.75, -1.75]), 1.75
    a[0, 2] = 2.0 ** -13
    assert accumulate(a, b, None) == 2.0 ** -13
    assert accumulate(a * b, torch.ones(1, 32), None) == 0


def test_a_small_number_is_lost_in_a_large_sum_and_not_after_promotion():
    a, b = torch.zeros(1, 256), torch.ones(1, 256)
    a[0, 0], a[0, 128:160] = 16384, 1                                   # 32 ones behind one large number
    a[0, 160:] = 0.015625
    assert accumulate(a, b, None) == 16384 and accumulate(a, b, 128) == 16384 + 33.5


# ---- error and K ---------------------------------------------------------------------------------------------------

def test_without_promotion_the_error_grows_with_K_and_with_it_not():
    """Uniform positive operands: half a step of each product is lost, and the step grows with the sum. So the error
    grows as K does, to 7.5 % at K = 4096; with promotion it stays at 0.06 %."""
    errors = {K: relative_error(*operands(K, positive=True), None) for K in (128, 1024, 4096, 16384)}
    mended = {K: relative_error(*operands(K, positive=True), 128) for K in (128, 1024, 4096, 16384)}
    assert errors[128] == mended[128]
    assert errors[1024] > 20 * errors[128] and errors[4096] > 4 * errors[1024] and errors[16384] > 3 * errors[4096]
    assert 0.07 < errors[4096] < 0.08 and 0.24 < errors[16384] < 0.26
    assert max(mended.values()) < 1.1 * min(mended.values()) and max(mended.values()) < 6e-4


def test_of_normal_operands_too():
    """Over the root of the sum of squared products, which does not cancel."""
    def error(K, promote_every):
        a, b = operands(K, positive=False)
        norm = (a.double().square() @ b.double().square().T).sqrt()
        return ((accumulate(a, b, promote_every) - exact(a, b)) / norm).square().mean().sqrt().item()
    assert error(16384, None) > 3 * error(1024, None) and error(16384, 128) < 1.2 * error(1024, 128)


@pytest.mark.parametrize("wrong", ["promotes at the end", "is not emptied", "rounds", "adds the products first"])
def test_these_tests_see_a_wrong_accumulator(wrong, monkeypatch):
    if wrong == "rounds":
        monkeypatch.setattr(torch.Tensor, "trunc", torch.Tensor.round)
    elif wrong == "adds the products first":
        def products_first(short, products, largest, bits):
            return add_short(short, add_short(torch.zeros_like(short), products, largest)[..., None])
        monkeypatch.setattr(module, "add_short", products_first)
    else:
        def mutant(a, b, promote_every=128):
            total = accumulate(a, b, None)
            if wrong == "is not emptied":
                total = sum(accumulate(a[:, :end], b[:, :end], None) for end in range(128, a.shape[1] + 1, 128))
            return total
        monkeypatch.setattr(module, "accumulate", mutant)
    a, b = operands(512, positive=True)
    with pytest.raises(AssertionError):
        assert module.accumulate(a[:2], b[:2], 128).tolist() == [
            [by_hand(x, y, 128) for y in b[:2].tolist()] for x in a[:2].tolist()]


def test_refusals():
    with pytest.raises(ValueError, match=r"accumulate got a \[2, 64\] and b \[2, 32\]; it needs \[M, K\] and \[N, K\]"):
        accumulate(torch.ones(2, 64), torch.ones(2, 32))
    for promote_every in (0, 16, 100):
        with pytest.raises(ValueError, match=f"promote_every is {promote_every}; it must be a multiple of the 32"):
            accumulate(torch.ones(2, 64), torch.ones(2, 64), promote_every)
