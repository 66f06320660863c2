"""What the registry's comparison does not say of expanded attention: its equations, the walls between sequences, blocks
of other sizes, its refusals, and that the comparison would see the usual faults."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from compare import assert_alike, inputs_on, values_and_gradients
from minidsv3.kernels import mla_attention, mla_attention_reference, use_kernels
from minidsv3.kernels.backend import INTERPRETED, tl, triton
from minidsv3.kernels.cases import mla_attention as cases
from minidsv3.kernels.registry import OPERATIONS
from test_operations import DEVICE

FILE = importlib.import_module("minidsv3.kernels.mla_attention")
OPERATION = OPERATIONS["mla_attention"]
SMALL = {"QUERIES": 16, "KEYS": 16, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1}
pytestmark = [] if INTERPRETED else [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or Triton's interpreter")]
compiled = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has no Gluon")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps the functions it was compiled with")


def kernel(inputs: tuple) -> list[torch.Tensor]:
    with use_kernels("triton"):
        return values_and_gradients(OPERATION, mla_attention, inputs)


def definition(inputs: tuple, **options) -> torch.Tensor:
    return mla_attention_reference(*inputs, **{"scale": 0.14, **options})


def test_definition_is_torch_s_attention_on_one_sequence():
    query, key_value, rope_key, offsets, longest = inputs = OPERATION.cases["130"](torch.float64)
    key = torch.cat((key_value[..., :32], rope_key[:, None].expand(-1, query.shape[1], -1)), -1)
    q, k, v = (x.transpose(0, 1) for x in (query, key, key_value[..., 32:]))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.14).transpose(0, 1)
    assert_alike([definition(inputs)], [theirs], 1e-12)


def test_definition_has_the_gradient_of_its_values():
    build = OPERATION.cases["empty in the middle"]
    query, key_value, rope_key, offsets, longest = build(torch.float64)
    few = [x.detach()[:9, ...].requires_grad_() for x in (query, key_value, rope_key)]
    offsets = torch.tensor([0, 6, 6, 9])
    assert torch.autograd.gradcheck(lambda *x: mla_attention_reference(*x, offsets, 6, 0.14), few, fast_mode=True)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_by_hand(kernels: str):
    """Two tokens whose second sees both: logits ln 3 * (1, 2) * scale 1 give weights 1 to 3. A third begins anew."""
    query, key_value, rope_key = torch.zeros(3, 1, 32), torch.zeros(3, 1, 32), torch.zeros(3, 16)
    query[:, 0, 0], query[:, 0, 16] = 1.0, 1.0                 # one channel without position, one rotary
    key_value[:, 0, 0] = torch.tensor([3.0, 3.0, 9.0]).log()
    rope_key[:, 0] = torch.tensor([1.0, 3.0, 9.0]).log()
    key_value[:, 0, 16] = torch.tensor([10.0, 2.0, 7.0])
    with torch.device(DEVICE), use_kernels(kernels):
        inputs = (x.to(DEVICE) for x in (query, key_value, rope_key))
        out = mla_attention(*inputs, torch.tensor([0, 2, 3]), 2, 1.0)
    assert torch.allclose(out[:, 0, 0].cpu(), torch.tensor([10.0, 0.25 * 10 + 0.75 * 2, 7.0]))
    assert not out[:, 0, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries, keys", [(16, 16), (32, 16), (16, 32)])
def test_blocks_of_other_sizes(monkeypatch, dtype: torch.dtype, queries: int, keys: int):
    """Many blocks a sequence, and sequences that end inside of one: the forward and dq kernels need blocks of queries
    that hold whole blocks of keys, the dk kernel the opposite."""
    inputs = inputs_on(OPERATION, "5, 70, 3", dtype, DEVICE)
    most = {"QUERIES": max(queries, keys), "KEYS": min(queries, keys)}
    least = {"QUERIES": min(queries, keys), "KEYS": max(queries, keys)}
    monkeypatch.setattr(FILE, "_tiles", lambda name, *_: SMALL | (least if name == "keys" else most))
    with use_kernels("torch"):
        theirs = values_and_gradients(OPERATION, mla_attention, inputs)
    assert_alike(kernel(inputs), theirs, OPERATION.tolerance[dtype])


@compiled
@pytest.mark.parametrize("widths", [(128, 64, 128), (64, 64, 64), (32, 16, 32), (16, 16, 16), (128, 16, 64)])
@pytest.mark.parametrize("specialised", [True, False])
def test_full_blocks_and_long_sequences(monkeypatch, widths: tuple[int, int, int], specialised: bool):
    """Both kinds of kernels, where rings turn round many times and every block is cut somewhere."""
    if not specialised:
        monkeypatch.setattr(FILE, "specialises", lambda *_: False)
    with torch.device(DEVICE):
        inputs = cases._inputs([1000, 0, 37, 700, 1], 3, *widths)(torch.bfloat16)
    theirs = values_and_gradients(OPERATION, mla_attention_reference, inputs)
    assert_alike(kernel(inputs), theirs, OPERATION.tolerance[torch.bfloat16])


def test_a_sequence_is_the_same_alone_and_among_others():
    query, key_value, rope_key, offsets, _ = inputs_on(OPERATION, "5, 70, 3", torch.float32, DEVICE)
    middle = [x.detach()[5:75].clone().requires_grad_() for x in (query, key_value, rope_key)]
    with torch.device(DEVICE), use_kernels("triton"):
        together = mla_attention(query, key_value, rope_key, offsets, 70, 0.14)
        alone = mla_attention(*middle, torch.tensor([0, 70]), 70, 0.14)
    slope = torch.randn_like(alone)
    gradients = torch.autograd.grad(together[5:75], (query, key_value, rope_key), slope)
    assert torch.equal(together[5:75], alone)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, middle, slope), strict=True):
        assert torch.equal(ours[5:75], theirs)
        assert not ours[:5].any() and not ours[75:].any()


def test_a_single_token_attends_to_itself():
    """Its gradient through the softmax is 0 by definition; what the kernel leaves is rounding noise."""
    query, key_value, rope_key = (torch.randn(*shape, device=DEVICE, requires_grad=True)
                                  for shape in ((1, 2, 32), (1, 2, 48), (1, 16)))
    with torch.device(DEVICE), use_kernels("triton"):
        out = mla_attention(query, key_value, rope_key, torch.tensor([0, 1]), 1, 0.14)
    slope = torch.randn_like(out)
    d_query, d_key_value, d_rope_key = torch.autograd.grad(out, (query, key_value, rope_key), slope)
    assert torch.allclose(out, key_value[..., 16:]) and torch.allclose(d_key_value[..., 16:], slope)
    assert max(float(x.abs().max()) for x in (d_query, d_key_value[..., :16], d_rope_key)) < 1e-5


def test_the_future_cannot_be_seen():
    inputs = inputs_on(OPERATION, "130", torch.float32, DEVICE)
    changed = [x.detach().clone() for x in inputs[:3]]
    for x in changed:
        x[100:] = 3.0
    with use_kernels("triton"):
        before, after = (mla_attention(*x, inputs[3], 130, 0.14) for x in (inputs[:3], changed))
    assert torch.equal(before[:100], after[:100])
    assert not torch.equal(before[100:], after[100:])


@triton.jit
def _without_rope(nope, rope, other_nope, other_rope, PRECISION: tl.constexpr):
    return tl.dot(nope, other_nope.T, input_precision=PRECISION)


@triton.jit
def _one_token_late(Offsets):
    first = tl.load(Offsets + tl.program_id(2)).to(tl.int32)
    return first, tl.load(Offsets + tl.program_id(2) + 1).to(tl.int32) - first - 1


@interpreted
@pytest.mark.parametrize("name, fault", [("_product", _without_rope), ("_sequence", _one_token_late), ("LOG2_E", 1.0)])
def test_the_comparison_sees_a_fault(monkeypatch, name: str, fault):
    inputs = OPERATION.cases["5, 70, 3"](torch.bfloat16)
    theirs = values_and_gradients(OPERATION, mla_attention_reference, inputs)
    monkeypatch.setattr(FILE, name, fault)
    with pytest.raises(AssertionError):
        assert_alike(kernel(inputs), theirs, OPERATION.tolerance[torch.bfloat16])


@pytest.mark.parametrize("position, change, sentence", [
    (0, lambda q: q[:-1], r"query \[129, 1, 48\].*they must be \[N, H, dk \+ dr\]"),
    (1, lambda kv: kv[..., :32], r"key_value \[130, 1, 32\].*\[N, H, dk \+ dv\]"),
    (2, lambda r: r.bfloat16(), "rope_key torch.bfloat16; the three must have one dtype"),
    (3, lambda o: o.float(), r"offsets \[2\] torch.float32; they must be int32 or int64"),
    (5, lambda s: -s, "got scale -0.14; it must be positive"),
])
def test_refusals(position: int, change, sentence: str):
    inputs = [*OPERATION.cases["130"](torch.float32), 0.14]
    inputs[position] = change(inputs[position])
    with pytest.raises(ValueError, match=sentence):
        mla_attention(*inputs)
