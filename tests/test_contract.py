"""Products that a compiler may fuse equal torch's, and are given to it only for one token."""

import pytest
import torch

from minidsv3.kernels import contract, linear, route

EQUATIONS = {
    "bthd,hdr->bthr": (dict(h=3, d=4, r=5), "absorbing the keys' up-projection"),
    "bthc,bsc->bths": (dict(h=3, c=6, s=7), "scores on the cache"),
    "bths,bsr->bthr": (dict(h=3, s=7, r=5), "reading the cache"),
    "bthr,hvr->bthv": (dict(h=3, r=5, v=2), "the values' up-projection"),
    "nd,nkwd->nkw": (dict(d=4, k=2, w=3), "chosen experts, up"),
    "nkw,nkdw->nkd": (dict(k=2, w=3, d=4), "chosen experts, down"),
}


def compiled(function):
    """Traced as a compiler does it, run as torch does it: no C++ needed."""
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)


def operands(equation, tokens):
    sizes = EQUATIONS[equation][0] | dict(b=1, t=tokens, n=tokens)
    left, right = equation.split("->")[0].split(",")
    return [torch.randn([sizes[letter] for letter in letters], dtype=torch.float64) for letters in (left, right)]


def operations(function, *arguments) -> set[str]:
    """Names of the operations that a compiler is given."""
    seen = set()

    def backend(graph, _):
        seen.update(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
        return graph.forward
    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    return seen


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_contract_is_einsum(equation, tokens):
    x, weight = operands(equation, tokens)
    want = torch.einsum(equation, x, weight)
    for function in (contract, compiled(lambda *operands: contract(equation, *operands))):
        got = function(equation, x, weight) if function is contract else function(x, weight)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4), (2, 4), (1, 3, 4)])
def test_linear_is_a_product_with_the_transpose(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for function in (linear, compiled(linear)):
        torch.testing.assert_close(function(x, weight), x @ weight.T, rtol=0, atol=1e-12)


def test_only_one_compiled_token_is_multiplied_by_sums():
    weight = torch.randn(5, 4)
    assert "sum" in operations(linear, torch.randn(1, 4), weight)
    assert "sum" not in operations(linear, torch.randn(2, 4), weight)
    absorb = "bthd,hdr->bthr"
    assert "sum" in operations(lambda x, w: contract(absorb, x, w), *operands(absorb, 1))
    assert "sum" not in operations(lambda x, w: contract(absorb, x, w), *operands(absorb, 2))


@pytest.mark.parametrize("seed", range(20))
def test_one_compiled_token_is_routed_like_any_other(seed):
    """The compiled choice compares where torch sorts: the same experts in the same order, ties included."""
    torch.manual_seed(seed)
    logits, bias = torch.randint(-2, 3, (1, 16)).double(), torch.randint(-1, 2, (16,)).double() / 4
    options = dict(n_group=4, topk_group=2, top_k=4, scaling_factor=2.5)
    want, got = route(logits, bias, **options), compiled(lambda a, b: route(a, b, **options))(logits, bias)
    assert torch.equal(got.experts, want.experts) and torch.equal(got.weights, want.weights)


def test_one_compiled_token_is_not_sorted():
    options = dict(n_group=4, topk_group=2, top_k=4)
    for rows, sorts in ((1, False), (2, True)):
        seen = operations(lambda a, b: route(a, b, **options), torch.randn(rows, 16), torch.zeros(16))
        assert ("sort" in seen) is sorts
