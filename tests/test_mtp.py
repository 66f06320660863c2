"""Multi-token prediction against its equations, written out one position at a time from stored weights."""

import pytest
import torch
from torch import Tensor

import minidsv3.model
import minidsv3.mtp
from minidsv3 import Transformer
from minidsv3.attention import make_context
from minidsv3.mtp import prediction_loss
from tiny import tiny_config, tiny_model, tiny_tokens

LENGTH = 11                # T
DEPTHS = 3


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def reference_logits(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Logits [B, T - k, vocab] of modules k = 1..D for tokens [B, T], from the state dict (eqs. 21-23).

    Only the transformer block itself, tested elsewhere, is the model's; the block of module k runs as a plain layer.
    """
    state, config, length = model.state_dict(), model.config, tokens.shape[1]
    hidden = model.hidden(tokens)
    if config.mtp_hidden == "post_norm":
        hidden = rms(hidden, state["model.norm.weight"])
    all_logits = []
    for k in range(1, min(config.num_nextn_predict_layers, length - 1) + 1):
        layer = config.num_hidden_layers + k - 1
        own = {name: state[f"model.layers.{layer}.{name}.weight"] for name in (
            "embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")}
        joined = []
        for i in range(length - k):
            embedded = rms(own["embed_tokens"][tokens[:, i + k]], own["enorm"])
            before = rms(hidden[:, i], own["hnorm"])
            pair = [embedded, before] if config.mtp_order == "embedding_first" else [before, embedded]
            joined.append(torch.cat(pair, -1) @ own["eh_proj"].T)
        x = torch.stack(joined, 1)
        block, context = model.model.layers[layer], make_context(config, x.shape[:2], x.dtype, x.device)
        x = x + block.self_attn(block.input_layernorm(x), context)
        x = x + block.mlp(block.post_attention_layernorm(x))
        normed = rms(x, own["shared_head.norm"])
        all_logits.append(normed @ own["shared_head.head"].T)
        hidden = normed if config.mtp_hidden == "post_norm" else x
    return all_logits


def reference_loss(model: Transformer, tokens: Tensor, documents: Tensor | None = None) -> float:
    """(1/D) sum_k L^k, L^k = -(1/T) sum_i log P_i^k[t_i] (eqs. 24, 25 without lambda), for tokens [B, T + 1]."""
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    total = 0.0
    for k, logits in enumerate(reference_logits(model, tokens[:, :-1]), start=1):
        for row in range(batch):
            for i in range(length - k):
                target = i + k + 1
                if documents is None or documents[row, i] == documents[row, target]:
                    total -= logits[row, i].log_softmax(-1)[tokens[row, target]].item() / (batch * length)
    return total / model.config.num_nextn_predict_layers


def model_with(**overrides) -> Transformer:
    return tiny_model(num_nextn_predict_layers=DEPTHS, **overrides)


def draft_logits(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What the model's own modules say, chained as in `Transformer.loss`."""
    carried, all_logits = model.carried(model.hidden(tokens)), []
    for k, module in enumerate(model.mtp_modules, start=1):
        ahead = tokens[:, k:]
        context = make_context(model.config, ahead.shape, carried.dtype, carried.device)
        h = module(carried[:, :ahead.shape[1]], ahead, context)
        all_logits.append(module.logits(h))
        carried = module.carried(h)
    return all_logits


# ---- the module -------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("order", ["embedding_first", "hidden_first"])
@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
def test_drafts_are_the_checkpoints_formula(order, hidden):
    model, tokens = model_with(mtp_order=order, mtp_hidden=hidden), tiny_tokens(2, LENGTH)
    ours, expected = draft_logits(model, tokens), reference_logits(model, tokens)
    assert [tuple(logits.shape) for logits in ours] == [(2, LENGTH - k, 61) for k in (1, 2, 3)]
    for mine, other in zip(ours, expected, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("other", [dict(mtp_order="hidden_first"), dict(mtp_hidden="pre_norm")], ids=str)
def test_order_and_norm_are_not_interchangeable(other):
    """Traps 18 and 19: the same weights read the other way are another model (gains are per channel)."""
    tokens = tiny_tokens(2, LENGTH)
    default, switched = (draft_logits(model, tokens)[0] for model in (model_with(), model_with(**other)))
    assert (default - switched).abs().max() > 1e-2


@torch.no_grad()
def test_where_the_sequence_starts_does_not_matter():
    """Trap 20: engines count an MTP layer's positions on from the main model's; RoPE is relative, so logits agree."""
    model, tokens = tiny_model(), tiny_tokens(1, LENGTH)
    hidden, ahead, module = model.carried(model.hidden(tokens))[:, :-1], tokens[:, 1:], model.mtp_modules[0]
    context = make_context(model.config, ahead.shape, hidden.dtype, hidden.device)
    longer = make_context(model.config, (1, LENGTH + 4), hidden.dtype, hidden.device)
    later = context._replace(cos=longer.cos[:, 5:], sin=longer.sin[:, 5:])
    assert torch.allclose(module(hidden, ahead, context), module(hidden, ahead, later), rtol=0, atol=1e-12)


# ---- the loss ---------------------------------------------------------------------------------------------------

PACKED = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5, [3] * 1 + [4] * 11])      # [B, T + 1]


@pytest.mark.parametrize("documents", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_loss_is_equation_24(depths, documents):
    """T - k terms divided by T (trap 21), none across a document's end (trap 22), the mean over depths."""
    model, tokens = tiny_model(num_nextn_predict_layers=depths), tiny_tokens(2, LENGTH + 1)
    losses = model.loss(tokens, documents, mtp_weight=0.3)
    expected = reference_loss(model, tokens, documents)
    assert losses.mtp.item() == pytest.approx(expected, rel=1e-10)
    assert losses.total.item() == pytest.approx((losses.main + 0.3 * losses.mtp).item(), rel=1e-12)


def test_documents_do_not_touch_the_next_token_loss():
    """Pre-training packs without a mask: attention and the main loss cross documents."""
    model, tokens = tiny_model(), tiny_tokens(2, LENGTH + 1)
    assert model.loss(tokens, PACKED, mtp_weight=0.3).main.item() == model.loss(tokens).main.item()
    expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert model.loss(tokens).main.item() == pytest.approx(expected.item(), rel=1e-12)


def shifted(by: int):
    """Targets `by` tokens further on (or back) than i + k + 1."""
    return lambda final, head, tokens, depth, documents=None: (
        prediction_loss(final, head, tokens.roll(-by * (depth > 0), 1), depth, documents))


def mean_over_terms(final, head, tokens, depth, documents=None):
    """Another library's divisor, T - k."""
    length = tokens.shape[1] - 1
    return prediction_loss(final, head, tokens, depth, documents) * length / (length - depth)


def across_documents(final, head, tokens, depth, documents=None):
    return prediction_loss(final, head, tokens, depth)


def boundary_of_the_next_token_alone(final, head, tokens, depth, documents=None):
    """Masks by t_{i+1} and not by the target, as if rolling once were rolling k + 1 times."""
    if documents is not None and depth:
        documents = torch.where(documents == documents.roll(-1, 1), 0, torch.arange(documents.shape[1]) + 1)
    return prediction_loss(final, head, tokens, depth, documents)


@pytest.mark.parametrize("mutation", [
    shifted(-1), shifted(1), mean_over_terms, across_documents, boundary_of_the_next_token_alone,
], ids=["predicts t_{i+k}", "predicts t_{i+k+2}", "divides by T - k", "crosses documents", "wrong boundary"])
def test_mutated_losses_are_noticed(mutation, monkeypatch):
    model, tokens = model_with(), tiny_tokens(2, LENGTH + 1)
    expected = reference_loss(model, tokens, PACKED)
    assert model.loss(tokens, PACKED, mtp_weight=0.3).mtp.item() == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(minidsv3.model, "prediction_loss", mutation)
    assert abs(model.loss(tokens, PACKED, mtp_weight=0.3).mtp.item() - expected) > 1e-2


def test_module_that_reads_the_token_it_predicts_is_noticed(monkeypatch):
    """The input's shift: token i is joined with t_{i+1}; with t_i a module would only see the past once more."""
    model, tokens = tiny_model(), tiny_tokens(2, LENGTH + 1)
    expected = reference_loss(model, tokens)
    forward = minidsv3.mtp.MTPModule.forward
    for by in (1, -1):
        monkeypatch.setattr(minidsv3.mtp.MTPModule, "forward",
                            lambda self, hidden, ahead, *rest: forward(self, hidden, ahead.roll(by, 1), *rest))
        assert abs(model.loss(tokens, mtp_weight=0.3).mtp.item() - expected) > 1e-3


@pytest.mark.parametrize("length", [1, 2, 3])
def test_depths_beyond_a_short_sequence_add_nothing(length):
    """T = 2 has one prediction at depth 1 and none at depths 2 and 3: sums of no terms are 0."""
    model, tokens = model_with(), tiny_tokens(2, length + 1)
    documents = torch.zeros_like(tokens)
    losses = model.loss(tokens, documents, mtp_weight=0.3)
    assert losses.mtp.item() == pytest.approx(reference_loss(model, tokens), rel=1e-10)
    assert losses.load[2:].sum(-1).tolist() == [2 * 4 * max(length - k, 0) for k in (1, 2, 3)]


# ---- what is shared ---------------------------------------------------------------------------------------------

def test_embedding_and_head_are_shared_by_reference_and_the_norm_is_not():
    """Trap 23: "shared_head" shares its head; the norm has weights of its own. The state dict names both copies."""
    model = model_with()
    for layer, module in enumerate(model.mtp_modules, start=3):
        assert module.embed_tokens is model.model.embed_tokens and module.shared_head.head is model.lm_head
        assert module.shared_head.norm.weight is not model.model.norm.weight
        names = ("embed_tokens", "shared_head.head", "shared_head.norm")
        stored = [f"model.layers.{layer}.{name}.weight" for name in names]
        assert model.state_dict().keys() >= set(stored)
        learned = dict(model.named_parameters()).keys()
        assert [name in learned for name in stored] == [False, False, True]


def test_mtp_loss_teaches_the_main_model():
    """Its gradient reaches embedding, head, every main layer and every module."""
    model = model_with()
    model.loss(tiny_tokens(4, 17), mtp_weight=0.3).mtp.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_modules_cost_nothing_when_their_weight_is_zero(monkeypatch):
    monkeypatch.setattr(minidsv3.mtp.MTPModule, "forward", None)
    assert tiny_model().loss(tiny_tokens(2, 9), mtp_weight=0.0).mtp.item() == 0
    assert tiny_model(num_nextn_predict_layers=0).loss(tiny_tokens(2, 9), mtp_weight=0.3).mtp.item() == 0


def test_tiny_config_has_the_released_reading():
    assert (tiny_config().mtp_order, tiny_config().mtp_hidden) == ("embedding_first", "post_norm")
