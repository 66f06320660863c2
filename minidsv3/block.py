"""One layer: x + attention(norm(x)), then x + FFN(norm(x)); the FFN is dense in the first layers and MoE after."""

from torch import Tensor, nn

from .attention import MLA, Context
from .config import ModelConfig
from .kernels import Routing
from .layers import RMSNorm
from .moe import MLP, MoE


class Block(nn.Module):
    """Layer number `layer` of the model; numbers from num_hidden_layers on belong to MTP modules."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: Context, record: list[Routing] | None = None) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]; an MoE layer appends its `Routing` to `record`."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        y = self.post_attention_layernorm(x)
        return x + (self.mlp(y, record) if isinstance(self.mlp, MoE) else self.mlp(y))
