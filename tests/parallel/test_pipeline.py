"""Pipelines on 2 and 4 real ranks train as one process does: losses, gradients, loads, norm, weights and biases."""

import weakref
from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from minidsv3.balance import update_biases
from minidsv3.model import Losses, Transformer
from minidsv3.optim import AdamW
from minidsv3.parallel.mesh import in_the_whole, make_mesh, parallelise
from minidsv3.parallel.pipeline import EMBEDDING, Pipeline
from minidsv3.parallel.places import SCHEDULES, chains
from minidsv3.parallel.processes import run
from minidsv3.parallel.stage import AddLoss, Stage
from minidsv3.parallel.torch_stage import TorchStage
from minidsv3.weight_gradients import DeferredGrouped, DeferredLinear, WeightGradStore
from tiny import tiny_model, tiny_tokens

KINDS = {                         # dense layers, MTP modules, weight of MTP's loss
    "dense": (8, 0, 0.3),
    "moe": (3, 0, 0.3),
    "mtp": (1, 2, 0.3),
    "mtp off": (7, 1, 0.0)}       # its embedding has no gradient of its own then
STEPS = 2


def model_of(kind: str) -> Transformer:
    """8 layers, so that a folded chain over 4 ranks has one for each stage."""
    dense, ahead, _ = KINDS[kind]
    return tiny_model(num_hidden_layers=8, first_k_dense_replace=dense, num_nextn_predict_layers=ahead)


def weights_of(kind: str) -> dict[str, float]:
    return {"mtp_weight": KINDS[kind][2], "balance_weight": 0.1}


def batch_of(step: int, sequences: int) -> tuple[Tensor, Tensor]:
    """Tokens and documents; the second batch is larger, and its sequences are shorter."""
    sequences, length = sequences + 4 * step, 9 - step
    tokens = tiny_tokens(sequences, length, seed=step)
    return tokens, (torch.arange(length) >= torch.arange(sequences)[:, None] % 7 + 1).long()


def recorded(losses: Losses, norm: Tensor, weights: dict[str, nn.Parameter], biases: dict[str, Tensor]) -> dict:
    """What a step gave, before the optimiser takes its own; gradients are clipped already."""
    return {"losses": torch.stack(losses[:4]).detach(), "load": losses.load, "norm": norm,
            "gradients": {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None},
            "biases": {name: bias.clone() for name, bias in biases.items()}}


def biases_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: bias for name, bias in module.named_buffers() if name.endswith("e_score_correction_bias")}


# ---- one process ------------------------------------------------------------------------------------------------

@cache
def one_process(kind: str, sequences: int, micro_batch: int) -> list[dict]:
    """The steps of one process, and the weights after the last."""
    model, steps = model_of(kind), []
    weights = dict(model.named_parameters())
    optimizer = AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        parts = []
        tokens, documents = batch_of(step, sequences)
        for some, numbers in zip(tokens.split(micro_batch), documents.split(micro_batch)):
            parts.append(model.loss(some, numbers, **weights_of(kind)))
            (parts[-1].total * len(some) / len(tokens)).backward()
        losses = Losses(*(sum(part[i].detach() for part in parts) / len(parts) for i in range(4)),
                        load=sum(part.load for part in parts))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update_biases(model, losses.load, gamma=0.01)
        steps.append(recorded(losses, norm, weights, biases_of(model)))
        optimizer.step()
        optimizer.zero_grad()
    return [*steps, {"weights": {name: weight.detach() for name, weight in weights.items()}}]


# ---- many ranks -------------------------------------------------------------------------------------------------

def many_ranks(schedule: str, kind: str, sequences: int, micro_batch: int) -> list[dict]:
    """The same on a rank."""
    model, steps = model_of(kind), []
    pipeline = Pipeline(model.config, schedule, model.state_dict(), micro_batch)
    optimizer = AdamW(pipeline.weights().values(), lr=0.01)
    for step in range(STEPS):
        losses = pipeline.step(*batch_of(step, sequences), **weights_of(kind))
        norm = pipeline.clip(1.0)
        pipeline.update_biases(losses.load, gamma=0.01)
        biases = {name: bias for stage in pipeline.stages for name, bias in biases_of(stage).items()}
        steps.append(recorded(losses, norm, pipeline.weights(), biases))
        optimizer.step()
        optimizer.zero_grad()
    return [*steps, {"weights": {name: weight.detach() for name, weight in pipeline.weights().items()}}]


def every_kind(schedule: str, sequences: int, micro_batch: int) -> dict[str, list[dict]]:
    return {kind: many_ranks(schedule, kind, sequences, micro_batch) for kind in KINDS}


def differences(want: list[dict], ranks: list[list[dict]], tolerance: float = 1e-10) -> set[str]:
    """What some rank has otherwise than one process, by name; what no rank has counts too."""
    wrong = set()
    for step, values in enumerate(want):
        for kind, value in values.items():
            if isinstance(value, Tensor):
                wrong |= {kind for rank in ranks if not close(rank[step][kind], value, tolerance)}
                continue
            assert set().union(*(rank[step][kind] for rank in ranks)) == value.keys()
            wrong |= {name for rank in ranks for name, got in rank[step][kind].items()
                      if not close(got, value[name], tolerance)}
    return wrong


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


@pytest.mark.parametrize("ranks, sequences, micro_batch", [(2, 12, 2), (4, 10, 1)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_one_process(schedule, ranks, sequences, micro_batch):
    results = run(every_kind, ranks, schedule, sequences, micro_batch)
    for kind in KINDS:
        want, got = one_process(kind, sequences, micro_batch), [result[kind] for result in results]
        assert differences(want, got) == set()
        seen: dict[str, Tensor] = {}
        for name, value in [pair for rank in got for pair in rank[-1]["weights"].items()]:
            assert torch.equal(seen.setdefault(name, value), value)         # copies are equal to the last bit


# ---- what must be noticed ---------------------------------------------------------------------------------------

def mutated(mutation: str, schedule: str, kind: str) -> list[dict]:
    target, name, wrong = MUTATIONS[mutation]
    with patch.object(target, name, wrong):
        return many_ranks(schedule, kind, 8, 1)


def forget_last_weights(stage: TorchStage, chunk: int, last_backward: bool = False) -> None:
    later = stage.dw_runner.pop(chunk)
    if chunk < stage.chunks - 1:
        later()


def labels_not_swapped(pipeline: Pipeline, tokens: Tensor, documents: Tensor | None,
                       right: Callable = Pipeline._feed) -> tuple:
    arguments, keywords = right(pipeline, tokens, documents)
    return arguments, keywords | {"labels": arguments[0], "target": arguments[0]}


MUTATIONS = {
    "a W dropped": (TorchStage, "backward_weight_one_chunk", forget_last_weights),
    "labels not swapped": (Pipeline, "_feed", labels_not_swapped),
    "copies not summed": (Pipeline, "_sum_copies", lambda pipeline: None),
    "balance gradient lost": (AddLoss, "backward", staticmethod(lambda ctx, slope: (slope, None))),
    "micro-batches not weighed": (Stage, "begin_step", lambda stage, objective, right=Stage.begin_step: right(
        stage, objective._replace(share=1.0))),
    "biases left alone": (Pipeline, "update_biases", lambda pipeline, load, gamma: None)}


@pytest.mark.parametrize("mutation, schedule, kind, expected", [
    ("a W dropped", "zb1p", "dense", {"model.layers.3.mlp.down_proj.weight", "norm"}),
    ("a W dropped", "zbv", "dense", {"model.layers.3.mlp.down_proj.weight", "norm"}),
    ("a W dropped", "dualpipe", "dense", {"norm"}),
    ("labels not swapped", "dualpipe", "dense", {"losses", "lm_head.weight", EMBEDDING}),
    ("copies not summed", "dualpipe", "dense", {"lm_head.weight", EMBEDDING, "model.layers.3.mlp.down_proj.weight"}),
    ("copies not summed", "1f1b", "mtp", {EMBEDDING}),
    ("copies not summed", "zb1p", "mtp", {EMBEDDING}),
    ("balance gradient lost", "dualpipev", "moe", {"model.layers.3.mlp.gate.weight"}),
    ("micro-batches not weighed", "dualpipev", "dense", {"losses", "norm"}),
    ("biases left alone", "1f1b", "moe", {"model.layers.3.mlp.gate.e_score_correction_bias"})])
def test_faults_are_noticed(mutation, schedule, kind, expected):
    assert expected <= differences(one_process(kind, 8, 1), run(mutated, 2, mutation, schedule, kind))


def under_autocast(schedule: str) -> float:
    """The largest distance of a gradient from one process's, both with BF16 products on FP32 weights."""
    model, (tokens, documents) = tiny_model(dtype=torch.float32, num_hidden_layers=4), batch_of(0, 8)
    pipeline = Pipeline(model.config, schedule, model.state_dict(), precision="bf16")
    pipeline.step(tokens, documents, **weights_of("mtp"))
    for rows in zip(tokens.split(1), documents.split(1)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*rows, **weights_of("mtp")).total / len(tokens)
        loss.backward()
    right = dict(model.named_parameters())
    return max(((weight.grad - right[name].grad).norm() / right[name].grad.norm()).item()
               for name, weight in pipeline.weights().items())


@pytest.mark.parametrize("schedule", ["zb1p", "dualpipe"])
def test_bf16_is_that_of_one_process(schedule):
    """BF16 rounds by 4e-3; all that differs is the order of FP32 sums."""
    assert max(run(under_autocast, 2, schedule)) < 1e-6


# ---- with data and expert parallelism inside --------------------------------------------------------------------

def on_a_mesh(schedule: str, ep: int, kind: str) -> dict:
    """One step on 2 x 2 ranks: two pipelines, each with half of the batch."""
    model, mesh = model_of(kind), make_mesh(pp=2, dp=2, ep=ep)
    pipeline = Pipeline(model.config, schedule, model.state_dict(), group=mesh.pp.get_group(),
                        data=mesh.dp.get_group(), wrap=lambda stage: parallelise(stage, mesh))
    tokens, documents = (rows.chunk(2)[mesh.dp.get_local_rank()] for rows in batch_of(0, 8))
    losses = pipeline.step(tokens, documents, **weights_of(kind))
    norm = pipeline.clip(1.0)
    pipeline.update_biases(losses.load, gamma=0.01)
    step = recorded(losses, norm, pipeline.weights(),
                    {name: bias for stage in pipeline.stages for name, bias in biases_of(stage).items()})
    step["gradients"] = {name: in_the_whole(grad, mesh).full_tensor() for name, grad in step["gradients"].items()}
    return step


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_may_be_sharded(schedule, ep):
    results = run(on_a_mesh, 4, schedule, ep, "mtp")
    assert differences(one_process("mtp", 8, 1)[:1], [[result] for result in results]) == set()


# ---- work and memory --------------------------------------------------------------------------------------------

def count_products(schedule: str, micro_batches: int, weights: Callable = TorchStage.backward_weight_one_chunk) -> dict:
    """How often input and weight gradients of matrices were computed on this rank."""
    counts = {"dX": 0, "dW": 0}

    def backward(right: Callable) -> staticmethod:
        def counted(ctx, slope):
            counts["dX"] += 1
            return right(ctx, slope)
        return staticmethod(counted)

    def put(store: WeightGradStore, weight: Tensor, gradient: Callable, right: Callable = WeightGradStore.put) -> None:
        def counted(into):
            counts["dW"] += 1
            return gradient(into)
        right(store, weight, counted)

    model = model_of("mtp")
    with (patch.object(DeferredLinear, "backward", backward(DeferredLinear.backward)),
          patch.object(DeferredGrouped, "backward", backward(DeferredGrouped.backward)),
          patch.object(WeightGradStore, "put", put), patch.object(TorchStage, "backward_weight_one_chunk", weights)):
        pipeline = Pipeline(model.config, schedule, model.state_dict())
        pipeline.step(*batch_of(0, micro_batches), **weights_of("mtp"))
    return counts


MATRICES = ("_proj.weight", "_proj", "_proj_with_mqa.weight")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_product_is_computed_once_a_micro_batch(schedule):
    matrices = sum(name.endswith(MATRICES) for name, _ in model_of("mtp").named_parameters())
    counts = run(count_products, 2, schedule, 6)
    assert sum(count["dX"] for count in counts) == 6 * matrices
    assert sum(count["dW"] for count in counts) == 6 * matrices


def test_a_product_left_out_is_noticed():
    counts = run(count_products, 2, "zbv", 6, forget_last_weights)
    assert all(count["dW"] < count["dX"] for count in counts)


def count_messages(schedule: str, micro_batches: int, like_torch: bool = False) -> tuple[int, int]:
    """The largest number of receive buffers, and of sent tensors, that this rank has at a time in two steps."""
    alive, most = {"received": 0, "sent": 0}, {"received": 0, "sent": 0}

    def watch(kind: str, message: Tensor) -> None:
        def gone() -> None:
            alive[kind] -= 1
        alive[kind] += 1
        most[kind] = max(most[kind], alive[kind])
        weakref.finalize(message, gone)

    def receive(stage: TorchStage, chunk: int, right: Callable) -> list:
        operations = right(stage, chunk)
        for operation in operations:
            watch("received", operation.tensor)
        return operations

    def send(stage: TorchStage, messages: list, right: Callable = TorchStage._send) -> list:
        for message in messages:
            watch("sent", message.tensor)
        return messages if like_torch else right(stage, messages)

    def keep(infos: tuple, device: torch.device, right: Callable = TorchStage._place_buffers) -> None:
        if device.type != "meta":
            right(infos, device)

    forward, backward = TorchStage.get_fwd_recv_ops, TorchStage.get_bwd_recv_ops
    model = model_of("dense")
    with (patch.object(TorchStage, "get_fwd_recv_ops", lambda stage, chunk: receive(stage, chunk, forward)),
          patch.object(TorchStage, "get_bwd_recv_ops", lambda stage, chunk: receive(stage, chunk, backward)),
          patch.object(TorchStage, "_place_buffers", staticmethod(keep if like_torch else TorchStage._place_buffers)),
          patch.object(TorchStage, "_send", send)):
        pipeline = Pipeline(model.config, schedule, model.state_dict())
        for step in range(2):
            pipeline.step(tiny_tokens(micro_batches, 5))
            for weight in pipeline.weights().values():
                weight.grad = None
    return most["received"], most["sent"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_in_memory_do_not_grow_with_the_batch(schedule):
    ranks, stages = 2, chains(schedule, 2).length
    few, many = (run(count_messages, ranks, schedule, micro_batches) for micro_batches in (8, 32))
    assert few == many
    assert all(received <= 2 * ranks + 1 and sent <= 2 * (stages + 1) for received, sent in many)


@pytest.mark.parametrize("schedule, most", [("dualpipev", 64), ("dualpipe", 32)])
def test_torchs_own_messages_do_grow(schedule, most):
    """The test above can fail: one buffer a micro-batch and message stays, on 2 ranks with 32 micro-batches."""
    assert run(count_messages, 2, schedule, 32, True) == [(most, most)] * 2


# ---- one rank, and what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "zbv", "dualpipev"])
def test_one_rank_is_a_pipeline_too(schedule):
    assert differences(one_process("mtp", 4, 1), run(many_ranks, 1, schedule, "mtp", 4, 1)) == set()


def refusal(schedule: str, sequences: int, micro_batch: int, layers: int = 4, steps: int = 1) -> str:
    model = tiny_model(num_hidden_layers=layers)
    try:
        pipeline = Pipeline(model.config, schedule, model.state_dict(), micro_batch)
        for _ in range(steps):
            pipeline.step(tiny_tokens(sequences, 5))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("arguments, sentence", [
    (("gpipe", 8, 1), "schedule is 'gpipe'; it must be one of 1f1b, zb1p, zbv, dualpipev, dualpipe"),
    (("1f1b", 7, 2), "a batch of 7 sequences cannot be cut into micro-batches of 2"),
    (("dualpipe", 2, 1), "it needs at least 4"),
    (("dualpipe", 5, 1), "it needs an even number"),
    (("dualpipev", 2, 1), "at least as many microbatches as stages"),
    (("dualpipev", 8, 1, 3), "3 layers cannot be cut into 4 stages; every stage needs at least one layer"),
    (("zb1p", 4, 1, 4, 2), "the parameters have gradients of an earlier step")])
def test_refusals(arguments, sentence):
    assert all(sentence in got for got in run(refusal, 2, *arguments))
