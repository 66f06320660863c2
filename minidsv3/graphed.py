"""A training step that Python does not slow down: forward pass, backward pass and clipping as one CUDA graph.

    train_step     Python launches each of the step's thousands of kernels        as long as Python takes
    GraphedStep    one call launches them all, as they were recorded              as long as the kernels take

A recorded kernel reads and writes the same memory at every replay, and its numbers stay those of the recording. So the
batch is copied to where the graph reads it; weights and routing biases are where they were; and what the graph leaves,
gradients, losses and load, lies where the recording put it.

The update is not in the graph. A loss that is not finite must be seen before weights move. And the learning rate, which
changes from step to step, would have to be a tensor, which torch's fused AdamW takes on a GPU in FP32 alone: no longer
the number of `train_step`. What stays with Python is a few launches for each parameter.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .data import Batch
from .model import Losses, Transformer
from .optim import AdamW, Recipe
from .train import Measured, clipped_gradient, update

Found = tuple[Losses, Tensor]      # losses of the batch, and the norm of its gradient before clipping


class GraphedStep:
    """`train_step` on a GPU, bit for bit, for a model whose parameters and buffers stay the same tensors
    (`load_state_dict` keeps them).

    A graph holds for one shape of batches and one pair of weights of MTP and balance: the first step of such a kind is
    taken as ever, which compiles kernels, the second is recorded, and all after it replay. Where kinds alternate,
    nothing is gained.

    Raises ValueError if the model is not on a GPU. A model that asks the GPU for a value in its step, as one with
    gradients in E5M2 does (`fp8_ablations.py`), cannot be recorded: CUDA refuses it with a RuntimeError.
    """

    def __init__(self, model: Transformer, optimizer: AdamW, recipe: Recipe, precision: str = "fp32"):
        self.model, self.optimizer, self.recipe, self.precision = model, optimizer, recipe, precision
        self.recorder = Recorder(model.lm_head.weight.device)
        self.kind: tuple | None = None
        self.recorded: Recorded | None = None

    def __call__(self, batch: Batch, seen: int) -> Measured:
        """Takes one step on `batch` after `seen` tokens. Raises `Diverged` as `train_step` does."""
        kind = batch.tokens.shape, self.recipe.mtp_weight(seen), self.recipe.balance_weight(seen)
        if kind != self.kind:
            self.kind, self.recorded = kind, None
            found = self.recorder.warm_up(lambda: self.gradient(batch, seen))
        else:
            self.recorded = self.recorded or Recorded(self, batch, seen)
            found = self.recorded.replay(batch)
        return update(self.model, self.optimizer, self.recipe, seen, *found)

    def gradient(self, batch: Batch, seen: int) -> Found:
        """What is recorded. Nothing in it depends on `seen` but the two weights."""
        return clipped_gradient(self.model, self.recipe, batch, seen, len(batch.tokens), self.precision)


class Recorded:
    """The gradient of a step as a graph, with the tensors that it reads and writes."""

    def __init__(self, step: GraphedStep, batch: Batch, seen: int):
        device = step.model.lm_head.weight.device
        self.parameters = list(step.model.parameters())
        self.batch = Batch(*(rows.to(device, copy=True) for rows in batch))
        # Codes of weights (`fp8_linear.WeightCodes`) that are there already would be missing in the graph, and those
        # made in it are garbage before a replay: weights count as changed before the recording and after it.
        increment_version(self.parameters)
        try:
            self.found, self.run = step.recorder.record(lambda: step.gradient(self.batch, seen))
        finally:
            increment_version(self.parameters)
            self.gradients = [parameter.grad for parameter in self.parameters]
            step.optimizer.zero_grad()

    def replay(self, batch: Batch) -> Found:
        """Gives the parameters the gradient for `batch`; returns losses and norm, which the next replay overwrites."""
        for ours, rows in zip(self.batch, batch):
            ours.copy_(rows)
        self.run()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.found


class Recorder:
    """Runs functions on a stream of its own, and records them there. Raises ValueError for a device that is no GPU."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"the model is on {device}; a CUDA graph needs it on a GPU: take train_step elsewhere")
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Found]) -> Found:
        """Runs the function as ever."""
        usual = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            found = function()
        usual.wait_stream(self.stream)
        return found

    def record(self, function: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        """What the function returns, not computed yet, and what computes it as often as it is called."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            found = function()
        return found, graph.replay
