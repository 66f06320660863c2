"""DeepSeekMoE: many small experts, a few chosen for each token, one shared by all (report section 2.1.2, eq. 12).

No token is ever dropped. Tokens are sorted by expert, each expert multiplies its own rows (a grouped matmul), and the
results return to their tokens with the router's weights. `Experts.loop` says the same one expert at a time.
"""

from collections import UserList

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .kernels import Routing, contract, linear, permute, route, sort_by_expert, swiglu, unpermute, weighted_swiglu
from .layers import Linear
from .weight_gradients import Deferrable, DeferredGrouped, grouped_mm, has_grouped_mm


class MLP(nn.Module):
    """A SwiGLU FFN: the dense layers' and, with width n_shared * moe_intermediate_size, the shared expert's."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Affinities and choice, in at least FP32 whatever the model's dtype.

    With bf16 logits 13 % of the tokens choose other experts.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))   # rows e_i
        # b_i: moved by balance.py
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Routing:
        """x [N, hidden] -> `Routing`."""
        c = self.config
        with torch.autocast(self.weight.device.type, enabled=False):
            return route(self.logits(x), self.e_score_correction_bias, n_group=c.n_group, topk_group=c.topk_group,
                         top_k=c.num_experts_per_tok, normalise=c.norm_topk_prob,
                         scaling_factor=c.routed_scaling_factor)

    def logits(self, x: Tensor) -> Tensor:
        """u . e_i of all experts, [N, experts], in at least FP32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return linear(x.to(wide), self.weight.to(wide))

    def _apply(self, fn, recurse=True):
        """`model.to(bfloat16)` leaves the bias in FP32: steps of 0.001 would vanish beside a bias of 2."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if torch.promote_types(moved.dtype, torch.float32) != moved.dtype:
            self.e_score_correction_bias = exact.to(moved.device)
        return self


class Experts(Deferrable):
    """All routed experts of a layer in two tensors, saved under the hub's names one by one (checkpoint.py)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))   # gate's rows, then up's
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] -> sum over the chosen experts of weight * expert(x), [N, hidden]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if routing.experts.numel() <= routing.load.numel():
            return self.gathered(x, routing)
        return self.grouped(x, routing) if has_grouped_mm(x) or self.store is not None else self.loop(x, routing)

    def loop(self, x: Tensor, routing: Routing) -> Tensor:
        """The definition: one expert at a time takes the tokens that chose it."""
        out = torch.zeros_like(x)
        for expert in range(self.gate_up_proj.shape[0]):
            token, slot = (routing.experts == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.gate_up_proj[expert].to(x.dtype)).chunk(2, -1)
            y = F.linear(swiglu(gate, up), self.down_proj[expert].to(x.dtype))
            out = out.index_add(0, token, y * routing.weights[token, slot, None].to(x.dtype))
        return out

    def gathered(self, x: Tensor, routing: Routing) -> Tensor:
        """For few tokens (decoding): each token brings copies of its own experts, and idle experts are not visited.

        Compiled, nothing is copied: the products read the chosen rows where they are.
        """
        gate_up, down = (weight.index_select(0, routing.experts.flatten()).unflatten(0, routing.experts.shape)
                         for weight in (self.gate_up_proj, self.down_proj))                  # [N, k, out, in]
        gate, up = contract("nd,nkwd->nkw", x, gate_up.to(x.dtype)).chunk(2, -1)
        weighted = swiglu(gate, up) * routing.weights.to(x.dtype).unsqueeze(-1)
        return contract("nkw,nkdw->nkd", weighted, down.to(x.dtype)).sum(1)

    def grouped(self, x: Tensor, routing: Routing) -> Tensor:
        """The same with one grouped matmul over rows sorted by expert."""
        order = sort_by_expert(routing.experts, routing.load)
        rows = permute(x, order)
        gate_up = self.multiply(rows, self.gate_up_proj, order.ends)
        hidden = weighted_swiglu(gate_up, routing.weights.flatten().index_select(0, order.sources))
        return unpermute(self.multiply(hidden, self.down_proj, order.ends), order)

    def multiply(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Each expert's rows [R, in] times its own matrix of weight [experts, out, in] -> [R, out]."""
        if self.store is not None:
            return DeferredGrouped.apply(rows, weight, ends, self.store)
        return grouped_mm(rows, weight.to(rows.dtype).mT, ends)


class Record(UserList[Routing]):
    """The routings of a pass, by layer. No `list`: FSDP copies lists among a module's arguments, and what a layer
    appends to the copy is lost."""


class MoE(nn.Module):
    """Router, routed experts and the shared expert, which no gate weighs and no factor scales."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, record: list[Routing] | None = None) -> Tensor:
        """x [B, T, hidden] -> the same shape; appends this layer's `Routing` to `record` if a list is given."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat)
        if record is not None:
            record.append(routing)
        out = self.experts(flat, routing).view(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)
