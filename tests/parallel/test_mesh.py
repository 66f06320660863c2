"""A model spread over a mesh trains as one process does: losses, norm, weights, averages and biases."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minidsv3 import ModelConfig, Transformer
from minidsv3 import model as model_module
from minidsv3.balance import update_biases
from minidsv3.cost import parameters
from minidsv3.data import Batch
from minidsv3.fp8 import FP8Linear, to_fp8
from minidsv3.optim import EMA, AdamW, Recipe, parameter_groups
from minidsv3.parallel import mesh as meshes
from minidsv3.parallel.experts import ParallelExperts
from minidsv3.parallel.mesh import Mesh, clip_gradients, fake_world, in_the_whole, make_mesh, parallelise
from minidsv3.parallel.processes import run
from minidsv3.train import Measured, train_step, update_weights
from fp8_by_hand import Exact, without_rounding
from tiny import tiny_config, tiny_model, tiny_tokens

RECIPE = replace(Recipe.preset("nano"), clip_norm=0.5, sequence_balance=0.1, ema_decay=0.9)
SEEN = 100_000                                                   # tokens: at the peak of the learning rate
SEQUENCES, LENGTH = 8, 12


def batch_of(step: int) -> Batch:
    tokens = tiny_tokens(SEQUENCES, LENGTH + 1, seed=step)
    return Batch(tokens, (torch.arange(LENGTH + 1) > 7).long().expand(SEQUENCES, -1))


class Training:
    """A model, its optimiser and its average."""

    def __init__(self, model: Transformer, moments: torch.dtype):
        self.model = model
        self.optimizer = AdamW(parameter_groups(model, RECIPE.weight_decay), moments=moments)
        self.ema = EMA(model, RECIPE.ema_decay)


def mesh_step(training: Training, batch: Batch, mesh: Mesh) -> Measured:
    """`train_step` on a mesh: every rank takes its rows, in two micro-batches."""
    model, rank = training.model, mesh.dp.get_local_rank()
    tokens, documents = (rows.chunk(mesh.dp.size())[rank] for rows in batch)
    sums, load = torch.zeros(4, dtype=torch.float64), 0.0
    for last, rows in enumerate(torch.arange(len(tokens)).chunk(2)):
        model.set_requires_gradient_sync(bool(last))             # reduce once a step, behind the last micro-batch,
        model.set_reshard_after_backward(bool(last))             # and keep what was gathered until then
        losses = model.loss(tokens[rows], documents[rows], RECIPE.mtp_weight(SEEN), RECIPE.balance_weight(SEEN))
        share = len(rows) / len(batch.tokens)
        (losses.total * share).backward()
        assert isinstance(model.model.norm.weight, DTensor) == bool(last)
        sums, load = sums + share * torch.stack(losses[:4]).detach(), load + losses.load
    dist.all_reduce(sums, group=mesh.dp.get_group())
    norm = clip_gradients(model.parameters(), RECIPE.clip_norm, [mesh.dp.get_group(), mesh.pp.get_group()])
    load = whole_load(load, mesh)
    update_weights(training.optimizer, RECIPE, SEEN, losses, norm)
    update_biases(model, load, RECIPE.gamma(SEEN))
    return Measured(*sums[1:].tolist(), norm.item(), load)


def whole_load(load: Tensor, mesh: Mesh) -> Tensor:
    """Tokens of each expert in the whole batch, from this rank's."""
    dist.all_reduce(load, group=mesh.dp.get_group())
    return load


@torch.no_grad()
def whole_state(model: Transformer, mesh: Mesh) -> dict[str, Tensor]:
    """`state_dict()` as one process would have it."""
    parts = {name: in_the_whole(tensor, mesh) for name, tensor in model.state_dict().items()}
    return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in parts.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def plain() -> Transformer:
    return tiny_model(q_lora_rank=3)                                 # a matrix of 3 rows leaves the fourth rank none


def unrounded() -> Transformer:
    """It computes as FP8 training does, but for the rounding."""
    return to_fp8(plain(), SimpleNamespace(products=Exact))


def difference(mesh: Mesh, steps: int = 1, moments: torch.dtype = torch.bfloat16,
               other: Callable[[], Transformer] = plain) -> dict[str, float]:
    """The largest difference between training on the mesh and plainly on one process, by what differs."""
    one, other = plain(), other()
    one, spread = Training(one, moments), Training(parallelise(other, mesh), moments)
    found = {"measured": 0.0, "load": 0.0}
    for step in range(steps):
        batch = batch_of(step)
        expected = train_step(one.model, one.optimizer, RECIPE, batch, SEEN, micro_batch=3)
        measured = mesh_step(spread, batch, mesh)
        for training in (one, spread):
            training.ema.update()
        found["measured"] = max(found["measured"], distance(*map(torch.tensor, (measured[:4], expected[:4]))))
        found["load"] = max(found["load"], distance(measured.load, expected.load))
    state, averages = one.model.state_dict(), one.ema.state_dict()
    whole = whole_state(spread.model, mesh)
    assert list(whole) == list(state)
    found["biases"] = max(distance(whole[name], state[name]) for name in state if "bias" in name)
    found["experts"] = max(distance(whole[name], state[name]) for name in state if ".experts." in name)
    found["others"] = max(distance(whole[name], state[name]) for name in state if ".experts." not in name)
    found["average"] = max(distance(in_the_whole(part, mesh).full_tensor(), averages[name])
                           for name, part in spread.ema.state_dict().items())
    return found


def differences(meshes_to_try: list[tuple[int, int, int]]) -> list[dict[str, float]]:
    every = [difference(make_mesh(1, *sizes), steps=3) for sizes in meshes_to_try]
    last = make_mesh(1, *meshes_to_try[-1])
    every.append(difference(last, steps=3, moments=torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        without_rounding(patch)
        return [*every, difference(last, steps=3, other=unrounded)]


@pytest.mark.parametrize("ranks, sizes", [
    (2, [(2, 1, 1), (2, 2, 1)]),
    (4, [(4, 2, 1), (4, 4, 1), (4, 4, 2), (4, 2, 2)])],      # dp, ep, nodes
    ids=["2 ranks", "4 ranks"])
def test_a_mesh_trains_as_one_process(ranks, sizes):
    for found in run(differences, ranks, sizes):
        for each in found:
            assert each["load"] == 0 and max(each.values()) < 1e-12, each


# ---- what must be noticed ---------------------------------------------------------------------------------------


HERE = sys.modules[__name__]
MUTANTS = {
    "biases move by this rank's load": (HERE, "whole_load", lambda load, mesh: load, "biases"),
    "clipped by this rank's norm": (HERE, "clip_gradients", lambda parameters, max_norm, groups:
                                    meshes.clip_gradients(parameters, max_norm, []), "measured"),
    "routings in a plain list, which FSDP copies": (model_module, "Record", list, "load")}


def differences_of_mutants() -> dict[str, dict[str, float]]:
    mesh = make_mesh(1, 4, 2)
    found = {"nothing wrong": difference(mesh)}
    for mutant, (where, name, wrong, _) in MUTANTS.items():
        with mock.patch.object(where, name, wrong):
            found[mutant] = difference(mesh)
    return found


def test_the_comparison_catches_wrong_steps():
    every = run(differences_of_mutants, 4)
    for found in every:
        assert max(found["nothing wrong"].values()) < 1e-12
    for mutant, (*_, what) in MUTANTS.items():
        assert max(found[mutant][what] for found in every) > 1e-3, mutant


def gradient_ratios() -> tuple[float, float]:
    """How many times too large gradients of experts and of others are if ranks' losses are means over their own tokens
    and FSDP averages, as it does unless told otherwise."""
    mesh, one = make_mesh(1, 4, 2), tiny_model()
    with mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda part, factor: None):
        spread = parallelise(tiny_model(), mesh)
    tokens = batch_of(0).tokens
    one.loss(tokens).total.backward()
    spread.loss(tokens.chunk(4)[mesh.dp.get_local_rank()]).total.backward()
    return tuple((in_the_whole(spread.get_parameter(name).grad, mesh).full_tensor().norm()
                  / one.get_parameter(name).grad.norm()).item()
                 for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.1.self_attn.o_proj.weight"))


def test_averages_would_leave_gradients_of_experts_ep_times_too_large():
    assert run(gradient_ratios, 4)[0] == pytest.approx((2, 1), rel=1e-12)


# ---- shards -----------------------------------------------------------------------------------------------------


def shares_and_state() -> dict[str, float]:
    """A rank's share of parameters and of AdamW's moments, and whether the state comes out as it went in."""
    mesh, one = make_mesh(1, 4, 2, nodes=2), tiny_model()
    training = Training(parallelise(tiny_model(), mesh), torch.bfloat16)
    state = whole_state(training.model, mesh)
    equal = all(torch.equal(state[name], value) for name, value in one.state_dict().items())
    mesh_step(training, batch_of(0), mesh)
    weights = list(training.model.parameters())
    held = sum(weight.to_local().numel() for weight in weights)
    moments = sum(values["exp_avg"].to_local().numel() for values in training.optimizer.state.values())
    total = sum(weight.numel() for weight in one.parameters())
    return {"parameters": held / total, "moments": moments / total,
            "equal": float(equal)}


def test_every_rank_holds_its_part_of_weights_and_moments():
    every = run(shares_and_state, 4)
    for kind in ("parameters", "moments"):
        assert sum(found[kind] for found in every) == pytest.approx(1, abs=1e-12)
        assert max(found[kind] for found in every) < 0.3           # a quarter, and what rows do not divide
    assert all(found["equal"] for found in every)


# ---- layouts ----------------------------------------------------------------------------------------------------


def test_ranks_count_with_the_gpu_fastest():
    """The report's layout: a rank's expert-parallel partners are 64 neighbours, on 8 nodes of 8."""
    for rank in (0, 77, 2047):
        with fake_world(2048, rank):
            mesh = make_mesh(pp=16, dp=128, ep=64, nodes=8)
            first = rank // 64 * 64
            assert mesh.ep.mesh.tolist() == list(range(first, first + 64))
            assert mesh.dp.mesh.tolist() == list(range(rank // 128 * 128, rank // 128 * 128 + 128))
            assert mesh.pp.mesh.tolist() == list(range(rank % 128, 2048, 128))
            assert mesh.edp.mesh.tolist() == [rank // 128 * 128 + rank % 64, rank // 128 * 128 + rank % 64 + 64]
            assert [hop.group.size() for hop in meshes.hops_of(mesh)] == [8, 8]
            assert meshes.hops_of(mesh)[0].group.rank() == rank % 64 // 8


def test_the_full_model_spreads_over_a_fake_world():
    """One layer of the 671 B model: of 256 experts, 4 are on a rank, and half of their rows in its shard."""
    config = ModelConfig.preset("full", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    with fake_world(128, 100), torch.device("meta"):
        model = parallelise(Transformer(config), make_mesh(1, 128, 64, nodes=8))
        experts = model.model["layers"][0].mlp.experts
        assert isinstance(experts, ParallelExperts)
        assert experts.gate_up_proj.shape == (4, 4096, 7168) and experts.down_proj.shape == (4, 7168, 2048)
        assert experts.gate_up_proj.to_local().shape == (4, 2048, 7168)
        shards = sum(weight.to_local().numel() for weight in model.parameters())
        assert shards == pytest.approx(parameters(config).total / 128, rel=1e-3)


@pytest.mark.parametrize("sizes, sentence", [
    ((2, 2, 1), "pp x dp is 2 x 2 = 4; there are 8 ranks"),
    ((2, 4, 3), "ep is 3 and dp 4; experts are spread over ranks of dp, so ep must divide dp"),
    ((1, 8, 4, 3), "nodes is 3 and ep 4; the ranks of ep stand on nodes in equal numbers"),
    ((0, 8), "pp is 0, dp 8, ep 1 and nodes 1; each must be at least 1")])
def test_wrong_layouts_are_refused(sizes, sentence):
    with fake_world(8, 0), pytest.raises(ValueError, match=re.escape(sentence)):
        make_mesh(*sizes)


def test_models_that_do_not_fit_are_refused():
    with fake_world(6, 0), torch.device("meta"):
        with pytest.raises(ValueError, match="16 experts cannot be shared out equally among 3 ranks"):
            parallelise(Transformer(tiny_config()), make_mesh(1, 6, 3))
        with pytest.raises(ValueError, match="gate_up_proj has 32 rows an expert, and edp = dp / ep is 3"):
            parallelise(Transformer(tiny_config()), make_mesh(1, 6, 2))


@pytest.mark.parametrize("ep, found", [(1, "FSDPExperts"), (2, "FSDPParallelExperts")])
def test_fp8_after_the_mesh_is_refused(ep, found):
    """Experts that are sharded or spread have another class: they would stay in BF16 unnoticed."""
    with fake_world(2, 0):
        model = parallelise(plain(), make_mesh(1, 2, ep))
        with pytest.raises(ValueError, match=f"the model holds {found}, which to_fp8 cannot change; call to_fp8 first"):
            to_fp8(model)
    assert not any(isinstance(part, FP8Linear) for part in model.modules())


def test_fake_worlds_are_alone():
    with fake_world(8, 7), pytest.raises(ValueError, match="a process group is there already"):
        with fake_world(8, 0):
            pass
    with pytest.raises(ValueError, match="rank is 8; it must be one of 0 to 7"):
        with fake_world(8, 8):
            pass
    assert not dist.is_initialized()
