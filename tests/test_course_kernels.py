"""Chapter 05's exercises: what hides behind the wrong answers, memory round an output, and tests that spare mutants."""

import random

import pytest
import torch

from minidsv3.course import kernels
from minidsv3.course.compare import difference
from minidsv3.kernels import fp8_gemm, use_kernels
from minidsv3.kernels.backend import INTERPRETED, tl, triton

PUZZLES = (kernels.ADD, kernels.NORM, kernels.SCALE, kernels.GEMM)


def cases(task, seed: int = 0) -> list[tuple]:
    return list(task.cases(random.Random(f"{task.id} {seed}")).values())


# ---- published numbers and the package ------------------------------------------------------------------------------

def test_floors_of_the_data_sheet():
    """64 tokens wait for memory, 4,096 for arithmetic: 117.4 MB of weights over 4.8 TB/s, 962 GFLOP over 1,979."""
    assert kernels.time_solution(64, 7168, 16384, 4800, 1979) == pytest.approx(24.87, abs=0.01)
    assert kernels.time_of_flops(64, 7168, 16384, 4800, 1979) == pytest.approx(7.60, abs=0.01)
    assert kernels.time_solution(4096, 7168, 16384, 4800, 1979) == pytest.approx(486.1, abs=0.1)


@pytest.mark.skipif(not INTERPRETED, reason="compares with the interpreter's sums")
def test_the_package_s_kernel_solves_the_product():
    """On the second case, whose rows begin at multiples of 16 bytes, as TMA demands."""
    a, a_scales, b, b_scales, _ = cases(kernels.GEMM)[1]
    with use_kernels("triton"):
        got = fp8_gemm(a.contiguous(), a_scales, b.contiguous(), b_scales, torch.float32)
    assert torch.equal(got, kernels.product(a, a_scales, b, b_scales))


# ---- what stands behind the wrong answers ---------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_faults_are_all_that_is_wrong(seed):
    """Without a fault the functions that make the wrong answers are right: each is wrong for its own reason."""
    for task, function in ((kernels.ADD, kernels.faulty_add), (kernels.NORM, kernels.faulty_norm),
                           (kernels.SCALE, kernels.faulty_scale), (kernels.GEMM, kernels._written(kernels._blockwise))):
        assert task.judge(function, seed).solved, task


def test_cases_hide_nothing():
    for x, gain, eps, _ in cases(kernels.NORM):
        assert x.stride(0) > x.shape[1] and x.shape[1] != triton.next_power_of_2(x.shape[1]) and eps > 0.01
    assert any((x.shape[1] % 128) for x, *_ in cases(kernels.SCALE))
    assert any((tile == 0).all() for x, *_ in cases(kernels.SCALE) for tile in x.split(128, 1)[1])
    (a, a_scales, b, b_scales, _), _ = cases(kernels.GEMM)
    assert len(a_scales) > 2 and len(b_scales) > 1 and a.shape[1] % 128 and len(a) % 16 and a.stride(0) > a.shape[1]


def test_the_stock_of_memory_round_an_output_is_compared():
    """A right answer that also writes behind its output is refused, and told where."""
    def spills(x, y, out):
        torch.as_strided(out, (1,), (1,), out.storage_offset() + len(out)).fill_(3.0)
        return out.copy_(x + y)
    verdict = kernels.ADD.judge(spills, 0)
    assert not verdict.solved and "memory round the output" in verdict.sentence


@pytest.mark.parametrize("values", [torch.arange(5.0), torch.arange(12.0).view(3, 4),
                                    torch.ones(3, 32).to(torch.float8_e4m3fn)], ids=["row", "rows", "codes"])
@pytest.mark.parametrize("gap", [0, 16])
def test_a_buffer_holds_its_values_amid_other_memory(values, gap):
    made = kernels.buffer(values, gap)
    assert torch.equal(made.float().cpu(), values.float())
    assert values.dim() == 1 or made.stride(0) == values.shape[1] + gap
    outside = kernels.memory_round(made).float()
    assert len(outside) == 2 * kernels.MARGIN + gap * (values.shape[0] if values.dim() > 1 else 1)
    assert outside.unique().numel() == 1


def test_not_a_number_agrees_with_itself_and_with_no_right_answer():
    verdict = kernels.SCALE.judge(kernels.SCALE.wrong["no floor"][0], 0)
    assert verdict.sentence == kernels.SCALE.wrong["no floor"][1]
    assert difference(kernels.without_nan(torch.tensor([float("nan")])), torch.tensor([0.0]), 1.0)


def test_a_reader_s_own_kernel_is_judged():
    """A kernel defined beside its launcher, as in a notebook's cell; its mistake is not among the listed ones."""
    assert kernels.ADD.judge(twice, 0).sentence.startswith("not yet: for ")
    assert kernels.ADD.judge(two_blocks_a_program, 0).solved


@triton.jit
def _twice(X, Y, OUT, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + offset, 2 * tl.load(X + offset, mask=offset < n), mask=offset < n)


def twice(x, y, out):
    _twice[(triton.cdiv(len(x), 16),)](x, y, out, len(x), BLOCK=16)
    return out


@triton.jit
def _two_blocks(X, Y, OUT, n, BLOCK: tl.constexpr):
    for part in tl.static_range(2):
        offset = (2 * tl.program_id(0) + part) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(X + offset, mask=offset < n) + tl.load(Y + offset, mask=offset < n)
        tl.store(OUT + offset, total, mask=offset < n)


def two_blocks_a_program(x, y, out):
    _two_blocks[(triton.cdiv(len(x), 32),)](x, y, out, len(x), BLOCK=16)
    return out


# ---- the mutants ----------------------------------------------------------------------------------------------------

def typical_test(rows: int, columns: int, depth: int, gap: int = 0, scale: float | None = None):
    """Compares with the product of the numbers; `scale` gives all tiles the same one."""
    def test(product):
        arguments = kernels.operands(random.Random(3), rows, columns, depth, gap)
        if scale:
            arguments[1].fill_(scale)
            arguments[3].fill_(scale)
        assert torch.equal(product(*arguments), kernels.product(*arguments))
    return test


@pytest.mark.parametrize("test, spared", [
    (typical_test(32, 64, 128), {"scale after the loop", "scales of b transposed", "one scale a step",
                                 "scales of a by row", "strides", "ragged K", "ragged M"}),
    (typical_test(23, 150, 300, 16, scale=0.5), {"scale after the loop", "scales of b transposed", "one scale a step",
                                                 "scales of a by row"}),
    (typical_test(23, 150, 300), {"strides"}),
    (typical_test(32, 150, 256, 16), {"ragged K", "ragged M"}),
    (typical_test(23, 150, 300, 16), set()),
], ids=["one of everything", "equal scales", "contiguous", "multiples", "none of these"])
def test_easy_inputs_spare_mutants(test, spared):
    killed = len(kernels.PRODUCTS.wrong) - len(spared)
    verdict = kernels.PRODUCTS.judge(test, 0)
    assert verdict.sentence.startswith(f"kills {killed} of 7, spares the right one")
    for name, (function, _) in kernels.PRODUCTS.wrong.items():
        alone = kernels.PRODUCTS.__class__(**{**vars(kernels.PRODUCTS), "wrong": {name: (function, name)}})
        assert alone.judge(test, 0).solved == (name not in spared), name


def test_puzzles_say_the_same_four_things():
    for task in PUZZLES:
        for word in ("**shapes:**", "**grid:**", "**one program:**", "**definition:**"):
            assert word in task.statement
