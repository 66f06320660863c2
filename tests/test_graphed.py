"""Steps whose gradient is a CUDA graph are `train_step`, bit for bit; on a CPU a `Tape` stands for the graph."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import long_runs
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidsv3 import Transformer, graphed
from minidsv3.data import Batch
from minidsv3.fp8 import to_fp8
from minidsv3.graphed import GraphedStep
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.train import Diverged, Measured, clipped_gradient, evaluate, train_step
from tiny import tiny_model, tiny_tokens

LENGTH, STEPS = 24, 10
# Milestones at these steps: MTP begins at 7, and its weight 0 leaves it out before; biases rest from 9 on.
RECIPE = replace(Recipe.preset("nano", STEPS * 2 * LENGTH), sequence_length=LENGTH, first_mtp_weight=0.0,
                 last_mtp_weight=0.3, cosine_until=9 * 2 * LENGTH)
# On a CPU the definitions of FP8 look up how many rows an expert has, which a tape would keep: here each has all.
EVERY_EXPERT = dict(n_routed_experts=4, n_group=2, topk_group=2, num_experts_per_tok=4)
# Attention's kernel wants powers of two.
WIDE = dict(hidden_size=256, intermediate_size=320, moe_intermediate_size=144, q_lora_rank=192, kv_lora_rank=128,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=512)

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
precisions = pytest.mark.parametrize("precision", ["bf16", "fp8"])


# ---- a graph on a CPU -----------------------------------------------------------------------------------------------

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operators of a recording and their tensors. A replay runs them again on the
    same memory, with the numbers that they had. An operator that asks the device for a value is refused."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        chosen = arguments[1] if operator.name().startswith("aten::index") else ()
        masks = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(chosen))
        if masks or operator.name().removeprefix("aten::").partition(".")[0] in ASKS:
            raise RuntimeError(f"{operator} asks the device for a value, which a graph cannot")
        result = operator(*arguments, **(options or {}))
        self.calls.append((operator, arguments, options or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operator, arguments, options, result in self.calls:
            again = operator(*arguments, **options)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.detach().copy_(new)

    def spoil(self) -> None:
        """Fills what was allocated with NaN: on a GPU a recording computes nothing."""
        there: set[int] = set()
        for _, *given, result in self.calls:
            there |= set(storages(given))
            for address, storage in storages(result).items():
                if address not in there:
                    storage.fill_(255)
            there |= set(storages(result))


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    found = (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor))
    return {storage._cdata: storage for storage in found}


class TapeRecorder:
    """`graphed.Recorder` with tapes."""

    def __init__(self, device: torch.device):
        self.made: list[Tape] = []

    def warm_up(self, function: Callable) -> Any:
        return function()

    def record(self, function: Callable) -> tuple[Any, Callable[[], None]]:
        tape = Tape()
        self.made.append(tape)
        try:
            with tape:
                found = function()
        finally:
            tape.spoil()
        return found, tape.replay


def test_a_tape_replays_on_the_same_memory():
    x, y = torch.tensor([1.0, 2.0]), torch.zeros(2)
    with Tape() as tape:
        z = x * 3
        y += z[1:]
    tape.spoil()
    assert z.isnan().all() and y.tolist() == [6, 6] and x.tolist() == [1, 2]
    x.copy_(torch.tensor([5.0, 7.0]))
    tape.replay()
    assert z.tolist() == [15, 21] and y.tolist() == [27, 27]


@pytest.mark.parametrize("asks", [lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x[x > 0],
                                  lambda x: x.nonzero()])
def test_a_tape_refuses_what_asks_for_a_value(asks):
    with pytest.raises(RuntimeError, match="asks the device for a value"), Tape():
        asks(torch.ones(3))


@pytest.fixture(autouse=True)
def graph(request, monkeypatch) -> None:
    """Tapes where the test is for a CPU. There the model looks at token ids on the host; on a GPU it does not."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(graphed, "Recorder", TapeRecorder)
        monkeypatch.setattr(Transformer, "_check", lambda self, tokens: None)


# ---- steps ----------------------------------------------------------------------------------------------------------

class Training:
    """A model in training by `train_step` or, `graphed`, by `GraphedStep`."""

    def __init__(self, device: str, precision: str, graphed: bool, moments: torch.dtype = torch.bfloat16):
        shape = WIDE if device == "cuda" else EVERY_EXPERT if precision == "fp8" else {}
        model = tiny_model(dtype=torch.float32, **shape).to(device)
        self.model, self.precision = to_fp8(model) if precision == "fp8" else model, precision
        self.optimizer = AdamW(parameter_groups(model, RECIPE.weight_decay), betas=RECIPE.betas, eps=RECIPE.eps,
                               moments=moments)
        arguments = self.model, self.optimizer, RECIPE
        self.take = (GraphedStep(*arguments, precision) if graphed else
                     partial(train_step, *arguments, precision=precision))

    def step(self, number: int) -> Measured:
        return self.take(self.batch(number), number * 2 * LENGTH)

    def batch(self, seed: int) -> Batch:
        """Two sequences with a document that ends in the middle, elsewhere in each batch."""
        documents = (torch.arange(LENGTH + 1) > 5 + seed).long().expand(2, -1)
        return Batch(tiny_tokens(2, LENGTH + 1, seed, self.model.config.vocab_size), documents)

    def held_out(self) -> float:
        return evaluate(self.model, [self.batch(99)], self.precision)

    def state(self) -> dict[str, Tensor]:
        """All that a step changes."""
        moments = self.optimizer.state_dict()["state"]
        moments = {f"{name} of {number}": value for number, state in moments.items() for name, value in state.items()}
        return copy.deepcopy(self.model.state_dict() | moments)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, where every NaN is one."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    return all(map(same, a, b)) if isinstance(a, tuple) else a == b


@devices
@precisions
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=str)
def test_graphed_steps_are_train_step(device, precision, moments):
    """Through warm-up, cosine, MTP's begin and the end of the biases' moves; evaluation sees the new weights."""
    eager, ours = (Training(device, precision, graphed, moments) for graphed in (False, True))
    for number in range(STEPS):
        measured = ours.step(number)
        assert same(eager.step(number), measured), number
        assert (measured.mtp > 0) == (number >= 7) and measured.balance > 0
        assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert same(eager.state(), ours.state()) and eager.held_out() == ours.held_out()
    assert ours.take.recorded is not None and (device == "cuda" or len(ours.take.recorder.made) == 2)


@devices
@precisions
def test_evaluation_between_steps_disturbs_nothing(device, precision):
    """It leaves fresh codes of all weights, which a recording must not take for its own."""
    eager, ours = (Training(device, precision, graphed) for graphed in (False, True))
    for number in range(5):
        assert same((eager.step(number), eager.held_out()), (ours.step(number), ours.held_out())), number


@devices
@precisions
def test_a_loss_that_is_not_finite_changes_nothing(device, precision):
    eager, ours = (Training(device, precision, graphed) for graphed in (False, True))
    for training in (eager, ours):
        for number in range(4):
            training.step(number)
        gain = training.model.model.norm.weight
        whole = gain.detach().clone()
        with torch.no_grad():
            gain[0] = math.nan
        before = training.state()
        with pytest.raises(Diverged, match="loss nan, norm of the gradient nan"):
            training.step(4)
        assert same(before, training.state()) and training.model.lm_head.weight.grad is None
        with torch.no_grad():
            gain.copy_(whole)
        training.step(5)
    assert same(eager.state(), ours.state())


@devices
@precisions
def test_a_recording_that_fails_leaves_the_model_as_it_was(device, precision, monkeypatch):
    def failing(*arguments) -> graphed.Found:
        clipped_gradient(*arguments)
        raise MemoryError("the gradient was the last that fitted")

    eager, ours = (Training(device, precision, graphed) for graphed in (False, True))
    eager.step(0), ours.step(0)
    monkeypatch.setattr(graphed, "clipped_gradient", failing)
    with pytest.raises(MemoryError):
        ours.step(1)
    monkeypatch.undo()
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert eager.held_out() == ours.held_out()
    again = train_step(ours.model, ours.optimizer, RECIPE, ours.batch(1), 2 * LENGTH, precision=precision)
    assert same(eager.step(1), again) and same(eager.state(), ours.state())


@devices
@precisions
def test_a_run_of_graphed_steps_in_two_sittings(device, precision, tmp_path, monkeypatch):
    def losses(graphed: bool, sittings: tuple[float, ...]) -> list[float]:
        for until in sittings:
            run, clock = Training(device, precision, graphed=False), iter(range(100))    # asked twice a step
            monkeypatch.setattr(long_runs, "time", SimpleNamespace(time=lambda: next(clock)))
            taken = long_runs.go_on(tmp_path / str(graphed), run.model, run.optimizer, RECIPE,
                                    [run.batch(number) for number in range(STEPS)], precision, until, graphed)
        return taken.losses

    whole, parts = losses(False, (math.inf,)), losses(True, (2 * 4, math.inf))
    assert whole == parts and len(whole) == STEPS and (tmp_path / "True").exists()


def test_without_a_gpu_there_is_no_graph():
    with pytest.raises(ValueError, match="the model is on cpu; a CUDA graph needs it on a GPU: take train_step"):
        Training("cpu", "bf16", graphed=True)
