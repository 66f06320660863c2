"""The experiment on attentions compares what it says: equal parameters, equal beginnings, one difference."""

import pytest
import torch
from attention_variants import METHODS, GroupedAttention, Heads, build, cached_values, weights_of_attention
from torch import Tensor

from minidsv3 import ModelConfig
from minidsv3.attention import Context
from minidsv3.kernels import rope

NANO = ModelConfig.preset("nano", num_nextn_predict_layers=0)
NO_TABLES = Context(torch.empty(0), torch.empty(0))


def test_attentions_have_equal_parameters_but_for_the_norms_gains():
    sizes = {name: weights_of_attention(name, NANO) for name in METHODS}
    gains = NANO.q_lora_rank + NANO.kv_lora_rank
    assert sizes["mha"] == sizes["gqa"] == sizes["mla"] - gains == 180_224
    assert [cached_values(name, NANO) for name in METHODS] == [352, 176, 80]


def test_runs_of_one_seed_begin_alike_outside_attention():
    models = [build(name, NANO, seed=3).state_dict() for name in METHODS]
    others = [{name: value for name, value in model.items() if "self_attn" not in name} for model in models]
    assert len(others[0]) > 50
    for other in others[1:]:
        assert other.keys() == others[0].keys()
        assert all(torch.equal(value, others[0][name]) for name, value in other.items())


def head_by_head(layer: GroupedAttention, x: Tensor) -> Tensor:
    """The definition, a head at a time: head h reads key and value number h // (heads / groups)."""
    m, length = layer.method, x.shape[1]
    q = layer.q_proj(x).view(1, length, m.heads, m.width)
    kv = layer.kv_proj(x).view(1, length, 2 * m.groups, m.width)
    cos, sin = layer.cos[:, :length], layer.sin[:, :length]
    q, k, v = rope(q, cos, sin), rope(kv[:, :, :m.groups], cos, sin), kv[:, :, m.groups:]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = []
    for h in range(m.heads):
        g = h // (m.heads // m.groups)
        logits = q[0, :, h] @ k[0, :, g].T / m.width ** 0.5
        out.append(logits.masked_fill(future, float("-inf")).softmax(-1) @ v[0, :, g])
    return layer.o_proj(torch.cat(out, -1))[None]


@pytest.mark.parametrize("groups", [1, 2, 6])
@torch.no_grad()
def test_grouped_attention_is_its_definition(groups):
    torch.manual_seed(0)
    layer = GroupedAttention(NANO, Heads("", heads=6, groups=groups, width=10)).double()
    x = torch.randn(1, 7, NANO.hidden_size, dtype=torch.float64)
    assert torch.allclose(layer(x, NO_TABLES), head_by_head(layer, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_definition_sees_heads_that_share_with_the_wrong_neighbours(monkeypatch):
    """Mutation: `repeat` in the place of `repeat_interleave` gives head 1 the key of group 1."""
    torch.manual_seed(0)
    layer = GroupedAttention(NANO, Heads("", heads=6, groups=2, width=10)).double()
    x = torch.randn(1, 7, NANO.hidden_size, dtype=torch.float64)
    want = head_by_head(layer, x)
    monkeypatch.setattr(Tensor, "repeat_interleave", lambda self, times, dim: self.repeat(1, 1, times, 1))
    assert (layer(x, NO_TABLES) - want).abs().max() > 1e-3
