"""Stages in one process: the split, the names, and a chain of stages that is the model, its gradients included."""

import pytest
import torch
from torch import Tensor

from minidsv3 import ModelConfig, Transformer
from minidsv3.parallel.pipeline import EMBEDDING
from minidsv3.parallel.places import build_stages, copied_weights, named_weights
from minidsv3.parallel.stage import AddLoss, Objective, Stage, split
from minidsv3.weight_gradients import defer_weight_gradients
from tiny import tiny_config, tiny_model, tiny_tokens

FULL = ModelConfig.preset("full")
DENSE = dict(num_hidden_layers=4, first_k_dense_replace=4, num_nextn_predict_layers=0)
MOE = dict(num_hidden_layers=4, num_nextn_predict_layers=0)
MTP = dict(num_hidden_layers=4, num_nextn_predict_layers=2)


# ---- the split --------------------------------------------------------------------------------------------------

def test_the_full_model_in_16_stages():
    assert [len(layers) for layers in split(FULL, 16)] == [3] + [4] * 14 + [2]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("layers", [1, 2, 6, 8, 12, 61])
def test_every_layer_is_in_one_stage_and_no_stage_is_empty(layers, ahead):
    config = tiny_config(num_hidden_layers=layers, num_nextn_predict_layers=ahead)
    for stages in range(1, layers + 1):
        cut = split(config, stages)
        assert [layer for part in cut for layer in part] == list(range(layers))
        assert len(cut) == stages and all(cut)
        weights = [len(part) for part in cut]
        weights[0] += 1
        weights[-1] += 1 + ahead
        ideal = (layers + 2 + ahead) / stages
        assert max(weights[1:-1], default=0) <= ideal + 1      # the ends may be heavier: they have what they have


@pytest.mark.parametrize("stages", [0, 5, -1])
def test_stages_without_a_layer_are_refused(stages):
    with pytest.raises(ValueError, match=f"4 layers cannot be cut into {stages} stages; every stage needs at least"):
        split(tiny_config(num_hidden_layers=4), stages)


# ---- names and copies -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overrides", [DENSE, MOE, MTP])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_stages_states_together_are_the_models(overrides, stages):
    model = tiny_model(**overrides)
    together = {}
    for layers in split(model.config, stages):
        stage = Stage(model.config, layers)
        stage.take_from(model.state_dict())
        state = stage.state_dict()
        assert together.keys() & state.keys() <= {EMBEDDING}
        together |= state
    whole = Transformer(model.config).to(torch.float64)
    whole.load_state_dict(together)                                         # strict: no name too many, none missing
    for name, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value)


def test_half_a_state_is_refused():
    model = tiny_model(**MTP)
    state = {name: value for name, value in model.state_dict().items() if ".layers.3." not in name}
    with pytest.raises(ValueError, match=r"the state has no model\.layers\.3\..*; layers 2 to 3 need the state of a"):
        Stage(model.config, range(2, 4)).take_from(state)


def test_16_ranks_add_up_to_the_full_model():
    """671,026,419,200 values and the MTP module's, and the embedding once more, which that reads."""
    copy = FULL.vocab_size * FULL.hidden_size
    with torch.device("meta"):
        stages = [Stage(FULL, layers) for layers in split(FULL, 16)]
    values = sum(value.numel() for stage in stages for value in [*stage.parameters(), *stage.buffers()])
    assert values == 682_636_487_424 + copy
    main = sum(value.numel() for stage in stages for name, value in [*stage.named_parameters(), *stage.named_buffers()]
               if ".layers.61." not in name)
    assert main == 671_026_419_200 + copy


def test_the_list_of_copies():
    config = tiny_config(**MTP)
    everything = set(named_weights([*build_stages(config, "1f1b", 2, 0), *build_stages(config, "1f1b", 2, 1)]))
    assert copied_weights(config, "1f1b", 2) == copied_weights(config, "zb1p", 2) == {EMBEDDING: (0, 1)}
    assert copied_weights(config, "dualpipev", 2) == copied_weights(config, "zbv", 2) == {}
    assert copied_weights(config, "dualpipe", 2) == dict.fromkeys(everything, (0, 1))
    assert copied_weights(tiny_config(**MOE), "1f1b", 4) == {}
    assert copied_weights(config, "dualpipe", 4)["model.layers.1.input_layernorm.weight"] == (1, 2)


@pytest.mark.parametrize("schedule, rank", [("dualpipev", 0), ("zbv", 0), ("dualpipe", 0), ("dualpipe", 1)])
def test_first_and_last_stage_share_one_embedding(schedule, rank):
    first, last = sorted(build_stages(tiny_config(**MTP), schedule, 2, rank), key=lambda stage: stage.layers.start)
    assert all(module.embed_tokens is first.model["embed_tokens"] for module in last.mtp_modules)
    assert all(module.shared_head.head is last.lm_head for module in last.mtp_modules)


# ---- the objective ----------------------------------------------------------------------------------------------

def chain(model: Transformer, stages: int, tokens: Tensor, documents: Tensor, objective: Objective) -> list[Stage]:
    """One forward and one backward pass through stages that know each other only through messages."""
    parts = [Stage(model.config, layers) for layers in split(model.config, stages)]
    inputs, outputs, x = [], [], tokens
    for stage in parts:
        stage.take_from(model.state_dict())
        stage.begin_step(objective)
        inputs.append(x)
        outputs.append(stage(x, tokens, documents) if stage.last else stage(x))
        x = outputs[-1].detach().requires_grad_()
    slope = torch.ones_like(x)
    for received, sent in zip(reversed(inputs), reversed(outputs)):
        sent.backward(slope)
        slope = received.grad
    return parts


def wrong_gradients(model: Transformer, parts: list[Stage]) -> set[str]:
    """Names of the gradients that differ from the model's by more than 1e-12; the embedding's copies are summed."""
    summed: dict[str, Tensor] = {}
    for stage in parts:
        for name, parameter in named_weights([stage]).items():
            if parameter.grad is not None:
                summed[name] = summed.get(name, 0) + parameter.grad
    want = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert summed.keys() == want.keys()
    return {name for name in want if (summed[name] - want[name]).norm() > 1e-12 * want[name].norm()}


def model_and_chain(overrides: dict, mtp_weight: float = 0.3, stages: int = 3) -> tuple:
    model = tiny_model(**overrides)
    tokens, documents = tiny_tokens(2, 9), torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    losses = model.loss(tokens, documents, mtp_weight, balance_weight=0.1)
    (losses.total / 4).backward()
    return model, losses, chain(model, stages, tokens, documents, Objective(mtp_weight, 0.1, share=1 / 4))


@pytest.mark.parametrize("mtp_weight", [0.3, 0.0])
@pytest.mark.parametrize("overrides", [DENSE, MOE, MTP, MTP | {"mtp_hidden": "pre_norm", "mtp_order": "hidden_first"}])
def test_a_chain_of_stages_is_the_model(overrides, mtp_weight):
    model, losses, parts = model_and_chain(overrides, mtp_weight)
    assert wrong_gradients(model, parts) == set()
    sums = sum(stage.sums for stage in parts)
    torch.testing.assert_close(sums, torch.stack(losses[1:4]).detach() / 4, rtol=1e-12, atol=0)
    load = torch.zeros_like(losses.load)
    for stage in parts:
        load[stage.load_rows] += stage.load
    assert torch.equal(load, losses.load)


def test_rows_of_the_load_are_shared_out():
    config = tiny_config(num_hidden_layers=8, first_k_dense_replace=3, num_nextn_predict_layers=2)
    rows = [Stage(config, layers).load_rows for layers in split(config, 4)]
    assert [row for part in rows for row in range(part.start, part.stop)] == list(range(config.moe_layers))
    assert rows[0] == slice(0, 0)                                           # dense layers only


def test_a_lost_balance_gradient_shows(monkeypatch):
    monkeypatch.setattr(AddLoss, "backward", staticmethod(lambda ctx, slope: (slope, None)))
    model, _, parts = model_and_chain(MOE)
    assert "model.layers.1.mlp.gate.weight" in wrong_gradients(model, parts)


def test_a_deferred_stage_gives_the_same():
    """The store does not change what a stage computes, only when."""
    model = tiny_model(**MOE)
    tokens = tiny_tokens(1, 9)
    model.loss(tokens).total.backward()
    stage = Stage(model.config, range(0, 4))
    stage.take_from(model.state_dict())
    store = defer_weight_gradients(stage)
    stage(tokens, tokens).backward()
    assert len(store) > 0
    store.take()()
    assert wrong_gradients(model, [stage]) == set()
