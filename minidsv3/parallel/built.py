"""The real objects of one GPU, in a process group that exists in name only and with tensors that hold nothing.

Mesh, stages, experts, sharding, optimiser and torch's schedule object are those that train (mesh.py, pipeline.py),
built by the same calls. What they hold is counted here; `memory.py` computes the same from shapes. A GPU of the full
layout on 2048 ranks takes less than half a second.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import BACKWARD_INPUT, FORWARD, FULL_BACKWARD, RECV_B, RECV_F, _Action

from ..cost import TRAINING_BYTES
from ..optim import MOMENTS, AdamW
from .layout import Layout
from .mesh import fake_world, local, make_mesh, parallelise
from .pipeline import Pipeline
from .places import named_biases

KINDS = {4: torch.bfloat16, 8: torch.float32}       # of moments, by the bytes of both


class Built(NamedTuple):
    """What one GPU's objects hold."""

    gpu: int                    # its rank in the world
    pipeline_rank: int
    tensors: dict[str, int]     # values of each parameter and routing bias, by its hub name, experts' in one
    experts: int                # values of the routed experts' tensors
    gathered: int               # bytes of the whole parameters, as FSDP gathers them for a step
    masters: int                # bytes of this GPU's shards of them
    moments: int                # bytes of the optimiser's state beside them, without its step counters
    actions: int                # of torch's schedule, with sends and receives
    waiting: int                # the most tensors at once that have been received and not yet used

    @property
    def parameters(self) -> int:
        return sum(self.tensors.values())


def build(layout: Layout, gpu: int, precision: str = "fp8") -> Built:
    """Builds GPU number `gpu` of the layout's world and counts. Raises ValueError if there is no such GPU, or inside of
    another process group."""
    with fake_world(layout.gpus, gpu):
        mesh = make_mesh(layout.pp, layout.dp, layout.ep, layout.nodes)
        pipeline = Pipeline(layout.config, layout.schedule, precision=precision, device="meta",
                            group=mesh.pp.get_group(), data=mesh.dp.get_group(),
                            wrap=lambda stage: parallelise(stage, mesh))
        weights = pipeline.weights()
        schedule = pipeline.schedule_of(layout.micro_batches, layout.sequence)
        order = schedule.pipeline_order_with_comms[pipeline.rank]
        return Built(
            gpu=gpu, pipeline_rank=pipeline.rank,
            tensors={name: tensor.numel() for name, tensor in (weights | named_biases(pipeline.stages)).items()},
            experts=sum(tensor.numel() for name, tensor in weights.items() if ".mlp.experts." in name),
            gathered=sum(map(size, weights.values())),
            masters=sum(size(local(tensor)) for tensor in weights.values()),
            moments=moment_bytes(weights, KINDS[TRAINING_BYTES[precision].moments]),
            actions=len(order), waiting=most_waiting(order))


def size(tensor: Tensor) -> int:
    """Bytes of all values."""
    return tensor.numel() * tensor.element_size()


def moment_bytes(weights: dict[str, Tensor], moments: torch.dtype) -> int:
    """Bytes of what AdamW keeps for each parameter."""
    optimizer = AdamW(weights.values(), moments=moments)
    return sum(size(local(optimizer.state_of(weight)[name])) for weight in weights.values() for name in MOMENTS)


def most_waiting(order: list[_Action]) -> int:
    """The most tensors that have come from neighbours and wait for the forward or backward that reads them first."""
    came, most = set(), 0
    for action in order:
        for part in action.sub_actions or (action,):
            kind = part.computation_type
            if kind in (RECV_F, RECV_B):
                came.add((kind, part.stage_index, part.microbatch_index))
                most = max(most, len(came))
            elif kind == FORWARD:
                came.discard((RECV_F, part.stage_index, part.microbatch_index))
            elif kind in (FULL_BACKWARD, BACKWARD_INPUT):
                came.discard((RECV_B, part.stage_index, part.microbatch_index))
    return most
