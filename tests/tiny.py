"""Models small enough to run hundreds of times, with weights that hide nothing.

Fresh weights would hide faults: gains of 1 hide a forgotten gain, biases of 0 a biased weight, latents of order 1 a
wrong epsilon. `randomise` gives every parameter and bias a value that matters.
"""

import torch

from minidsv3 import ModelConfig, Transformer
from minidsv3.balance import routers

TINY = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
    num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, moe_intermediate_size=16, n_group=4, topk_group=2,
    num_nextn_predict_layers=1, max_position_embeddings=64, rope_scaling=None)


def tiny_config(**overrides) -> ModelConfig:
    """Three layers of width 32, the first dense; 16 experts in 4 groups; every size different from the others."""
    return ModelConfig(**{**TINY, **overrides})


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides) -> Transformer:
    """A randomised tiny model."""
    return randomise(Transformer(tiny_config(**overrides)), seed).to(dtype)


@torch.no_grad()
def randomise(model: Transformer, seed: int) -> Transformer:
    """Matrices that keep activations of order 1, gains in 0.5 to 1.5, biases of both signs, small latents."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            std = 0.5 if "embed" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
            if "q_a_proj" in name:
                parameter *= 0.02                               # latents of rms 0.02: an epsilon of 1e-5 for 1e-6 shows
            elif "kv_a_proj" in name:
                parameter[:model.config.kv_lora_rank] *= 0.02   # the latent's rows alone: the rotary key stays
    for router in routers(model):
        router.e_score_correction_bias.normal_(-0.3, 0.5, generator=generator)
    return model


def tiny_tokens(batch: int, length: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
