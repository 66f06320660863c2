"""How a tensor core adds FP8 products, asked of the hardware itself (report section 3.5.2).

    python tools/tensor_cores.py                        on a Hopper GPU, a few seconds
    python tools/tensor_cores.py --device cpu --out x   anywhere: the package's model answers instead

The hardware is `torch._scaled_mm` on E4M3 codes with `use_fast_accum`, so without promotion, with scales of 1 and FP32
results. A probe is one sum whose terms are powers of two, chosen so that a detail of the adder decides whether a small
one survives:

    B  then s  then -B      what is left of s beside a sum so far of B
    B, -B and s at once     what is left of s beside a product of B in the same step
    B, -B and s elsewhere   s survives if its step is another one: so many products are one step

`Adder` is the family of adders that the probes tell apart (tests/test_tensor_cores.py shows it for each); the package's
model, `minidsv3.accumulate`, is one of them. Random data then compare it with the hardware bit for bit.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minidsv3 import bench, bench_kernels
from minidsv3.accumulate import accumulate
from minidsv3.formats import E4M3, octave, round_to
from minidsv3.kernels import fp8_gemm

OUT = Path(__file__).parents[1] / "results" / "tensor_cores.json"
LENGTHS, ROWS = (32, 128, 512, 2048, 4096, 8192, 16384), 128
SIDE = 2048             # products of this many rows and columns fill a GPU, so that no library splits K among cores
K, LATER, LAST = 512, 128, 256      # a probe's length, and where its second and its third step begin
LARGE, RANGE = 14, 26               # B is 2^14, and E4M3's normal numbers reach 2^-26 of it

Multiply = Callable[[Tensor, Tensor], Tensor]       # a [M, K], b [N, K], values of E4M3 -> a b^T [M, N] in FP32
Factors = tuple[float, float]                       # of one product

# Written before the run; each reads what main() found.
CLAIMS = {
    "sum so far": ("the sum so far is aligned with the products of a step: each of them is cut alone",
                   lambda found: found["probes"]["sum_so_far_is_aligned"]),
    "bits": ("14 bits are kept, beside a product, beside the sum so far and of the result",
             lambda found: {found["probes"][name] for name in ("bits_beside_product", "bits_beside_sum",
                                                               "bits_of_result")} == {14}),
    "cut": ("bits are cut off towards zero, of products and of the result",
            lambda found: {found["probes"][name] for name in ("products_are_cut", "result_is_cut")}
            == {"towards zero"}),
    "step": ("32 products are one step", lambda found: found["probes"]["products_of_a_step"] == 32),
    "bit for bit": ("the model's sums of random numbers are the hardware's, all of them, at every K",
                    lambda found: all(row["equal_to_model"] == 1 for rows in found["errors"].values()
                                      for row in rows)),
    "error": ("of positive numbers at K = 4,096 the error is 7 to 8 %, and at least 30 times that of promoted sums",
              lambda found: all(0.07 < row["tensor_core"]["norm"] < 0.08 and
                                row["tensor_core"]["norm"] > 30 * row["fp8_gemm"]["norm"]
                                for row in found["errors"]["uniform"] if row["K"] == 4096)),
}


# ---- who multiplies -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Adder:
    """One of the adders that the report's sentence leaves possible; without promotion."""

    bits: int = 14
    step: int = 32
    aligns_sum: bool = True             # or the products are added first, and their sum to the sum so far
    cut: str = "towards zero"           # or "downwards", "to nearest"
    normalised: bool = False            # products are normalised before they are aligned

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()           # which hold every term and sum exactly
        total = a.new_zeros(len(a), len(b))
        for x, y in zip(a[:, None].split(self.step, 2), b[None].split(self.step, 2)):
            products = x * y
            exponents = octave(products) if self.normalised else octave(x) * octave(y)
            if self.aligns_sum:
                total = self.add(torch.cat([total[..., None], products], 2),
                                 torch.cat([octave(total)[..., None], exponents], 2))
            else:
                pair = torch.stack([total, self.add(products, exponents)], 2)
                total = self.add(pair, octave(pair))
        return total.float()

    def add(self, terms: Tensor, exponents: Tensor) -> Tensor:
        total = self.shorten(terms, exponents.amax(-1, keepdim=True)).sum(-1)
        return self.shorten(total, octave(total))

    def shorten(self, x: Tensor, largest: Tensor) -> Tensor:
        cut = {"towards zero": torch.trunc, "downwards": torch.floor, "to nearest": torch.round}[self.cut]
        step = largest.clamp(min=2.0 ** -100) * 2.0 ** (1 - self.bits)
        return cut(x / step) * step


def tensor_core(a: Tensor, b: Tensor, fast: bool = True) -> Tensor:
    """The hardware. Rows are repeated until there are SIDE of them."""
    one = torch.ones((), device=a.device)
    codes = [x.repeat(-(-SIDE // len(x)), 1)[:SIDE].to(torch.float8_e4m3fn) for x in (a, b)]
    product = torch._scaled_mm(codes[0], codes[1].T, scale_a=one, scale_b=one, out_dtype=torch.float32,
                               use_fast_accum=fast)
    return product[:len(a), :len(b)]


def our_gemm(a: Tensor, b: Tensor) -> Tensor:
    """The package's product, promoted each 128, with scales of 1."""
    codes = [x.to(torch.float8_e4m3fn) for x in (a, b)]
    scales = [torch.ones(-(-x.shape[1] // 128), len(x), device=x.device) for x in (a, b)]
    return fp8_gemm(codes[0], scales[0], codes[1], scales[1], torch.float32)


# ---- probes ---------------------------------------------------------------------------------------------------------

def power(n: int, sign: int = 1, mantissa: float = 1.0) -> Factors:
    """sign mantissa 2^n as a product of two E4M3 numbers; -12 <= n <= 14."""
    return sign * mantissa * 2.0 ** (n // 2), 2.0 ** (n - n // 2)


def sums(multiply: Multiply, probes: list[dict[int, Factors]], device: str) -> list[float]:
    """What `multiply` makes of each probe, a sum of K products of which those named by position are not zero."""
    a, b = torch.zeros(2, len(probes), K, device=device)
    for row, probe in enumerate(probes):
        for position, (x, y) in probe.items():
            a[row, position], b[row, position] = x, y
    return multiply(a, b).diagonal().tolist()


def bits_kept(kept: list[bool]) -> int:
    """From whether 2^-1, 2^-2 ... of B survive: how many bits are kept, the one that stands for B included."""
    return 1 + (kept.index(False) if False in kept else len(kept))


def direction(of_positive: float, of_negative: float) -> str:
    """From what three quarters of the last bit became, in last bits, for both signs."""
    names = {(0, 0): "towards zero", (0, -1): "downwards", (1, -1): "to nearest", (1, 0): "upwards"}
    return names.get((of_positive, of_negative), f"{of_positive} and {of_negative} last bits")


def probe(multiply: Multiply, device: str) -> dict:
    """Everything that the probes find out about one `multiply`."""
    def ask(*probes: dict[int, Factors]) -> list[float]:
        return sums(multiply, list(probes), device)

    def beside_sum(*small: Factors) -> dict[int, Factors]:
        return {0: large, **dict(enumerate(small, LATER)), LAST: minus}

    large, minus = power(LARGE), power(LARGE, -1)
    below = [LARGE - i for i in range(1, RANGE + 1)]
    at_once = bits_kept([left != 0 for left in ask(*({0: large, 1: minus, 2: power(n)} for n in below))])
    after = bits_kept([left != 0 for left in ask(*(beside_sum(power(n)) for n in below))])

    last = LARGE + 1 - after                        # exponent of the last bit beside the sum so far
    (together,) = ask(beside_sum(*[power(last - 1)] * 32))
    cut = ask(*(beside_sum(power(last - 1, sign, 1.5)) for sign in (1, -1)))

    gone = power(LARGE - at_once)                   # the first that does not survive beside a product
    places = range(2, LATER)
    left = ask(*({0: large, 1: minus, place: gone} for place in places))
    lost = [place for place, value in zip(places, left) if not value]
    odd = 1.75 * 2.0 ** (LARGE // 2)                # its square has the octave 2^15 and exponents that add up to 14
    (beside_square,) = ask({0: (odd, odd), 1: (-odd, odd), 2: power(LARGE + 1 - at_once)})

    # Read at once: nothing follows that could cut the result again. 2^s B and one last bit need s bits more.
    end, unit = K - 16, 2.0 ** (LARGE + 1 - at_once)
    grown = [{end + i: power(LARGE) for i in range(2 ** s)} | {K - 1: power(LARGE + 1 - at_once)} for s in range(4)]
    kept = [total == 2 ** s * 2.0 ** LARGE + unit for s, total in enumerate(ask(*grown))]
    four = [{**{end + i: power(LARGE, sign) for i in range(4)}, K - 1: power(LARGE + 1 - at_once, sign),
             K - 2: power(LARGE + 2 - at_once, sign)} for sign in (1, -1)]
    up, down = ask(*four)
    return {
        "bits_beside_product": at_once, "bits_beside_sum": after,
        "sum_so_far_is_aligned": together == 0, "products_are_cut": direction(*(x / 2.0 ** last for x in cut)),
        "products_of_a_step": 2 + len(lost), "lost_at": lost,
        "exponent_of_a_product": "of its factors, added" if beside_square else "its own",
        "bits_of_result": at_once + kept.count(True) - 1,
        "result_is_cut": direction(*((x - sign * 4 * 2.0 ** LARGE) / (4 * unit)
                                     for x, sign in ((up, 1), (down, -1)))),
    }


# ---- errors ---------------------------------------------------------------------------------------------------------

def operands(kind: str, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Two times ROWS rows of E4M3 values, uniform on [0, 1] or normal, each row scaled so that its largest is 448."""
    generator = torch.Generator().manual_seed(length)
    draw = {"uniform": torch.rand, "normal": torch.randn}[kind]
    a, b = (draw(ROWS, length, generator=generator) for _ in "ab")
    return tuple(round_to(x / x.abs().amax(1, keepdim=True) * 448, E4M3).to(device) for x in (a, b))


def error(product: Tensor, exact: Tensor) -> dict[str, float]:
    """Of the whole matrix in the norm, and the mean with its sign in units of the mean size."""
    wrong = product.double() - exact
    return {"norm": round((wrong.norm() / exact.norm()).item(), 7),
            "mean": round((wrong.mean() / exact.abs().mean()).item(), 7)}


def errors(multiply: Multiply, kind: str, length: int, device: str) -> dict:
    """How far each product is from the exact one of the same codes, and which share of the model's sums is right."""
    a, b = operands(kind, length, device)
    exact = a.double() @ b.double().T
    products = {"tensor_core": multiply(a, b), "model": accumulate(a, b, None), "fp8_gemm": our_gemm(a, b),
                "model_promoted": accumulate(a, b)}
    if device == "cuda":
        products["cublas_promoted"] = tensor_core(a, b, fast=False)

    def equal(one: str, other: str) -> float:
        return (products[one] == products[other]).double().mean().item()
    return {"K": length, "equal_to_model": equal("tensor_core", "model"),
            "fp8_gemm_equal_to_model": equal("fp8_gemm", "model_promoted"),
            **{name: error(product, exact) for name, product in products.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the model answers")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    multiply = tensor_core if on_gpu else lambda a, b: accumulate(a, b, promote_every=None)
    found = {"command": f"python tools/tensor_cores.py --device {options.device}",
             "machine": bench_kernels.machine() if on_gpu else bench.machine(),
             "what": f"torch._scaled_mm of E4M3 codes, use_fast_accum, scales 1, FP32 results, {SIDE} x {SIDE}; errors "
                     f"of {ROWS} x {ROWS} of them, relative to the exact product of the same codes",
             "probes": probe(multiply, options.device),
             "errors": {kind: [errors(multiply, kind, length, options.device) for length in LENGTHS]
                        for kind in ("uniform", "normal")}}
    found["claims"] = [{"id": name, "claim": claim, "holds": bool(holds(found))}
                       for name, (claim, holds) in CLAIMS.items()]
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
