"""Weight gradients that wait: the same sums as one backward pass, each computed once, and only when asked."""

import weakref

import pytest
import torch

from minidsv3 import weight_gradients
from minidsv3.weight_gradients import WeightGradStore, defer_weight_gradients, grouped_mm
from tiny import tiny_config, tiny_model

WAITING = ("_proj.weight", "_proj", "_proj_with_mqa.weight")   # the matrices of attention, FFNs, experts and eh_proj


def text(seed: int) -> torch.Tensor:
    return torch.randint(0, tiny_config().vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))


def gradients(dtype: torch.dtype, deferred: bool, passes: int = 2) -> dict[str, torch.Tensor]:
    """The model's gradients after some backward passes, with what had to wait added in the end."""
    model = tiny_model(dtype=dtype)
    store = defer_weight_gradients(model) if deferred else WeightGradStore()
    later = []
    for seed in range(passes):
        model.loss(text(seed), mtp_weight=0.3, balance_weight=1e-3).total.backward()
        later.append(store.take())
    if deferred:
        assert all(p.grad is None for name, p in model.named_parameters() if name.endswith(WAITING))
    for run in later:
        run()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_what_waited_is_what_one_pass_gives(dtype, tolerance):
    want, got = gradients(dtype, deferred=False), gradients(dtype, deferred=True)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance * want[name].abs().max().item())


def test_gradients_hold_no_graph_and_no_activation():
    model = tiny_model()
    store = defer_weight_gradients(model)
    slope = weakref.ref(backward_from_hidden(model))
    store.take()()
    assert slope() is None
    assert not any(parameter.grad.requires_grad for parameter in model.parameters() if parameter.grad is not None)


def backward_from_hidden(model) -> torch.Tensor:
    """A backward pass from a slope of the hidden state; returns that slope, which the last layer's dW needs."""
    hidden = model.hidden(text(0))
    slope = torch.ones_like(hidden)
    hidden.backward(slope)
    return slope


def test_every_matrix_waits():
    model = tiny_model(dtype=torch.float32)
    store = defer_weight_gradients(model)
    model.loss(text(0), mtp_weight=0.3).total.backward()
    assert len(store) == sum(name.endswith(WAITING) for name, _ in model.named_parameters())


def test_bf16_autocast_gives_fp32_gradients():
    model = tiny_model(dtype=torch.float32)
    grads = []
    for store in (None, defer_weight_gradients(model)):
        for part in model.modules():
            if isinstance(part, weight_gradients.Deferrable):
                part.store = store
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(text(0)).total
        loss.backward()
        if store is not None:
            store.take()()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, want in grads[0].items():
        assert grads[1][name].dtype is torch.float32
        torch.testing.assert_close(grads[1][name], want, rtol=0, atol=2e-2 * want.abs().max().item())


def test_a_gradient_is_added_once():
    """A runner that is called again, as a schedule with a doubled W would, adds nothing."""
    store, weight = WeightGradStore(), torch.zeros(2)
    store.put(weight, lambda into: torch.ones(2) if into is None else into.add_(1))
    run = store.take()
    run(), run()
    assert weight.grad.tolist() == [1, 1]
    assert len(store) == 0


def test_products_of_groups_without_torchs_kernel():
    """float64 takes one product after the other, empty groups and rows behind the last one included."""
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, weight, slope = torch.randn(10, 12), torch.randn(3, 12, 4), torch.randn(10, 4)
    for a, b in ((rows, weight), (slope.mT, rows)):
        want = grouped_mm(a, b, ends)
        got = grouped_mm(a.double(), b.double(), ends).float()
        torch.testing.assert_close(got[:8], want[:8])
    assert not grouped_mm(rows.double(), weight.double(), ends)[8:].any()


@pytest.mark.parametrize("fault", [lambda gradient, into, weight: gradient,   # forgets earlier passes
                                   lambda gradient, into, weight: (into if into is not None else 0) + 2 * gradient])
def test_the_comparison_sees_a_fault(monkeypatch, fault):
    monkeypatch.setattr(weight_gradients, "added", fault)
    with pytest.raises(AssertionError):
        test_what_waited_is_what_one_pass_gives(torch.float64, 1e-13)
