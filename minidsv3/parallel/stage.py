"""A stage of a pipeline: consecutive layers of the model, and what stands before its first and behind its last layer.

    first stage    embedding, layers                               tokens -> hidden
    others         layers                                          hidden -> hidden
    last stage     layers, final norm, head, MTP modules           hidden -> the micro-batch's loss

`split` says which layers each stage has. The report cuts 61 layers into 16 stages and does not say where; with the
embedding, the head and the MTP module taken as a layer each there are 64 things to share, four for every stage:

    embedding + 3 layers  |  14 stages of 4 layers  |  2 layers + head + MTP module
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import make_context
from ..block import Block
from ..config import ModelConfig
from ..fp8 import to_fp8
from ..kernels import Routing
from ..layers import Linear, RMSNorm
from ..model import Transformer
from ..moe import Record
from ..mtp import MTPModule


def split(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage, as even as the ends allow: the embedding, the head and every MTP module stand in the
    first or last stage and weigh as much as a layer.

    Raises ValueError if `stages` is not between 1 and the number of layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages; every stage needs at least one layer")
    share = (1 + layers + 1 + config.num_nextn_predict_layers) / stages
    cuts = [min(max(round(share * stage) - 1, stage), layers - (stages - stage))     # - 1: the embedding is no layer
            for stage in range(1, stages)]
    return [range(start, stop) for start, stop in zip([0, *cuts], [*cuts, layers])]


class Objective(NamedTuple):
    """How much each loss counts in this step."""

    mtp_weight: float = 0.0
    balance_weight: float = 0.0
    share: float = 1.0             # of one micro-batch in the batch


class Stage(Transformer):
    """Some of a Transformer's layers, under the same names: the stages' state dicts together are the whole model's.
    What it inherits are the losses; `hidden` and `loss` need all layers.

    `layers` is one of the ranges of `split`. MTP modules read the embedding, so the last stage has it too: `embedding`,
    the first stage's own one, if a rank holds both ("physical sharing", section 3.2.3), else a copy; then both copies
    need the sum of their gradients (`pipeline.py`).
    Weights have no useful values before `take_from`.
    """

    def __init__(self, config: ModelConfig, layers: range, embedding: nn.Embedding | None = None,
                 precision: str = "fp32"):
        nn.Module.__init__(self)             # Transformer's would build every layer
        self.config, self.layers, self.precision = config, layers, precision
        self.first, self.last = layers.start == 0, layers.stop == config.num_hidden_layers
        blocks: dict[str, nn.Module] = {str(layer): Block(config, layer) for layer in layers}
        ends: dict[str, nn.Module] = {}
        if self.first or self._ahead:
            ends["embed_tokens"] = embedding or nn.Embedding(config.vocab_size, config.hidden_size)
        if self.last:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
            ends["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for layer in self._ahead:
            blocks[str(layer)] = MTPModule(config, layer, ends["embed_tokens"], self.lm_head)
        self.model = nn.ModuleDict(ends | {"layers": nn.ModuleDict(blocks)})
        if precision == "fp8":
            to_fp8(self)
        self.begin_step(Objective())

    @property
    def _ahead(self) -> range:
        """The numbers of the MTP modules' layers, if they are here."""
        main = self.config.num_hidden_layers
        return range(main, main + self.config.num_nextn_predict_layers * self.last)

    @property
    def blocks(self) -> list[Block]:
        """This stage's layers of the main model."""
        return [self.model.layers[str(layer)] for layer in self.layers]

    @property
    def mtp_modules(self) -> list[MTPModule]:
        """The prediction modules, all in the last stage."""
        return [self.model.layers[str(layer)] for layer in self._ahead]

    @property
    def load_rows(self) -> slice:
        """Which rows of `Losses.load` [MoE layers, experts] are this stage's; none for dense layers alone."""
        dense = self.config.first_k_dense_replace
        start, stop = (max(layer, dense) - dense for layer in (self.layers.start, self.layers.stop))
        return slice(start, stop + len(self._ahead))

    def begin_step(self, objective: Objective) -> None:
        """Sets how much this step's losses count, and its sums over micro-batches to zero."""
        device = next(self.parameters()).device
        rows = self.load_rows.stop - self.load_rows.start
        self.objective = objective
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)   # main, mtp, balance of `Losses`
        self.load = torch.zeros(rows, self.config.n_routed_experts, device=device)

    def forward(self, x: Tensor, labels: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """One micro-batch: tokens [B, T + 1] int64 in the first stage, else hidden [B, T, hidden]; the last stage
        needs `labels`, which are the tokens again, and may get `documents` (see `Transformer.loss`).

        Returns hidden [B, T, hidden], or in the last stage its share of the batch's loss, a scalar.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision != "fp32"):
            return self._forward(x, labels, documents)

    def _forward(self, x: Tensor, labels: Tensor | None, documents: Tensor | None) -> Tensor:
        record = Record()
        batch, (mtp_weight, balance_weight, share) = len(x), self.objective
        if self.first:
            self._check(x[:, :-1])
            x = self.model.embed_tokens(x[:, :-1])
        context = make_context(self.config, x.shape[:2], x.dtype, x.device)
        for block in self.blocks:
            x = block(x, context, record)
        main = mtp = balance = x.new_zeros(())
        if self.last:
            main, mtp = self.prediction_losses(x, labels, documents, mtp_weight, record)
            x = share * (main + mtp_weight * mtp)
        if balance_weight and record:
            balance = self.balance_loss(record, batch)
            x = AddLoss.apply(x, share * balance_weight * balance)
        self._count(share, torch.stack([main, mtp, balance]), record)
        return x

    @torch.no_grad()
    def _count(self, share: float, losses: Tensor, record: list[Routing]) -> None:
        self.sums += share * losses
        if record:                           # MTP modules that did not run add nothing
            self.load[:len(record)] += torch.stack([routing.load for routing in record])

    def take_from(self, state: Mapping[str, Tensor]) -> None:
        """Takes this stage's values, and its dtype, out of a whole Transformer's state dict.

        Raises ValueError for values that are missing there.
        """
        missing = sorted({"model.norm.weight", *self.state_dict()} - state.keys())
        if missing:
            raise ValueError(f"the state has no {missing[0]} ({len(missing)} values are missing); "
                             f"layers {self.layers.start} to {self.layers.stop - 1} need the state of a whole model")
        self.to(state["model.norm.weight"].dtype)
        self.load_state_dict({name: state[name] for name in self.state_dict()})


class AddLoss(torch.autograd.Function):
    """x unchanged; in its backward pass `loss`, a scalar, gets the gradient 1, as if it had been added to the total.

    The balance loss of a layer arises stages before the total does. Sending it along would be one more message; its
    gradient is 1 whatever the total is, so the backward pass can start it where it arose.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.clone()                     # not a view: torch's runtime detaches a stage's outputs in place

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor]:
        return slope, *ctx.saved_tensors
