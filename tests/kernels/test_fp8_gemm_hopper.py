"""The specialised FP8 product, with every tile that it may choose: on a GPU. What it chooses: anywhere."""

from itertools import pairwise

import pytest
import torch

from mutated import mutated
from minidsv3.kernels import fp8_gemm_hopper as hopper
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.fp8_gemm import dequantize_tiles
from minidsv3.kernels.quantize import dequantize_blocks_reference

every_tile = pytest.mark.parametrize("tile", hopper.TILES, ids=str)
small_tiles = pytest.mark.parametrize("tile", hopper.possible(tiles=True, item=4), ids=str)
ENDS = [256, 256, 640, 1152]      # the second expert has no rows, the third 3 x 128
ROOM = 1280


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")(test))


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    """Lines of any width that start at multiples of 16 bytes."""
    *outer, width = shape
    return (0.5 + torch.rand(*outer, -(-width // 4) * 4, device="cuda"))[..., :width]


def assert_near(ours: torch.Tensor, definition: torch.Tensor) -> None:
    """BF16 rounds by 2^-9 at most; the tensor cores lose less."""
    error = (ours.float() - definition).norm() / definition.norm()
    assert error < (2e-3 if ours.dtype == torch.bfloat16 else 5e-4), error


@needs_gpu
@every_tile
def test_dense_product_of_uneven_sizes(tile):
    M, N, K = 331, 328, 592
    a, a_scales, b, b_scales = codes(M, K), scales(5, M), codes(N, K), scales(3, 5)
    out = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    hopper.gemm(a, a_scales, b, b_scales.contiguous(), out, tile=tile)
    assert_near(out, dequantize_tiles(a, a_scales) @ dequantize_blocks_reference(b, b_scales).T)


@needs_gpu
@small_tiles
def test_tiles_of_both_and_adding_to_what_is_there(tile):
    M, N, K = 331, 328, 592
    a, a_scales, b, b_scales = codes(M, K), scales(5, M), codes(N, K), scales(5, N)
    out, before = torch.empty(M, N, device="cuda"), torch.randn(M, N, device="cuda")
    hopper.gemm(a, a_scales, b, b_scales, out, tile=tile)
    assert_near(out, dequantize_tiles(a, a_scales) @ dequantize_tiles(b, b_scales).T)
    added = before.clone()
    hopper.gemm(a, a_scales, b, b_scales, added, accumulate=True, tile=tile)
    assert torch.equal(added, out + before)


def product_of_experts(module, tile: tuple[int, int, int], N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module computes, in rows that were 7 before, and the definition."""
    K = 384
    a, a_scales, b, b_scales = codes(ROOM, K), scales(3, ROOM), codes(4, N, K), scales(4, -(-N // 128), 3).contiguous()
    out = torch.full((ROOM, N), 7, dtype=torch.bfloat16, device="cuda")
    definition, rows = out.float(), dequantize_tiles(a, a_scales)
    module.grouped_gemm(a, a_scales, b, b_scales, torch.tensor(ENDS, dtype=torch.int32, device="cuda"), out, tile=tile)
    for expert, (start, end) in enumerate(pairwise([0, *ENDS])):
        definition[start:end] = rows[start:end] @ dequantize_blocks_reference(b[expert], b_scales[expert]).T
    return out, definition


@needs_gpu
@every_tile
@pytest.mark.parametrize("N", (328, 4096))
def test_rows_of_experts(tile, N):
    out, definition = product_of_experts(hopper, tile, N)
    assert_near(out, definition)
    assert (out[ENDS[-1]:] == 7).all()


@needs_gpu
@pytest.mark.parametrize("right, wrong", (
    ("n += expert * N", "n += 0"), ("(a_scale * b_scale)[:, None]", "a_scale[:, None]"),
    ("if m + 64 * wave < M:", "if m >= 0:"), ("if wave == 0 else sum1", "if wave == 1 else sum1"),
))
def test_the_comparison_sees(right, wrong, tmp_path):
    out, definition = product_of_experts(mutated("fp8_gemm_hopper", right, wrong, tmp_path), (128, 2, 2), 328)
    with pytest.raises(AssertionError):
        assert_near(out, definition)


@needs_gpu
@small_tiles
@pytest.mark.parametrize("N", (328, 4096))
def test_weight_gradients_of_experts(tile, N):
    M = 576
    a, a_scales, b, b_scales = codes(M, ROOM), scales(10, M), codes(N, ROOM), scales(10, N)
    ends = torch.tensor(ENDS, dtype=torch.int32, device="cuda")
    out, before = torch.full((4, M, N), 7., device="cuda"), torch.randn(4, M, N, device="cuda")
    hopper.grouped_wgrad(a, a_scales, b, b_scales, ends, out, accumulate=False, tile=tile)
    left, right = dequantize_tiles(a, a_scales), dequantize_tiles(b, b_scales)
    for expert, (start, end) in enumerate(pairwise([0, *ENDS])):
        if start < end:
            assert_near(out[expert], left[:, start:end] @ right[:, start:end].T)
        else:
            assert not out[expert].any()
    added = before.clone()
    hopper.grouped_wgrad(a, a_scales, b, b_scales, ends, added, tile=tile)
    assert torch.equal(added, out + before)


@needs_gpu
@every_tile
def test_many_turns_give_the_same_bits_in_every_run(tile):
    M, N, K = 4096, 4096, 1024
    inputs = codes(M, K), scales(8, M), codes(N, K), scales(32, 8)
    first, again = torch.empty(2, M, N, dtype=torch.bfloat16, device="cuda")
    hopper.gemm(*inputs, first, tile=tile)
    for _ in range(10):
        hopper.gemm(*inputs, again.fill_(torch.nan), tile=tile)
        assert torch.equal(again, first)


@needs_gpu
def test_waits_for_the_kernel_before_and_is_waited_for():
    """It begins early, and yet reads what is written right before it; what it writes is read right after it."""
    M, N, K = 512, 2048, 1024
    a, a_scales, b, b_scales = codes(M, K), scales(8, M), codes(N, K), scales(16, 8).contiguous()
    inputs, out = torch.randn(8, M, K, device="cuda"), torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    results = torch.empty(8, M, N, dtype=torch.bfloat16, device="cuda")

    def chain():
        for x, result in zip(inputs, results):
            a.copy_(x)
            hopper.gemm(a, a_scales, b, b_scales, out)
            torch.neg(out, out=result)

    chain()
    weight = dequantize_blocks_reference(b, b_scales)
    for x, result in zip(inputs, results):
        assert_near(-result, dequantize_tiles(x.to(a.dtype), a_scales) @ weight.T)
    eager, graph = results.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    results.zero_()
    graph.replay()
    assert torch.equal(results, eager)


@pytest.mark.parametrize("item, tiles", ((2, False), (2, True), (4, False), (4, True)))
def test_at_least_three_stages_fit_and_start_where_tma_can_write(item, tiles):
    for tile in hopper.possible(tiles, item):
        plan = hopper.Plan(*tile, item, tiles, "nothing", False)
        assert 3 <= plan.stages <= 16
        assert plan.stages * plan.bytes + plan.rows * plan.columns * item <= hopper.SHARED
        assert not tiles or 4 * plan.columns % 128 == 0


@pytest.mark.parametrize("M, N, K, experts, rows", (
    (64, 4096, 7168, 1, 64), (128, 7168, 16384, 1, 128), (4096, 2112, 7168, 1, 192), (4096, 7168, 16384, 1, 256),
    (8192, 4096, 7168, 4, 192), (1024, 7168, 2048, 32, 256)))
def test_rows_of_the_chosen_tile(M, N, K, experts, rows):
    """What was fastest on an H100."""
    _, consumers, waves = hopper._fastest(M, N, K, experts, False, 2, 132)
    assert 64 * consumers * waves == rows


@pytest.mark.parametrize("tokens, rows", ((128, 128), (512, 128), (8192, 192)))
def test_experts_with_unequal_numbers_of_tokens_take_smaller_tiles(tokens, rows):
    """128 tokens on average are mostly one or two tiles of 128 rows. One of 256 would multiply its empty half too."""
    _, consumers, waves = hopper._fastest(tokens, 4096, 7168, 256, False, 2, 132, uneven=True)
    assert 64 * consumers * waves == rows


def test_small_tiles_where_asked_for():
    assert hopper._fastest(4096, 7168, 16384, 1, True, 4, 132) == (128, 2, 1)
