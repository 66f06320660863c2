"""Models small enough to judge an answer in a moment: one whose weights hide nothing, one written by hand.

`Machine` is the model between two passes, as whoever writes a speculative loop sees it: something that reads tokens,
drafts one, and forgets.
"""

import math

import torch

from ..attention import LatentCache, make_context
from ..balance import routers
from ..config import ModelConfig
from ..model import Transformer

TINY = dict(
    vocab_size=29, hidden_size=24, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=20,
    num_attention_heads=4, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    n_routed_experts=12, num_experts_per_tok=4, moe_intermediate_size=7, n_group=4, topk_group=2,
    max_position_embeddings=256, rope_scaling=None)


@torch.no_grad()
def uneven_model(seed: int, **overrides) -> Transformer:
    """A tiny model in float64 with activations of order 1, gains from 0.5 to 1.5 and biases of both signs.

    Fresh weights would hide mistakes: gains of 1 a forgotten norm, biases of 0 a bias in the wrong place.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig(**TINY | overrides)).double()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5, generator=generator)
    for router in routers(model):
        router.e_score_correction_bias.normal_(-0.3, 0.5, generator=generator)
    return model


@torch.no_grad()
def table_model(after: list[int], drafts: list[int], back: int = 1) -> Transformer:
    """A model written by hand, in float64: behind t_i it writes after[t_j] with j = i - back + 1. Its MTP module drafts
    drafts[t] behind token t.

    The lower half of the stream holds t_i, the upper half what attention found `back` - 1 positions earlier: a single
    head whose score is a steep cosine of the distance. So with back > 1 a cache that holds a wrong token, or lacks one,
    changes the text. Good for about 40 tokens, until the cosine comes round.
    Raises ValueError unless `after` is a permutation and `drafts` as long.
    """
    words = len(after)
    if sorted(after) != list(range(words)) or len(drafts) != words:
        raise ValueError(f"after is {after} and drafts {drafts}; after must be a permutation, and drafts as long")
    model = Transformer(ModelConfig(**TINY | dict(
        vocab_size=words, hidden_size=2 * words, num_hidden_layers=1, num_attention_heads=1, q_lora_rank=1,
        kv_lora_rank=words, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=words))).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    attention, one_hot = model.blocks[0].self_attn, torch.eye(words)
    model.model.embed_tokens.weight[:, :words] = one_hot
    attention.q_a_proj.weight[:, :words] = 1
    attention.q_b_proj.weight[1:, 0] = 1e4 * torch.tensor([math.cos(1 - back), math.sin(1 - back)])
    attention.kv_a_proj_with_mqa.weight[:words, :words] = one_hot
    attention.kv_a_proj_with_mqa.weight[words, :words] = (2 * words) ** -0.5
    attention.kv_b_proj.weight[1:] = attention.o_proj.weight[words:] = one_hot
    for token, (following, draft) in enumerate(zip(after, drafts)):
        model.lm_head.weight[following, words + token] = 1
        model.mtp_modules[0].eh_proj.weight[words + after.index(draft), token] = 1
    return model


class Machine:
    """A model with its cache and its MTP module, for one text."""

    def __init__(self, model: Transformer, capacity: int):
        self.model, self.passes = model, 0
        self.cache = LatentCache(model.config, 1, capacity, model.lm_head.weight.dtype)

    def __repr__(self) -> str:
        return f"a machine for {self.model.config.vocab_size} words"

    @torch.no_grad()
    def read(self, tokens: list[int]) -> list[int]:
        """One pass of the main model over `tokens`, which stand behind all that is cached and are cached now.

        Returns for each of them the token that the model writes behind it.
        """
        self.passes += 1
        self._start = self.cache.lengths
        self._hidden = self.model.hidden(torch.tensor([tokens]), self.cache)
        return self.model.lm_head(self.model.model.norm(self._hidden)).argmax(-1)[0].tolist()

    @torch.no_grad()
    def draft(self, following: list[int]) -> int:
        """Joins the tokens read last, from the first on, with those that follow each of them; guesses one further.

        following[0] is the token behind the first token of the last `read`, and so on; the guess is the token behind
        following[-1].
        """
        model, tokens = self.model, torch.tensor([following])
        module, hidden = model.mtp_modules[0], model.carried(self._hidden[:, :len(following)])
        context = make_context(model.config, tokens.shape, hidden.dtype, hidden.device, self.cache, self._start)
        return module.logits(module(hidden, tokens, context))[0, -1].argmax().item()

    def keep(self, tokens: int) -> None:
        """Cuts the cache to its first `tokens` tokens; what stood behind them is forgotten."""
        self.cache.lengths = torch.tensor([tokens])
