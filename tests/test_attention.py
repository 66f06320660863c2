"""Latent attention is one function in several forms: full, absorbed, from a cache, in any pieces. In float64, to 1e-12.

Gradients are compared between the two forms of the full pass. A cached pass writes into its cache in place and is for
decoding; it has no backward pass.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minidsv3.attention
from minidsv3 import ModelConfig, Transformer
from minidsv3.attention import MLA, LatentCache, make_context
from minidsv3.config import YarnScaling
from tiny import tiny_config, tiny_model, tiny_tokens

EXACT = dict(rtol=0, atol=1e-12)
LENGTH = 24


def cache_for(model: Transformer, batch: int, length: int = LENGTH) -> LatentCache:
    return LatentCache(model.config, batch, length, model.lm_head.weight.dtype)


def always(form: str, monkeypatch) -> None:
    """Every attention takes the absorbed or the expanded form, whatever is cheaper."""
    monkeypatch.setattr(MLA, "absorbing_is_cheaper", lambda self, queries, keys: form == "absorbed")


# ---- two forms, one function ------------------------------------------------------------------------------------

@pytest.mark.parametrize("yarn", [None, YarnScaling(factor=4, original_max_position_embeddings=8)], ids=["off", "yarn"])
def test_absorbed_equals_expanded_in_values_and_gradients(yarn, monkeypatch):
    model = tiny_model(rope_scaling=yarn)
    attention, config = model.model.layers[1].self_attn, model.config
    context = make_context(config, (2, LENGTH), torch.float64, "cpu")
    outcomes = []
    for form in ("absorbed", "expanded"):
        always(form, monkeypatch)
        x = torch.randn(2, LENGTH, config.hidden_size, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = attention(x, context)
        leaves = [x, *attention.parameters()]
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert len(outcomes[0]) == 2 + 7
    for absorbed, expanded in zip(*outcomes):
        assert torch.allclose(absorbed, expanded, rtol=1e-10, atol=1e-11)


def test_forms_differ_if_the_value_weights_are_taken_for_the_key_weights():
    """The comparison sees a kv_b_proj split the wrong way round; its rows are [nope ; v] a head (trap 7)."""
    model = tiny_model(qk_nope_head_dim=16)
    attention = model.model.layers[1].self_attn
    context = make_context(model.config, (1, 8), torch.float64, "cpu")
    query, cached = (part(torch.randn(1, 8, 32).double(), context) for part in (attention.query, attention.compress))
    expanded = attention.expanded(query, cached, None)
    assert torch.allclose(attention.absorbed(query, cached, None), expanded, **EXACT)
    with torch.no_grad():
        heads = attention.kv_b_proj.weight.unflatten(0, (4, 2, 16))
        heads.copy_(heads.flip(1))
    assert (attention.absorbed(query, cached, None) - expanded).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 7, 2, 9], [LENGTH]], ids=["token by token", "uneven", "whole"])
def test_cached_equals_full(form, pieces, monkeypatch):
    always(form, monkeypatch)
    model, tokens = tiny_model(), tiny_tokens(2, LENGTH)
    cache = cache_for(model, 2)
    parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), **EXACT)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


@torch.no_grad()
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_any_pieces_in_whatever_form_is_cheaper(pieces):
    model, tokens = tiny_model(), tiny_tokens(1, sum(pieces))
    cache = cache_for(model, 1, sum(pieces))
    parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), **EXACT)


def test_absorbing_pays_for_one_query_and_never_for_a_prefill():
    """At full size: 0.8 % of the multiplications for one query on 4096 tokens, 3.7 times as many for 4096 queries."""
    with torch.device("meta"):
        attention = MLA(ModelConfig.preset("full"), 0)
    assert attention.absorbing_is_cheaper(1, 4096) and attention.absorbing_is_cheaper(2, 4096)
    assert not attention.absorbing_is_cheaper(4096, 4096) and not attention.absorbing_is_cheaper(1, 1)


# ---- the cache --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_rows_of_unequal_length_share_one_cache():
    """Row r continues behind its own tokens; what stands beyond a row's length is never seen."""
    model, tokens = tiny_model(), tiny_tokens(3, 16)
    cache, held = cache_for(model, 3), [3, 9, 1]
    model(tokens[:, :9], cache)
    cache.lengths = torch.tensor(held)
    continuation = torch.stack([tokens[row, n:n + 5] for row, n in enumerate(held)])
    together = model(continuation, cache)
    assert cache.lengths.tolist() == [8, 14, 6]
    for row, n in enumerate(held):
        alone = model(tokens[row:row + 1, :n + 5])[:, n:]
        assert torch.allclose(together[row:row + 1], alone, **EXACT)


@torch.no_grad()
def test_forgotten_tokens_leave_no_trace():
    model, tokens = tiny_model(), tiny_tokens(1, 12)
    cache = cache_for(model, 1)
    model(tokens[:, :6], cache)
    model(tiny_tokens(1, 9, seed=5), cache)          # a draft that is refused
    cache.lengths = torch.tensor([6])
    assert torch.allclose(model(tokens[:, 6:], cache), model(tokens)[:, 6:], **EXACT)


@torch.no_grad()
def test_cache_holds_the_normed_latent_and_the_rotated_key():
    """Trap 6: the norm is on the latent alone, the rotation on the key alone, and both are done before caching."""
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    cache = cache_for(model, 2)
    model(tokens, cache)
    latent = cache.latent[0, :, :5] / model.model.layers[0].self_attn.kv_a_layernorm.weight
    assert torch.allclose(latent.square().mean(-1), torch.ones(2, 5).double(), rtol=5e-3)   # epsilon beside rms 0.02
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    key = (x @ model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.T)[..., model.config.kv_lora_rank:]
    cached = cache.rope_key[0, :, :5]
    assert torch.allclose(cached[:, 0], key[:, 0], **EXACT)                  # position 0 does not turn
    assert not torch.allclose(cached[:, 1:], key[:, 1:], atol=1e-3)
    pairs = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (cached, key))   # adjacent pairs turn: their length stays
    assert torch.allclose(*pairs, **EXACT)


def test_cache_of_the_full_model_is_70272_bytes_a_token():
    cache = LatentCache(ModelConfig.preset("full", num_nextn_predict_layers=0), 1, 1, torch.bfloat16)
    assert cache.values.numel() == 61 * 576
    assert cache.values.numel() * cache.values.element_size() == 70272


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    model = tiny_model()
    cache = cache_for(model, 2, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
        model(tiny_tokens(2, 9), cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows and the tokens 1"):
        model(tiny_tokens(1, 3), cache)
    model(tiny_tokens(2, 6), cache)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        model(tiny_tokens(2, 3), cache)


# ---- attention looks back, not ahead ----------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_no_token_sees_a_later_one(form, monkeypatch):
    always(form, monkeypatch)
    model, tokens = tiny_model(), tiny_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], **EXACT)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4      # and every later one sees it


@pytest.mark.parametrize("sizes", [dict(v_head_dim=24), dict(v_head_dim=8), dict(v_head_dim=20)], ids=str)
def test_values_may_be_wider_or_narrower_than_keys(sizes, monkeypatch):
    """Values are padded to the keys' 20 channels for the CPU's flash attention; padding must not show."""
    model, tokens = tiny_model(**sizes), tiny_tokens(1, 10)
    padded = model(tokens)
    monkeypatch.setattr(minidsv3.attention, "pad_for_flash", lambda value, key: value)
    assert torch.allclose(padded, model(tokens), **EXACT)
    assert tiny_config(**sizes).qk_head_dim == 20
