"""Training a model that is cut into stages over several ranks (report section 3.2.1).

    pipeline = Pipeline(config, "dualpipe", state)            # on every rank; state of a whole Transformer
    losses = pipeline.step(tokens, documents, mtp_weight=0.3, balance_weight=1e-4)
    norm = pipeline.clip(1.0)
    optimizer.step()                                          # over pipeline.weights()
    pipeline.update_biases(losses.load, gamma=1e-3)

gives losses, gradients, norm and biases of one process that computes the whole batch. What makes it so:

- Each micro-batch's loss is weighed with its share of the batch, and gradients are added, never scaled.
- Each backward pass computes input gradients; weight gradients wait in a store of the stage's
  (`weight_gradients.py`) until the order says W, or follow at once where it says B.
- With DualPipe each stage is on two ranks, one for each direction. Half of the micro-batches go each way, tokens
  enter where the other direction's labels are needed, and both copies' gradients are the sum of both.
- MTP reads the embedding at the last stage. Where that is on the first stage's rank, they share it; else its two
  copies' gradients are summed as well.
- Loads of experts are counted by each stage, gathered over all ranks, and move all biases alike.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining.schedules import (ScheduleDualPipeV, ScheduleZBVZeroBubble,
                                                    _PipelineScheduleRuntime)

from ..balance import update_biases
from ..config import ModelConfig
from ..model import Losses
from ..weight_gradients import WeightGradStore, defer_weight_gradients
from .mesh import clip_gradients, local
from .places import Place, build_stages, chains, copied_weights, named_weights, places
from .runtime import ScheduleOrders
from .schedule import ORDERS
from .stage import Objective, Stage
from .torch_stage import TorchStage

# Folded chains run in torch's own orders; its DualPipeV is action for action that of schedule.py.
OF_TORCH = {"zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}
EMBEDDING = "model.embed_tokens.weight"


class Pipeline:
    """This rank's part of a model, and how a batch runs through all parts.

    `state` is a whole Transformer's state dict, from which each rank takes its part; without one the weights have no
    useful values. `micro_batch` counts sequences. `precision` is as in `TrainConfig`.
    `group` has the pipeline's ranks in order (None: all ranks). `data` has the ranks that hold the same stages and
    train on other sequences of the same batch (None: nobody else). Then `wrap`, which changes a stage before torch
    sees it, must shard it over them, and sum gradients: see `mesh.parallelise`.
    Raises ValueError for an unknown schedule, more stages than layers, and a state of another model.
    """

    def __init__(self, config: ModelConfig, schedule: str, state: Mapping[str, Tensor] | None = None,
                 micro_batch: int = 1, precision: str = "fp32", device: torch.device | str = "cpu",
                 group: ProcessGroup | None = None, data: ProcessGroup | None = None,
                 wrap: Callable[[Stage], object] = lambda stage: None):
        self.config, self.schedule, self.micro_batch = config, schedule, micro_batch
        self.device, self.group = torch.device(device), group
        self.groups = [group] if data is None else [group, data]      # over both: everybody
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.replicas = 1 if data is None else dist.get_world_size(data)
        self.places = places(schedule, self.ranks, self.rank)
        self.copied = copied_weights(config, schedule, self.ranks)
        with self.device:
            self.stages = build_stages(config, schedule, self.ranks, self.rank, precision)
        for stage in self.stages if state is not None else ():
            stage.take_from(state)
        for stage in sorted(self.stages, key=lambda stage: stage.layers.start):   # a shared embedding is the first's
            wrap(stage)
        self.stores = [defer_weight_gradients(stage) for stage in self.stages]
        self._built: dict[tuple[int, int], _PipelineScheduleRuntime] = {}

    def weights(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name, each once."""
        return named_weights(self.stages)

    def own_weights(self) -> dict[str, nn.Parameter]:
        """Without those that a lower pipeline rank holds too: over all ranks, each of the model's once."""
        return {name: parameter for name, parameter in self.weights().items()
                if self.copied.get(name, (self.rank,))[0] == self.rank}

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor, documents: Tensor | None = None, mtp_weight: float = 0.0,
             balance_weight: float = 0.0) -> Losses:
        """Gives the parameters the gradient of the batch's loss; returns its losses, without graph, on every rank.

        tokens and `documents` [B, T + 1] int64 as in `Transformer.loss`: this pipeline's part of the batch, the same on
        all its ranks.
        Raises ValueError if B is no multiple of `micro_batch`, if the schedule cannot run that many micro-batches, and
        if there are gradients already: those of copies would be summed twice.
        """
        micro_batches, rest = divmod(len(tokens), self.micro_batch)
        if rest or not micro_batches:
            raise ValueError(f"a batch of {len(tokens)} sequences cannot be cut into micro-batches of "
                             f"{self.micro_batch}; it must be a multiple of that")
        if any(parameter.grad is not None for parameter in self.weights().values()):
            raise ValueError("the parameters have gradients of an earlier step; set them to None first, as "
                             "optimizer.zero_grad() does")
        objective = Objective(mtp_weight, balance_weight, 1 / (micro_batches * self.replicas))
        for stage in self.stages:
            stage.begin_step(objective)
        arguments, keywords = self._feed(tokens.to(self.device), documents)
        schedule = self.schedule_of(micro_batches, tokens.shape[1] - 1)
        schedule.step(*arguments, return_outputs=False, **keywords)
        for stage in schedule._stages:
            stage.wait_for_messages()
        self._sum_copies()
        return self._gather(objective)

    def _feed(self, tokens: Tensor, documents: Tensor | None) -> tuple[tuple, dict[str, Tensor]]:
        """What this rank's stages need of the batch: tokens where its chains begin, labels where they end."""
        arguments, keywords = (), {}
        for stage, place in zip(self.stages, self.places):
            if stage.first:
                arguments = (self._half(tokens, place),)
            if stage.last:
                labels = self._half(tokens, place)
                keywords = {"labels": labels, "target": labels}       # for the stage, and what torch gives `computed`
                if documents is not None:
                    keywords["documents"] = self._half(documents.to(self.device), place)
        return arguments, keywords

    def _half(self, sequences: Tensor, place: Place) -> Tensor:
        """The sequences that go in a place's direction: with two directions, the first or the second half."""
        if self.schedule != "dualpipe":
            return sequences
        return sequences.chunk(2)[place.direction == "b"]

    def schedule_of(self, micro_batches: int, length: int) -> _PipelineScheduleRuntime:
        """torch's object that runs a batch; made anew when the batch's shape changes."""
        if (micro_batches, length) not in self._built:
            self._built = {(micro_batches, length): self._build(micro_batches, length)}
        return self._built[micro_batches, length]

    def _build(self, micro_batches: int, length: int) -> _PipelineScheduleRuntime:
        form = chains(self.schedule, self.ranks)
        stages = [TorchStage(stage, place, form, self.micro_batch, length, self.device, self.group, store.take)
                  for stage, place, store in zip(self.stages, self.places, self.stores)]
        if self.schedule in OF_TORCH:
            return OF_TORCH[self.schedule](stages, micro_batches, computed, scale_grads=False)
        orders = ORDERS[self.schedule](self.ranks, micro_batches)
        return ScheduleOrders(stages, form, micro_batches // form.count, computed, orders)

    def _sum_copies(self) -> None:
        """Each weight that two ranks hold gets the sum of both gradients, so that both copies stay equal.

        The two are mirrored ranks, whatever is copied: DualPipe's stages, or the embedding on the first and last rank.
        """
        partner = self.ranks - 1 - self.rank
        for name, parameter in sorted(self.weights().items()):        # both partners in the same order
            if name == EMBEDDING and name in self.copied and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)      # MTP's copy in a step without MTP
            if name in self.copied and parameter.grad is not None:
                mine = local(parameter.grad)
                theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
                for work in dist.batch_isend_irecv([
                        dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=partner),
                        dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=partner)]):
                    work.wait()
                mine += theirs

    @torch.no_grad()
    def _gather(self, objective: Objective) -> Losses:
        """The stages' sums over all ranks."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        load = torch.zeros(self.config.moe_layers, self.config.n_routed_experts, device=self.device)
        for stage in self.stages:
            sums += stage.sums
            load[stage.load_rows] += stage.load
        for values in (sums, load):
            for group in self.groups:
                dist.all_reduce(values, group=group)
        main, mtp, balance = sums
        total = main + objective.mtp_weight * mtp + objective.balance_weight * balance
        return Losses(total, main, mtp, balance, load)

    # ---- after the step -----------------------------------------------------------------------------------------

    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients down to a norm of `max_norm` over the whole model; returns the norm before."""
        return clip_gradients(self.weights().values(), max_norm, self.groups, counted=self.own_weights().values())

    def update_biases(self, load: Tensor, gamma: float) -> None:
        """Moves the biases of this rank's routers (see `balance.update_biases`); `load` is that of `Losses`."""
        for stage in self.stages:
            update_biases(stage, load[stage.load_rows], gamma)


def computed(loss: Tensor, labels: Tensor) -> Tensor:
    """The loss, for torch: the last stage has computed it, so that a sharded stage has used all its weights."""
    return loss
