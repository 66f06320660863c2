"""Multi-head latent attention (report section 2.1.1, eqs. 1-11) and the latent cache.

Keys and values of all heads are one low-rank product: c = W^DKV x is all that a token leaves behind, besides one
rotary key that the heads share. Two ways to attend with it give the same numbers:

    expanded   k = W^UK c, v = W^UV c for every token, then ordinary attention      (training, long prefill)
    absorbed   (q W^UK) c  and  (p c) W^UV: the weights move to the query's side    (decoding: few queries, long cache)

Rotation would stand between q and W^UK and forbid the second form; that is why position has channels of its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_gradient import packed
from .config import ModelConfig
from .kernels import contract, mla_attention, mla_decode, rope, uses_triton
from .layers import Linear, RMSNorm
from .rope import rope_table, softmax_scale


class LatentCache:
    """What decoding remembers: kv_lora_rank + qk_rope_head_dim values a token and layer (512 + 64 at full size).

    `values` is [layers, batch, length, 576]; MTP modules have layers of their own after the main ones. Each row of the
    batch has its own length: tokens are written after it, entries beyond it are never seen and later overwritten, so
    setting `lengths` to less forgets tokens.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        self.rank = config.kv_lora_rank
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.values = torch.zeros(layers, batch, length, self.rank + config.qk_rope_head_dim,
                                  dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def lengths(self) -> Tensor:
        """Tokens in each row, [batch] int64."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        # `longest` is kept on the host: a pass need not wait for the device
        self._lengths, self.longest = lengths, int(lengths.max())

    @torch.compiler.disable
    def advance(self, tokens: int) -> None:
        """Counts tokens that a pass has written to every row."""
        self._lengths, self.longest = self._lengths + tokens, self.longest + tokens

    @property
    def latent(self) -> Tensor:
        """c^KV after its norm, [layers, batch, length, kv_lora_rank]."""
        return self.values[..., :self.rank]

    @property
    def rope_key(self) -> Tensor:
        """k^R, rotated and not normed, [layers, batch, length, qk_rope_head_dim]."""
        return self.values[..., self.rank:]

    @property
    def capacity(self) -> int:
        return self.values.shape[2]


class Context(NamedTuple):
    """What the layers of one forward pass share."""

    cos: Tensor                     # [B or 1, T, qk_rope_head_dim / 2]
    sin: Tensor
    cache: Tensor | None = None       # [layers, B, capacity, 576], see `LatentCache.values`
    positions: Tensor | None = None   # [B, T], where the new tokens stand in the cache
    visible: Tensor | None = None     # [B, 1, T, S] bool over the S cached tokens that any row can see


VISIBLE_STEP = 128   # cached tokens are read in whole steps, so that a compiled pass meets few different shapes


@torch.compiler.disable   # host arithmetic on lengths
def make_context(config: ModelConfig, shape: torch.Size, dtype: torch.dtype, device: torch.device,
                 cache: LatentCache | None = None, start: Tensor | None = None) -> Context:
    """The context of a pass over tokens of shape [B, T]: causal from position 0, or behind each row's cached tokens.

    `start` [B] overrides where the rows begin in the cache.
    Raises ValueError if the cache is too short or of another batch.
    """
    batch, length = shape
    steps = torch.arange(length, device=device)
    if cache is None:
        return Context(*rope_table(config, steps[None], dtype))
    if cache.lengths.shape[0] != batch:
        raise ValueError(f"the cache holds {cache.lengths.shape[0]} rows and the tokens {batch}; they must agree")
    end = (cache.longest if start is None else int(start.max())) + length
    if end > cache.capacity:
        raise ValueError(f"{end} tokens do not fit into a cache of {cache.capacity}; "
                         "make it longer or the prompt shorter")
    positions = (cache.lengths if start is None else start)[:, None] + steps
    seen = min(-(-end // VISIBLE_STEP) * VISIBLE_STEP, cache.capacity)
    visible = torch.arange(seen, device=device) <= positions[:, None, :, None]
    return Context(*rope_table(config, positions, dtype), cache.values, positions, visible)


def pad_for_flash(value: Tensor, key: Tensor) -> Tensor:
    """Widens the values with zeros to the keys' width where torch's flash attention needs the two equal: on CPUs.

    Without it `scaled_dot_product_attention` falls back to one T x T matrix a head.
    """
    return F.pad(value, (0, max(key.shape[-1] - value.shape[-1], 0))) if value.device.type == "cpu" else value


class MLA(nn.Module):
    """Latent attention of one layer: x [B, T, hidden] -> [B, T, hidden]. `layer` is its place in the cache."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        d, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        self.q_a_proj = Linear(d, config.q_lora_rank)                                 # W^DQ
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)        # W^UQ, W^QR a head
        self.kv_a_proj_with_mqa = Linear(d, rank + rotary)                            # W^DKV, W^KR
        self.kv_a_layernorm = RMSNorm(rank, eps)
        self.kv_b_proj = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, d)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden] (eq. 11); with a cache the tokens are written to it and read it all."""
        query = self.query(x, context)
        cached = self.compress(x, context)
        if context.cache is not None:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            values = context.cache[self.layer]
            values[rows, context.positions] = cached.to(values.dtype)
            cached = values[:, :context.visible.shape[-1]]
        if self.absorbing_is_cheaper(query.shape[1], cached.shape[1]):
            lengths = None if context.positions is None else context.positions[:, -1] + 1
            return self.o_proj(self.absorbed(query, cached, context.visible, lengths).flatten(-2))
        return self.o_proj(self.expanded(query, cached, context.visible).flatten(-2))

    def query(self, x: Tensor, context: Context) -> Tensor:
        """q of all heads [B, T, heads, 128 + 64], its last 64 channels rotated (eqs. 6-9)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.config.num_attention_heads, -1))
        return rope(q, context.cos, context.sin, nope=self.config.qk_nope_head_dim)

    def compress(self, x: Tensor, context: Context) -> Tensor:
        """What the cache holds [B, T, 512 + 64]: the normed latent (eq. 1) and the rotated shared key (eq. 3)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        k_rope = rope(k_rope.unsqueeze(2), context.cos, context.sin).squeeze(2)
        return torch.cat((self.kv_a_layernorm(latent), k_rope), -1)

    def expanded(self, query: Tensor, cached: Tensor, visible: Tensor | None) -> Tensor:
        """Attention with a key and a value a head, from cached [B, S, 576]; returns [B, T, heads, v_head_dim]."""
        c, (latent, k_rope) = self.config, cached.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))
        if visible is None and uses_triton(query, kv):
            return self.packed(query, kv, k_rope)
        k_nope, value = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        key = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, c.num_attention_heads, -1)), -1)
        value = pad_for_flash(value, key)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                             attn_mask=visible, is_causal=visible is None, scale=self.scale)
        return out.transpose(1, 2)[..., :c.v_head_dim]

    def packed(self, query: Tensor, key_value: Tensor, rope_key: Tensor) -> Tensor:
        """Causal attention through the kernel, which takes the batch's rows one behind the other."""
        return mla_attention(*packed(query, key_value, rope_key), self.scale).unflatten(0, query.shape[:2])

    def absorbed(self, query: Tensor, cached: Tensor, visible: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """The same numbers without any key or value a head: all heads read the cache itself.

        `lengths` [B], cached tokens of each row with the new ones, says the same as `visible` to the kernel.
        """
        c = self.config
        w_ukv = self.kv_b_proj.matrix().unflatten(0, (c.num_attention_heads, -1))
        w_uk, w_uv = w_ukv.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_nope, q_rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        query = torch.cat((contract("bthd,hdr->bthr", q_nope, w_uk), q_rope), -1)
        if lengths is not None and uses_triton(query, cached):
            read = mla_decode(query, cached, lengths, c.kv_lora_rank, self.scale)
        else:
            read = self.read(query, cached, visible)
        return contract("bthr,hvr->bthv", read, w_uv)

    def read(self, query: Tensor, cached: Tensor, visible: Tensor | None) -> Tensor:
        """Latents [B, T, heads, 512], averaged as absorbed queries [B, T, heads, 576] ask."""
        if visible is None:
            length = query.shape[1]
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
        logits = contract("bthc,bsc->bths", query, cached) * self.scale
        logits = logits.masked_fill(~visible.transpose(1, 2), float("-inf"))
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(cached.dtype)
        return contract("bths,bsr->bthr", p, cached[..., :self.config.kv_lora_rank])

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Counts multiplications a head: expanding costs keys * r(d_k + d_v) once, absorbing that much for each query,
        and then 2r instead of d_k + d_v for each pair of query and key (the rotary part is the same in both)."""
        c = self.config
        both = c.qk_nope_head_dim + c.v_head_dim
        expanded = keys * c.kv_lora_rank * both + queries * keys * both
        absorbed = queries * c.kv_lora_rank * both + queries * keys * 2 * c.kv_lora_rank
        return absorbed < expanded
