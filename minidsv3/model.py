"""DeepSeek-V3 in one page: embedding, layers, norm, head, and modules that predict further ahead (report section 2).

Parameter names are the hub's (`model.layers.3.self_attn.q_a_proj.weight`). The same class is nano and the 671 B model.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import LatentCache, make_context
from .balance import sequence_balance_loss
from .block import Block
from .config import ModelConfig
from .kernels import Routing
from .layers import Linear, RMSNorm
from .moe import Record
from .mtp import MTPModule, prediction_loss


class Losses(NamedTuple):
    """What a training step sees. Scalars in nats, each a mean over the batch's tokens, with graph; `load` without."""

    total: Tensor      # main + mtp_weight * mtp + balance_weight * balance
    main: Tensor       # next-token cross-entropy
    mtp: Tensor        # mean over depths of L^k (eq. 25 without lambda); 0 without modules
    balance: Tensor    # sum over MoE layers of the sequence-wise loss (eq. 17 without alpha); 0 if its weight is
    load: Tensor       # [MoE layers, experts] float32: tokens that chose each expert, MTP's layers last


class Transformer(nn.Module):
    """The model. Weights are drawn from N(0, config.init_std) (section 4.2), norms are 1, biases of the routers 0."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        main, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
        blocks = [Block(config, layer) for layer in range(main)]
        modules = [MTPModule(config, layer, embed_tokens, self.lm_head) for layer in range(main, main + ahead)]
        self.model = nn.ModuleDict({
            "embed_tokens": embed_tokens,
            "layers": nn.ModuleList(blocks + modules),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every learnable matrix from N(0, init_std); the norms' gains stay 1."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.init_std)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the main model."""
        return self.model.layers[:self.config.num_hidden_layers]

    @property
    def mtp_modules(self) -> nn.ModuleList:
        """The prediction modules, depth 1 first."""
        return self.model.layers[self.config.num_hidden_layers:]

    def forward(self, tokens: Tensor, cache: LatentCache | None = None, record: list[Routing] | None = None) -> Tensor:
        """Logits [B, T, vocab] for tokens [B, T] int64.

        With a cache the tokens stand behind each row's cached ones and are added to them.
        `record` collects the `Routing` of every MoE layer.
        Raises ValueError for ids outside the vocabulary and for more tokens than positions.
        """
        return self.lm_head(self.model.norm(self.hidden(tokens, cache, record)))

    def hidden(self, tokens: Tensor, cache: LatentCache | None = None, record: list[Routing] | None = None) -> Tensor:
        """The main model's output [B, T, hidden] before its final norm; otherwise as `forward`."""
        self._check(tokens)
        x = self.model.embed_tokens(tokens)
        context = make_context(self.config, tokens.shape, x.dtype, x.device, cache)
        for block in self.blocks:
            x = block(x, context, record)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def carried(self, hidden: Tensor) -> Tensor:
        """h^0, what the first MTP module receives: after the final norm or before it, as the config says."""
        return self.model.norm(hidden) if self.config.mtp_hidden == "post_norm" else hidden

    def loss(self, tokens: Tensor, documents: Tensor | None = None, mtp_weight: float = 0.0,
             balance_weight: float = 0.0) -> Losses:
        """The training objective for sequences of T inputs and their targets (eqs. 17-25).

        tokens [B, T + 1] int64. `documents` [B, T + 1] numbers the packed documents, so that MTP never predicts across
        one's end; the next-token loss and attention do cross, as in the report's pre-training.
        MTP runs if its weight is not 0, and so does the balance loss.
        """
        record = Record()
        hidden = self.hidden(tokens[:, :-1], record=record)
        main, mtp = self.prediction_losses(hidden, tokens, documents, mtp_weight, record)
        balance = self.balance_loss(record, len(tokens)) if balance_weight and record else main.new_zeros(())
        load = torch.zeros(self.config.moe_layers, self.config.n_routed_experts, device=main.device)
        if record:   # rows of MTP modules that did not run stay even: their bias rests
            load[:len(record)] = torch.stack([routing.load for routing in record])
        return Losses(main + mtp_weight * mtp + balance_weight * balance, main, mtp, balance, load)

    def prediction_losses(self, hidden: Tensor, tokens: Tensor, documents: Tensor | None, mtp_weight: float,
                          record: list[Routing]) -> tuple[Tensor, Tensor]:
        """`main` and `mtp` of `Losses`, from the main model's output [B, T, hidden] before its norm."""
        main = prediction_loss(self.model.norm(hidden), self.lm_head.weight, tokens, depth=0)
        return main, self._mtp(hidden, tokens, documents, record) if mtp_weight else main.new_zeros(())

    def balance_loss(self, record: list[Routing], batch: int) -> Tensor:
        """`balance` of `Losses`, over the MoE layers (one or more) that recorded a pass over `batch` sequences."""
        return sum(sequence_balance_loss(routing.logits.unflatten(0, (batch, -1)), self.config.num_experts_per_tok)
                   for routing in record)

    def _mtp(self, hidden: Tensor, tokens: Tensor, documents: Tensor | None, record: list[Routing]) -> Tensor:
        """(1 / D) sum of L^k. Module k runs on the first T - k positions, each joined with the token k further on."""
        carried, losses = self.carried(hidden), []
        length = tokens.shape[1] - 1
        for depth, module in enumerate(self.mtp_modules[:length - 1], start=1):   # deeper ones have no token to predict
            ahead = tokens[:, depth:length]
            context = make_context(self.config, ahead.shape, hidden.dtype, hidden.device)
            h = module(carried[:, :length - depth], ahead, context, record)
            losses.append(prediction_loss(module.shared_head.norm(h), self.lm_head.weight, tokens, depth, documents))
            carried = module.carried(h)
        return sum(losses, start=hidden.new_zeros(())) / max(len(self.mtp_modules), 1)

    @torch.compiler.disable   # reads values on the host
    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens have shape {list(tokens.shape)}; "
                             "they must be [batch, tokens] with at least one token")
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"{tokens.shape[1]} tokens are more than "
                             f"the model's context of {self.config.max_position_embeddings}")
        if tokens.device.type == "cpu":   # elsewhere the check would wait for the device; the embedding refuses there
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token ids run from {low} to {high}; "
                                 f"the vocabulary has ids 0 to {self.config.vocab_size - 1}")
