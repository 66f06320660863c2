"""Multi-token prediction (report section 2.2).

Module k sees t_1..t_{i+k} and predicts t_{i+k+1}, keeping the causal chain.

    h'_i = M_k [RMSNorm(h_i^{k-1}) ; RMSNorm(Emb(t_{i+k}))]  (21)     h^k = TRM_k(h')  (22)     P^k = OutHead(h^k)  (23)

Token i combines with token i + k and is scored on token i + k + 1. The released `eh_proj` reads the embedding first.
"""

import torch
from torch import Tensor, nn

from .attention import Context
from .block import Block
from .config import ModelConfig
from .kernels import Routing, linear_cross_entropy
from .kernels.precision import wide
from .layers import Linear, RMSNorm


class SharedHead(nn.Module):
    """The main model's output head behind a norm of the module's own ("shared" is the head alone)."""

    def __init__(self, config: ModelConfig, head: nn.Linear):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = head


class MTPModule(Block):
    """One prediction module, `model.layers.{num_hidden_layers + k - 1}` on the hub: a whole MoE block behind M_k.

    Embedding and head are the main model's own modules, so `parameters()` has them once and `state_dict()` under both
    names, as checkpoints do.
    """

    def __init__(self, config: ModelConfig, layer: int, embed_tokens: nn.Embedding, head: nn.Linear):
        super().__init__(config, layer)
        self.config = config
        self.embed_tokens = embed_tokens
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)   # M_k
        self.shared_head = SharedHead(config, head)

    def forward(self, hidden: Tensor, tokens: Tensor, context: Context, record: list[Routing] | None = None) -> Tensor:
        """hidden h_i^{k-1} [B, T, hidden] and tokens t_{i+k} [B, T] -> h_i^k [B, T, hidden] before its norm."""
        pair = self.enorm(self.embed_tokens(tokens)), self.hnorm(hidden)
        if self.config.mtp_order == "hidden_first":
            pair = pair[::-1]
        return super().forward(self.eh_proj(torch.cat(pair, -1)), context, record)

    def carried(self, hidden: Tensor) -> Tensor:
        """What the next module receives as h^k: after this module's norm or before it, as the config says."""
        return self.shared_head.norm(hidden) if self.config.mtp_hidden == "post_norm" else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """P^k before softmax, [B, T, vocab] (23)."""
        return self.shared_head.head(self.shared_head.norm(hidden))


def prediction_loss(final: Tensor, head: Tensor, tokens: Tensor, depth: int, documents: Tensor | None = None) -> Tensor:
    """L^k of eq. 24: the summed cross-entropy of T - k predictions, divided by **T** (not by T - k). Depth 0 is the
    main model's next-token loss.

    final [B, T - k, hidden] is the module's output behind `shared_head.norm`, head [vocab, hidden] the output matrix,
    tokens [B, T + 1]; position i is scored on tokens[i + k + 1]. With `documents` [B, T + 1], predictions whose target
    lies in another document than token i drop out of the sum.
    """
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    kept = torch.ones_like(tokens[:, depth + 1:], dtype=torch.bool)
    if documents is not None:
        kept = documents[:, :length - depth] == documents[:, depth + 1:]
    weights = wide(final.new_ones(())) * kept.flatten() / (batch * length)
    return linear_cross_entropy(final.flatten(0, 1), head, tokens[:, depth + 1:].flatten(), weights)
