"""Chapter 06 on real processes: one MoE layer whose experts are shared out, run by every rank of a process group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..config import ModelConfig
from ..moe import MoE
from ..parallel.dispatch import Hop, flat_hops, two_hops
from ..parallel.experts import ParallelExperts


def small_layer() -> MoE:
    """Nano's MoE layer in float64 with hidden size 16 and no shared expert; the same on every rank."""
    torch.manual_seed(0)
    layer = MoE(ModelConfig.preset("nano", hidden_size=16, moe_intermediate_size=8, n_shared_experts=0)).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return layer


def tokens_of(rank: int) -> Tensor:
    """What sits on a rank, [N, 16] in float64; every rank has another number of tokens."""
    source = torch.Generator().manual_seed(100 + rank)
    return torch.randn(20 + 5 * rank, 16, generator=source, dtype=torch.float64)


def on_a_rank(nodes: int) -> dict[str, dict]:
    """What a rank runs: its tokens through the layer whose experts are shared out, "flat", in "two hops", and in two
    hops with an "FP8" payload.

    Returns for each the output y and the slope dx of the sum of its squares, both [N, 16], how many copies of tokens
    the rank sent, and how many of them to another node. `nodes` must divide the ranks.
    """
    gpus = dist.get_world_size() // nodes
    mesh = init_device_mesh("cpu", (nodes, gpus), mesh_dim_names=("node", "gpu"))
    return {"flat": _through(flat_hops(dist.group.WORLD, gpus)), "two hops": _through(two_hops(mesh)),
            "FP8": _through(two_hops(mesh), payload="fp8")}


def _through(hops: Sequence[Hop], payload: str | None = None) -> dict:
    layer, x = small_layer(), tokens_of(dist.get_rank()).requires_grad_()
    layer.experts = ParallelExperts(layer.experts, hops, payload)
    y = layer(x[None])[0]
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **layer.experts.traffic._asdict()}
