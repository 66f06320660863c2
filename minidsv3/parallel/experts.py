"""Expert parallelism: every rank holds an equal run of the experts and sends tokens to where theirs are (eq. 12).

    y[t] = sum over ranks r of ( sum over t's experts i on r of weight[t, i] * expert_i(x[t]) )
                dispatch ->        computed on rank r                             <- combine

The inner sum is taken on the rank of the experts, so that one row returns to a token from each rank, and with two hops
one from each node.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fp8_ffn import FP8Experts
from ..kernels import Routing, weighted_swiglu
from ..moe import Experts, MoE
from ..recompute import Normed
from .dispatch import Hop, Tokens, Traffic, combine, dispatch, fan_in, fan_out, traffic


class ParallelExperts(Experts):
    """This rank's experts in the place of a layer's `Experts`: same call, same names, weights [experts here, ..].

    `hops` (`flat_hops`, `two_hops`) say who shares the layer, `payload` what travels (see `dispatch`).
    `traffic` tells what this rank's last forward pass sent. All ranks of the hops must run the layer together, each
    with its own tokens, be they none. Raises ValueError if the ranks do not divide the experts, and for experts of
    another class than `whole`.
    """

    whole: type[Experts] = Experts

    def __init__(self, experts: Experts, hops: Sequence[Hop], payload: str | None = None):
        nn.Module.__init__(self)
        if type(experts) is not self.whole:
            raise ValueError(f"the experts are {type(experts).__name__}; {type(self).__name__} takes a rank's part of "
                             f"{self.whole.__name__}")
        self.hops, self.payload, self.traffic = hops, payload, Traffic(0, 0)
        self.experts = len(experts.gate_up_proj)
        mine = own_experts(self.experts, hops)
        self.store = experts.store
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(experts.down_proj.detach()[mine].clone())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] and its `Routing` over all experts -> [N, hidden]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.exchange(x, routing)

    def exchange(self, x: Tensor, routing: Routing) -> Tensor:
        """There, through the experts, and back."""
        tokens = Tokens(x, routing.experts, routing.weights)
        arrived, trail = dispatch(tokens, self.experts, self.hops, self.payload)
        self.traffic = traffic(trail)
        return combine(self.compute(arrived), trail)

    def compute(self, tokens: Tokens) -> Tensor:
        """What this rank's experts make of tokens [R, hidden]: the last fan out is to the experts themselves."""
        rows, order = fan_out(tokens, members=len(self.gate_up_proj), experts=1)
        ends = order.ends[:-1]
        gate_up = self.multiply(rows.x, self.gate_up_proj, ends)
        hidden = weighted_swiglu(gate_up, rows.weights.sum(1))       # one of k is not 0
        return fan_in(self.multiply(hidden, self.down_proj, ends), order)


class ParallelFP8Experts(ParallelExperts, FP8Experts):
    """The same for `FP8Experts`. They quantise tokens, and gradients of their sums, as an FP8 payload does; doing it
    twice rounds nothing more. So with either payload codes are those of one process, and "fp8" sends fewer bytes."""

    whole = FP8Experts

    def __init__(self, experts: FP8Experts, hops: Sequence[Hop], payload: str | None = None):
        super().__init__(experts, hops, payload)
        self.compute_with(experts.gate_up_codes.products)

    def forward(self, x: Tensor | Normed, routing: Routing) -> Tensor:
        """x as it is: autocast's BF16 on the way to FP8 would be one more rounding."""
        return self.exchange(x.value if isinstance(x, Normed) else x, routing)

    def compute(self, tokens: Tokens) -> Tensor:
        """Choices that are served elsewhere are those of one expert more, the last. They stand behind the others of
        their token, and slots that no token needs are left out: few of k experts are on one rank."""
        nowhere = len(self.gate_up_proj)
        chosen, slot = torch.where(tokens.experts < 0, nowhere, tokens.experts).sort(1)
        slots = max(1, int((chosen < nowhere).any(0).sum()))
        chosen, weights = chosen[:, :slots].contiguous(), tokens.weights.gather(1, slot[:, :slots])
        return self.serve(tokens.x, chosen, weights, torch.bincount(chosen.flatten(), minlength=nowhere + 1))


def own_experts(experts: int, hops: Sequence[Hop]) -> slice:
    """Which of `experts` experts this rank holds: ranks count like digits, the first hop's is the highest."""
    ranks, rank = 1, 0
    for hop in hops:
        ranks, rank = ranks * hop.group.size(), rank * hop.group.size() + hop.group.rank()
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be shared out equally among {ranks} ranks; "
                         "expert parallelism must divide the experts")
    return slice(rank * experts // ranks, (rank + 1) * experts // ranks)


def spread_experts(model: nn.Module, hops: Sequence[Hop], payload: str | None = None) -> nn.Module:
    """Puts `ParallelExperts`, of FP8 where the experts are, into every MoE layer of `model`, in place. All ranks must
    hold equal weights before."""
    for module in model.modules():
        if isinstance(module, MoE):
            kind = ParallelFP8Experts if isinstance(module.experts, FP8Experts) else ParallelExperts
            module.experts = kind(module.experts, hops, payload)
    return model
