"""What the registry's comparison does not say of decoding: its equations, shares of the keys and their combination,
pages, what no query may see, its refusals, and that the comparison would see the usual faults."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from compare import assert_alike, inputs_on
from minidsv3.kernels import mla_decode, mla_decode_reference, use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.cases import mla_decode as cases
from minidsv3.kernels.registry import OPERATIONS
from mutated import mutated
from test_operations import DEVICE

FILE = importlib.import_module("minidsv3.kernels.mla_decode")
OPERATION = OPERATIONS["mla_decode"]
pytestmark = [] if INTERPRETED else [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or Triton's interpreter")]


def kernel(inputs: tuple, file=FILE, splits: int | None = None) -> torch.Tensor:
    with use_kernels("triton"):
        if splits is None:
            return file.mla_decode(*inputs)
        return file._launch(*inputs, file._tiles(inputs[0].dtype, inputs[0].shape[1:3].numel()), splits)


def test_definition_is_torch_s_attention():
    """Of one sequence with two queries: the earlier sees all tokens but the last."""
    query, cache, lengths, rank, scale, _ = OPERATION.cases["two queries"](torch.float64)
    key = cache[1, :97][None]
    seen = torch.ones(2, 97, dtype=torch.bool).tril(95)
    theirs = F.scaled_dot_product_attention(query[1].transpose(0, 1), key, key[..., :rank], attn_mask=seen, scale=scale)
    ours = mla_decode_reference(query, cache, lengths, rank, scale)[1]
    assert_alike([ours], [theirs.transpose(0, 1)], 1e-12)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_by_hand(kernels: str):
    """Logits ln 3 * (1, 2) give weights 1 to 3; the earlier of two queries sees the first token alone, and of a
    sequence of one token nothing. The third token's huge logit is behind the end."""
    query, cache = torch.zeros(2, 2, 1, 24), torch.zeros(2, 3, 24)
    query[..., 0], query[..., 16] = 1.0, 1.0                    # one channel of the latent, one rotary
    cache[..., 0] = torch.tensor([3.0, 3.0, 9e9]).log()
    cache[..., 16] = torch.tensor([1.0, 3.0, 9e9]).log()
    cache[..., 1] = torch.tensor([10.0, 2.0, 7.0])
    with torch.device(DEVICE), use_kernels(kernels):
        out = mla_decode(query.to(DEVICE), cache.to(DEVICE), torch.tensor([2, 1]), 16, 1.0).cpu()
    assert torch.allclose(out[..., 0, 1], torch.tensor([[10.0, 0.25 * 10 + 0.75 * 2], [0.0, 10.0]]))
    assert not out[..., 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["1, 70, 200", "two queries", "no tokens", "pages"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_shares_gives_the_same(case: str, dtype: torch.dtype, splits: int):
    """More shares than a sequence has blocks, too: those write nothing, and nothing of them is read."""
    inputs = inputs_on(OPERATION, case, dtype, DEVICE)
    assert_alike([kernel(inputs, splits=splits)], [mla_decode_reference(*inputs)], OPERATION.tolerance[dtype])


def test_shares_fill_the_processors():
    """One wave where it suffices; two full waves rather than three; never shares without a block."""
    assert FILE._splits(programs=132, blocks=64, processors=132) == 1
    assert FILE._splits(programs=256, blocks=64, processors=132) == 1
    assert FILE._splits(programs=2, blocks=1, processors=132) == 1
    assert FILE._splits(programs=32, blocks=64, processors=132) == 4
    assert FILE._splits(programs=88, blocks=256, processors=132) == 3
    assert FILE._splits(programs=1, blocks=5, processors=132) == 5


@pytest.mark.parametrize("page", [64, 128])
def test_pages_give_the_bits_of_one_long_page(page: int):
    query, cache, lengths, rank, scale, pages = inputs_on(OPERATION, "long pages, two queries", torch.float32, DEVICE)
    whole = cache[pages].flatten(1, 2)
    cut = whole.view(-1, page, whole.shape[-1])
    order = torch.randperm(len(cut), device=DEVICE)
    pages = torch.empty_like(order).scatter_(0, order, torch.arange(len(cut), device=DEVICE)).view(len(query), -1)
    assert torch.equal(kernel((query, cut[order], lengths, rank, scale, pages)),
                       kernel((query, whole, lengths, rank, scale, None)))


def test_a_sequence_is_the_same_alone_and_among_others():
    inputs = inputs_on(OPERATION, "1, 70, 200", torch.bfloat16, DEVICE)
    query, cache, lengths, *rest = inputs
    alone = kernel((query[1:2], cache[1:2], lengths[1:2], *rest), splits=2)
    assert torch.equal(kernel(inputs, splits=2)[1:2], alone)


def test_what_lies_behind_the_end_cannot_be_seen():
    query, cache, lengths, *rest = inputs_on(OPERATION, "two queries", torch.bfloat16, DEVICE)
    changed, later = cache.clone(), query.clone()
    for b, length in enumerate(lengths.tolist()):
        changed[b, length:] = 1e4
    before = kernel((query, cache, lengths, *rest))
    assert torch.equal(kernel((query, changed, lengths, *rest)), before)
    changed[0, 63] = 3.0                                          # the last token: only the later query sees it
    after = kernel((query, changed, lengths, *rest))
    assert torch.equal(after[0, 0], before[0, 0]) and not torch.equal(after[0, 1], before[0, 1])
    later[:, 1] = 0.0                                             # and queries do not see each other
    assert torch.equal(kernel((later, cache, lengths, *rest))[:, 0], before[:, 0])


def test_a_longer_cache_behind_the_tokens_is_not_copied():
    """A view of the first tokens of each row, as the model takes it: the cache would be copied at every step."""
    cache = torch.randn(3, 160, 576)[:, :128]
    rows, pitch = FILE._as_rows(cache)
    assert rows.data_ptr() == cache.data_ptr() and pitch == 160 and rows.shape == (2 * 160 + 128, 576)
    assert torch.equal(rows[160:160 + 128], cache[1])
    expanded = cache[:1, :1].expand(2, 5, -1)
    rows, pitch = FILE._as_rows(expanded)
    assert pitch == 5 and torch.equal(rows, expanded.flatten(0, 1))


@pytest.mark.parametrize("case, right, wrong", [
    ("two queries", "row // heads, end)", "row // heads + 1, end)"),              # a query sees its successor
    ("two queries", "row // heads, end)", "row // queries, end)"),                # heads and queries exchanged
    ("1, 70, 200", "total *= tl.expand_dims(shrink, AXIS)", "total *= 1.0"),         # a higher maximum forgets nothing
    ("1, 70, 200", "weight * shrink + tl.sum(p, AXIS)", "weight + tl.sum(p, AXIS)"),
    ("1, 70, 200", "total = total * shrink + grow", "total = total + grow"),      # in the combination
    ("1, 70, 200", "highest + tl.log2(weight)", "tl.log2(weight)"),
    ("1, 70, 200", "CR.load([at, RANK])", "CR.load([at, 0])"),
    ("1, 70, 200", "LOG2_E = 1.44", "LOG2_E = 1.4"),
    ("1, 70, 200", "split * size, tl.minimum", "split * size + 1, tl.minimum"),
    ("pages", "n // page)", "0)"),
    ("strided", "(row, 1)), page // row", "(row, 1)), x.shape[1]"),
])
def test_the_comparison_sees_a_fault(tmp_path, case: str, right: str, wrong: str):
    inputs = inputs_on(OPERATION, case, torch.float32, DEVICE)
    theirs = [mla_decode_reference(*inputs)]
    assert_alike([kernel(inputs, splits=3)], theirs, OPERATION.tolerance[torch.float32])
    with pytest.raises(AssertionError):
        assert_alike([kernel(inputs, mutated("mla_decode", right, wrong, tmp_path), 3)], theirs,
                     OPERATION.tolerance[torch.float32])


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has no specialised warps")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("build", [cases._inputs([300, 64, 1, 0, 65], 2, 40, 300, 512, 64),
                                   cases._paged([300, 64, 1, 65], 1, 128, 64, 512, 64)], ids=["contiguous", "pages"])
def test_specialised_warps(monkeypatch, build, splits: int):
    """At the widths of the full model; and the comparison sees logits that are too small."""
    with torch.device(DEVICE):
        inputs = build(torch.bfloat16)
    theirs = [mla_decode_reference(*inputs)]
    assert FILE.specialises(inputs[0], 512, 80)
    assert_alike([kernel(inputs, splits=splits)], theirs, OPERATION.tolerance[torch.bfloat16])
    monkeypatch.setattr(FILE, "LOG2_E", 1.0)
    with pytest.raises(AssertionError):
        assert_alike([kernel(inputs, splits=splits)], theirs, OPERATION.tolerance[torch.bfloat16])


@pytest.mark.parametrize("position, change, sentence", [
    (0, lambda q: q[0], r"query \[1, 4, 24\].*they must be \[B, T, H, rank \+ dr\]"),
    (0, lambda q: q[..., :20], r"query \[3, 1, 4, 20\], cache \[6, 64, 24\]"),
    (2, lambda n: n[:2], r"lengths \[2\] and rank 16"),
    (3, lambda r: 24, "rank 24; they must be .* less than"),
    (1, lambda c: c.bfloat16(), "query torch.float32 and cache torch.bfloat16; both must have one dtype"),
    (2, lambda n: n.float(), "lengths torch.float32 and pages torch.int32; they must be int32 or int64"),
    (5, lambda p: p[:2], r"pages \[2, 3\] of 64 tokens for 3 sequences"),
    (1, lambda c: c[:, :40], r"of 40 tokens for 3 sequences; .*multiple of 64 tokens"),
    (4, lambda s: -s, "scale -0.14; it must be positive"),
])
def test_refusals(position: int, change, sentence: str):
    inputs = [*OPERATION.cases["pages"](torch.float32)]
    inputs[position] = change(inputs[position])
    with pytest.raises(ValueError, match=sentence):
        mla_decode(*inputs)


def test_a_contiguous_cache_has_a_row_for_each_sequence():
    query, cache, *rest = OPERATION.cases["1, 70, 200"](torch.float32)
    with pytest.raises(ValueError, match=r"cache \[2, 200, 24\]"):
        mla_decode(query, cache[:2], *rest)
