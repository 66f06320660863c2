"""The whole model: exact counts, float64 without a leak, what a loss is made of, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import minidsv3.attention
import minidsv3.layers
import minidsv3.moe
from minidsv3 import ModelConfig, Transformer
from minidsv3.attention import LatentCache
from minidsv3.balance import routers
from minidsv3.checkpoint import hub_tensors
from minidsv3.kernels import cross_entropy, rms_norm, route
from tiny import tiny_config, tiny_model, tiny_tokens


# ---- exact counts, on the meta device -----------------------------------------------------------------------------

def on_meta(name: str, **overrides) -> Transformer:
    with torch.device("meta"):
        return Transformer(ModelConfig.preset(name, **overrides))


def values_in(model: Transformer) -> int:
    """Parameters, each once, and the routers' biases."""
    return sum(p.numel() for p in model.parameters()) + sum(r.e_score_correction_bias.numel() for r in routers(model))


@pytest.mark.parametrize("name, main, with_mtp", [
    ("nano", 12_149_008, 14_137_024), ("mini", 1_242_794_688, 1_350_672_896),
    ("full", 671_026_419_200, 682_636_487_424)])
def test_counts_of_the_presets(name, main, with_mtp):
    assert values_in(on_meta(name, num_nextn_predict_layers=0)) == main
    assert values_in(on_meta(name)) == with_mtp


def test_the_full_checkpoint_has_the_published_684_531_386_000_values():
    """Weights with MTP's copies of embedding and head, and a scale for each 128 x 128 block of the FP8 matrices."""
    shapes = {name: tensor.shape for name, tensor in hub_tensors(on_meta("full"))}
    kept = ("embed_tokens", "head", "norm", "mlp.gate.", "eh_proj", "e_score_correction_bias")     # not in FP8
    quantised = [shape for name, shape in shapes.items() if not any(part in name for part in kept)]
    weights = sum(shape.numel() for shape in shapes.values())
    scales = sum(-(-rows // 128) * -(-columns // 128) for rows, columns in quantised)
    assert (weights, scales) == (684_489_845_504, 41_540_496)
    assert weights + scales == 684_531_386_000
    assert len(shapes) + len(quantised) == 91_991


def test_names_and_shapes_are_the_published_ones():
    """From README_WEIGHTS.md: one name of each kind; layer 61 is the MTP module, bias in FP32."""
    state = dict(hub_tensors(on_meta("full")))
    published = {
        "model.embed_tokens.weight": (129280, 7168), "lm_head.weight": (129280, 7168), "model.norm.weight": (7168,),
        "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.0.self_attn.q_a_layernorm.weight": (1536,),
        "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.0.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.0.self_attn.kv_a_layernorm.weight": (512,),
        "model.layers.0.self_attn.kv_b_proj.weight": (32768, 512), "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.2.mlp.down_proj.weight": (7168, 18432), "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,), "model.layers.60.input_layernorm.weight": (7168,),
        "model.layers.3.mlp.experts.255.gate_proj.weight": (2048, 7168),
        "model.layers.3.mlp.experts.0.down_proj.weight": (7168, 2048),
        "model.layers.3.mlp.shared_experts.up_proj.weight": (2048, 7168),
        "model.layers.60.post_attention_layernorm.weight": (7168,), "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.enorm.weight": (7168,), "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.mlp.experts.7.up_proj.weight": (2048, 7168)}
    assert {name: tuple(state[name].shape) for name in published} == published
    assert state["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32


# ---- initialisation -----------------------------------------------------------------------------------------------

def test_every_matrix_starts_with_the_configs_spread_and_every_gain_at_one():
    torch.manual_seed(3)
    model = Transformer(tiny_config(hidden_size=128, vocab_size=500))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            expected, count = model.config.init_std, parameter.numel()
            assert abs(parameter.std().item() / expected - 1) < 5 / count ** 0.5, name
            assert abs(parameter.mean().item()) < 5 * expected / count ** 0.5, name
        else:
            assert (parameter == 1).all() and name.endswith("norm.weight"), name
    assert not any(router.e_score_correction_bias.any() for router in routers(model))
    torch.manual_seed(3)
    again = Transformer(model.config)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters()))


# ---- float64 is float64 throughout ----------------------------------------------------------------------------------

def slope_error(model: Transformer) -> float:
    """How far the loss moves, when every weight changes by a random part of itself, from what its gradient says.

    A change of 1e-6 moves the loss by about 1e-6; one float32 on the way would add noise of 1e-8 or more to that.
    """
    tokens, documents = tiny_tokens(2, 13), torch.zeros(2, 13, dtype=torch.int64)
    weights = {name: p for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) * p.detach() for name, p in weights.items()}

    def total(step: float) -> Tensor:
        moved = {name: p + step * direction[name] for name, p in weights.items()}
        return functional_call(model, moved, (tokens, documents), tie_weights=False)

    gradients = torch.autograd.grad(total(0.0), list(weights.values()))
    expected = sum((g * d).sum() for g, d in zip(gradients, direction.values())).item()
    with torch.no_grad():
        found = ((total(1e-6) - total(-1e-6)) / 2e-6).item()
    return abs(found - expected) / abs(expected)


class Objective(torch.nn.Module):
    """The training loss as a forward pass."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        return self.model.loss(tokens, documents, mtp_weight=0.3, balance_weight=1.0).total


def float64_objective() -> Objective:
    return Objective(tiny_model(dtype=torch.float64))


def test_double_has_no_float32_inside():
    assert slope_error(float64_objective()) < 1e-7
    record = []
    model = tiny_model(dtype=torch.float64)
    assert model(tiny_tokens(2, 7), LatentCache(model.config, 2, 9, torch.float64), record).dtype == torch.float64
    assert {tensor.dtype for routing in record for tensor in (routing.logits, routing.weights)} == {torch.float64}


@pytest.mark.parametrize("place, name, leak", [
    (minidsv3.layers, "rms_norm", lambda x, *rest: rms_norm(x.float(), *rest).to(x.dtype)),
    (minidsv3.moe, "route", lambda logits, *rest, **options: route(logits.float(), *rest, **options)),
    (minidsv3.attention, "rope", lambda x, *rest, **nope: minidsv3.kernels.rope(x.float(), *rest, **nope).to(x.dtype)),
], ids=["norm", "router", "rope"])
def test_one_float32_anywhere_would_be_noticed(place, name, leak, monkeypatch):
    monkeypatch.setattr(place, name, leak)
    assert slope_error(float64_objective()) > 1e-4


# ---- what the loss is made of -------------------------------------------------------------------------------------

def test_total_is_the_weighted_sum_and_main_is_the_cross_entropy():
    model, tokens = tiny_model(), tiny_tokens(3, 14)
    losses = model.loss(tokens, mtp_weight=0.3, balance_weight=1e-2)
    weighted = losses.main + 0.3 * losses.mtp + 1e-2 * losses.balance
    assert losses.total.item() == pytest.approx(weighted.item(), rel=1e-12)
    expected = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).mean()
    assert losses.main.item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.load.dtype == torch.float32 and not losses.load.requires_grad


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch(micro_batches):
    """Loads are counts and add; losses are means and average, MTP's divisor and the balance loss included."""
    model, tokens = tiny_model(), tiny_tokens(4, 14)
    documents = (torch.arange(14) > 8).long().expand(4, 14)
    options = dict(mtp_weight=0.3, balance_weight=1e-2)
    whole = model.loss(tokens, documents, **options)
    gradient = torch.autograd.grad(whole.total, list(model.parameters()))
    parts = [model.loss(t, d, **options) for t, d in zip(tokens.chunk(micro_batches), documents.chunk(micro_batches))]
    assert torch.equal(sum(part.load for part in parts), whole.load)
    for field in ("total", "main", "mtp", "balance"):
        mean = sum(getattr(part, field) for part in parts) / micro_batches
        assert mean.item() == pytest.approx(getattr(whole, field).item(), rel=1e-12), field
    for part in parts:
        (part.total / micro_batches).backward()
    for parameter, expected in zip(model.parameters(), gradient):
        assert torch.allclose(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_record_has_every_moe_layer_in_order():
    model, tokens, record = tiny_model(), tiny_tokens(2, 7), []
    model(tokens[:, :-1], record=record)
    assert [tuple(routing.experts.shape) for routing in record] == [(12, 4), (12, 4)]
    assert torch.equal(torch.stack([routing.load for routing in record]), model.loss(tokens).load[:2])
    first, second = (block.mlp.gate.weight for block in model.blocks[1:])
    depends = torch.autograd.grad(record[0].logits.sum(), [first, second], allow_unused=True)
    assert depends[0] is not None and depends[1] is None


def test_dense_model_has_no_load():
    model = tiny_model(first_k_dense_replace=3, num_nextn_predict_layers=0)
    losses = model.loss(tiny_tokens(2, 9), balance_weight=1.0)
    assert losses.load.shape == (0, 16) and losses.balance.item() == 0


@pytest.mark.parametrize("lower", ["bf16 weights", "autocast"])
def test_bf16_stays_near_float32(lower):
    """Loss in FP32 either way, within 2 % of the FP32 model's, and a gradient for every parameter."""
    model, tokens = tiny_model(dtype=torch.float32), tiny_tokens(4, 17)
    exact = model.loss(tokens, mtp_weight=0.3).total.item()
    rounded = copy.deepcopy(model).bfloat16() if lower == "bf16 weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=lower == "autocast"):
        losses = rounded.loss(tokens, mtp_weight=0.3)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(exact, rel=0.02) and losses.total.item() != exact
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounded.parameters())


def test_a_few_steps_learn_a_repeated_text():
    """From the model's own initialisation, MTP and balance included: the loss falls far below log 61 = 4.1."""
    model = Transformer(tiny_config(init_std=0.1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = tiny_tokens(1, 16).repeat(4, 2)
    for _ in range(60):
        losses = model.loss(tokens, mtp_weight=0.3, balance_weight=1e-4)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
    assert losses.main.item() < 0.5 and losses.mtp.item() < 0.5


# ---- refusals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, sentence", [
    (torch.tensor([[0, 61]]), "token ids run from 0 to 61; the vocabulary has ids 0 to 60"),
    (torch.tensor([[-1, 5]]), "token ids run from -1 to 5"),
    (torch.tensor([1, 2]), r"tokens have shape \[2\]; they must be \[batch, tokens\]"),
    (torch.zeros(2, 0, dtype=torch.int64), r"tokens have shape \[2, 0\]; .* at least one token"),
    (torch.zeros(1, 65, dtype=torch.int64), "65 tokens are more than the model's context of 64"),
])
def test_wrong_tokens_are_refused_in_a_sentence(tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model()(tokens)

