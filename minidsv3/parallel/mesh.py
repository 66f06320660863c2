"""The mesh: which ranks share what (report sections 3.2 and 3.1: 16-way pipelines, 64-way experts, ZeRO-1 data).

    world = pp x dp,   dp = edp x ep,   ep = node x gpu            full size: 2048 = 16 x 128, 128 = 2 x 64, 64 = 8 x 8

    pp      stages of the pipeline
    dp      everything else sees data: each rank its own sequences
    ep      experts are spread over these ranks of dp ..
    edp     .. and copied on these
    node    ep again, by nodes; gpu: inside a node. Two-hop dispatch goes along these two.

A rank's number counts like a clock, gpu fastest: the ranks that exchange most are neighbours. A step without pipeline:

    mesh = make_mesh(dp=4, ep=2)
    model = parallelise(Transformer(config), mesh)
    losses = model.loss(tokens)                               # this rank's sequences
    (losses.total * share).backward()                         # their share of the whole batch
    clip_gradients(model.parameters(), 1.0, [mesh.dp.get_group()])
    optimizer.step()                                          # AdamW and EMA, built after `parallelise`, see shards
    dist.all_reduce(losses.load, group=mesh.dp.get_group())   # tokens of the whole batch: what biases move by
    update_biases(model, losses.load, gamma)

Sharding is FSDP2 (`fully_shard`): experts are sharded over edp, all else over dp. With `reshard_after_forward=False` a
step's micro-batches keep the gathered parameters, and only masters, reduced gradients and the optimiser's state are
sharded: ZeRO-1, as in the report. **Gradients are summed, never averaged.** An expert's gradient already holds the
tokens of all ep ranks when it is reduced over edp; averages would divide it by edp, everything else by dp = edp x ep,
and leave experts ep times too large. With sums, each loss counts with its share, as in `train.accumulate`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from ..block import Block
from ..moe import Experts
from .dispatch import Hop, flat_hops, two_hops
from .experts import spread_experts


# ---- the mesh ---------------------------------------------------------------------------------------------------

class Mesh(NamedTuple):
    """This rank's line through the whole along each axis, and the whole as (pp, edp, node, gpu)."""

    whole: DeviceMesh
    pp: DeviceMesh
    dp: DeviceMesh
    edp: DeviceMesh
    ep: DeviceMesh


def make_mesh(pp: int = 1, dp: int = 1, ep: int = 1, nodes: int = 1) -> Mesh:
    """The mesh of the whole process group, which exists already.

    `nodes` is how many nodes the ranks of ep stand on; with 1, dispatch is flat. Raises ValueError, with the numbers,
    if the group has not pp x dp ranks, ep does not divide dp, or nodes not ep.
    """
    ranks = dist.get_world_size()
    if min(pp, dp, ep, nodes) < 1:
        raise ValueError(f"pp is {pp}, dp {dp}, ep {ep} and nodes {nodes}; each must be at least 1")
    if pp * dp != ranks:
        raise ValueError(f"pp x dp is {pp} x {dp} = {pp * dp}; there are {ranks} ranks")
    if dp % ep:
        raise ValueError(f"ep is {ep} and dp {dp}; experts are spread over ranks of dp, so ep must divide dp")
    if ep % nodes:
        raise ValueError(f"nodes is {nodes} and ep {ep}; the ranks of ep stand on nodes in equal numbers")
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    whole = init_device_mesh(device, (pp, dp // ep, nodes, ep // nodes), mesh_dim_names=("pp", "edp", "node", "gpu"))
    return Mesh(whole, pp=whole["pp"], dp=whole["edp", "node", "gpu"]._flatten("dp"), edp=whole["edp"],
                ep=whole["node", "gpu"]._flatten("ep"))


def hops_of(mesh: Mesh) -> list[Hop]:
    """How tokens travel on this mesh: in two hops if the ranks of ep stand on several nodes."""
    return two_hops(mesh.whole) if mesh.whole["node"].size() > 1 else flat_hops(mesh.ep.get_group())


@contextmanager
def fake_world(ranks: int, rank: int) -> Iterator[None]:
    """A process group of `ranks` ranks of which only this one, `rank`, exists: for planning, with tensors on meta.

    Collectives return at once and leave their outputs as they are. Raises ValueError inside of another group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    if dist.is_initialized():
        raise ValueError("a process group is there already; a fake one must be the only one")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}; it must be one of 0 to {ranks - 1}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- the model on it --------------------------------------------------------------------------------------------

def parallelise(model: nn.Module, mesh: Mesh, payload: str | None = None) -> nn.Module:
    """Spreads the experts of a `Transformer`, or of a stage of one, over ep and shards it over dp, in place.

    All ranks of dp must hold equal weights; `to_fp8` comes before. Afterwards parameters are DTensors; build optimiser
    and EMA then. Gradients come out summed over dp: weigh each rank's loss with its share of the batch. Raises
    ValueError if ep does not divide the experts, or dp / ep not their rows. `payload`: see `dispatch`.
    """
    if mesh.ep.size() > 1:
        spread_experts(model, hops_of(mesh), payload)
    return shard(model, mesh)


def shard(model: nn.Module, mesh: Mesh) -> nn.Module:
    """`fully_shard` layer by layer. Embedding, head and last norm belong to the whole: MTP modules share the first two.

    What is sharded already stays as it is: with a folded pipeline the last stage's embedding is the first stage's.
    """
    done = {parameter for parameter in model.parameters() if isinstance(parameter, DTensor)}
    shared = shared_parameters(model) | done
    for block in [part for part in model.modules() if isinstance(part, Block)]:
        for experts in [part for part in block.modules() if isinstance(part, Experts)]:
            shard_experts(experts, mesh)
        fully_shard(block, mesh=mesh.dp, reshard_after_forward=False,
                    ignored_params=shared & set(block.parameters()))
    fully_shard(model, mesh=mesh.dp, reshard_after_forward=False, ignored_params=done)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)     # gloo cannot multiply while it reduces
            part.set_gradient_divide_factor(1)
    return model


def shard_experts(experts: Experts, mesh: Mesh) -> None:
    """Cuts every expert's matrices by rows: edp may be larger than the number of experts here, and ep has cut by
    experts already."""
    for name, weight in experts.named_parameters():
        if weight.shape[1] % mesh.edp.size():
            raise ValueError(f"{name} has {weight.shape[1]} rows an expert, and edp = dp / ep is {mesh.edp.size()}; "
                             "experts are cut by rows, so edp must divide that")
    fully_shard(experts, mesh=mesh.edp, reshard_after_forward=False, shard_placement_fn=lambda weight: Shard(1))


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters with more than one name."""
    seen, shared = set(), set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if parameter in seen else seen).add(parameter)
    return shared


# ---- the step ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, groups: Iterable[ProcessGroup | None],
                   counted: Iterable[nn.Parameter] | None = None) -> Tensor:
    """`clip_grad_norm_` over all ranks: scales gradients down to the norm `max_norm`; returns the norm before, float64.

    `groups` are those of dp and pp. Every value of a sharded gradient lies on one rank of dp: an expert's on one of edp
    and ep, all others on one of dp. So squares are simply added up. `counted` leaves out what another pipeline rank
    holds as well (None: nothing).
    """
    parameters = list(parameters)
    own = local_gradients(parameters if counted is None else counted)
    square = nn.utils.get_total_norm(own).double().square().to(next(iter(parameters)).device)
    for group in groups:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    for gradient in local_gradients(parameters):
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1).to(gradient.dtype))
    return norm


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's part of every gradient that there is."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- state ------------------------------------------------------------------------------------------------------

def in_the_whole(tensor: Tensor, mesh: Mesh) -> Tensor:
    """A parameter, or an average or moment of one, as a DTensor of the whole model's shape, without a copy.

    An expert weight's own DTensor spans only edp and knows nothing of the other ranks' experts. Whatever is saved,
    gathered or filled goes through here first.
    """
    if not isinstance(tensor, DTensor) or tensor.device_mesh.mesh_dim_names != mesh.edp.mesh_dim_names:
        return tensor
    axes = mesh.whole["edp", "node", "gpu"]
    return DTensor.from_local(tensor.to_local(), axes, [Shard(1), Shard(0), Shard(0)], run_check=False)
