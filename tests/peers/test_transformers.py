"""The model against transformers' `DeepseekV3ForCausalLM`, and the proof that this comparison sees faults.

Both compute in FP32 from one folder of safetensors, in both directions. Logits are of order 1 (the largest about 4).
Each side lies 2e-6 to 6e-6 from the model in FP64 and as far from the other, so 1e-5 leaves room for rounding and for
little else: every known misreading of the report, tried below as a mutation, moves logits by 1e-3 or more.

The peer builds the two latent norms without `rms_norm_eps` (they keep 1e-6), which agrees with the released config;
`test_latent_norms_ignore_rms_norm_eps_in_the_peer` shows the difference for any other epsilon.
"""

import functools
import random
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import minidsv3.attention
import minidsv3.moe
from minidsv3 import ModelConfig, Transformer
from minidsv3.attention import MLA, LatentCache, make_context
from minidsv3.checkpoint import load_checkpoint, save_checkpoint
from minidsv3.config import YarnScaling
from minidsv3.kernels import Routing, route
from minidsv3.rope import temperature
from tiny import randomise, tiny_config, tiny_tokens

TOLERANCE = 1e-5
LENGTH = 40                       # beyond the original context of 16 that YaRN stretches
GROUPS = [(1, 1), (2, 1), (4, 2), (8, 4)]                               # (n_group, topk_group)
YARN = {
    "off": None,
    "published": dict(factor=4, mscale=1.0, mscale_all_dim=1.0),
    "no mscale_all_dim": dict(factor=4, mscale=1.0, mscale_all_dim=None),
    "two mscales": dict(factor=4, mscale=0.7, mscale_all_dim=1.3),
    "factor unequal to 64 / 16": dict(factor=3, mscale=1.0, mscale_all_dim=1.0),
}


@pytest.fixture(autouse=True)
def quiet_peer():
    """The peer warns about empty shared experts and about factors unequal to the length ratio; both are meant here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        yield


# ---- configurations ---------------------------------------------------------------------------------------------

def draw_config(seed: int) -> ModelConfig:
    """Configuration number `seed`: groups, YaRN and K = 2M or not in turn, one in five dense, all sizes at random."""
    draw = random.Random(seed)
    groups, chosen = GROUPS[seed % 4]
    yarn = list(YARN.values())[seed % 5]
    experts = groups * draw.choice([4, 6] if groups < 8 else [2, 4]) * (2 if groups < 4 else 1)
    top_k = 2 * chosen if seed % 2 else draw.randint(1, experts // groups * chosen)
    layers = draw.randint(2, 3)
    return tiny_config(
        num_hidden_layers=layers, first_k_dense_replace=layers if seed % 9 == 8 else draw.randint(0, layers - 1),
        n_routed_experts=experts, n_group=groups, topk_group=chosen, num_experts_per_tok=top_k,
        n_shared_experts=draw.randint(0, 2), norm_topk_prob=draw.random() < 0.8,
        routed_scaling_factor=draw.choice([1.0, 2.5]), num_nextn_predict_layers=0,
        num_attention_heads=draw.choice([1, 2, 4]), q_lora_rank=draw.choice([16, 24]),
        kv_lora_rank=draw.choice([8, 20]), qk_nope_head_dim=draw.choice([8, 12]),
        qk_rope_head_dim=draw.choice([8, 16]), v_head_dim=draw.choice([8, 16]),
        rope_theta=draw.choice([1e2, 1e4]),   # 100: every pair of channels turns visibly within 40 tokens
        rope_scaling=yarn and YarnScaling(original_max_position_embeddings=16, **yarn))


# ---- the exchange, always through a folder of safetensors --------------------------------------------------------

def peer_of(model: Transformer, folder: Path) -> DeepseekV3ForCausalLM:
    save_checkpoint(model, folder, dtype="fp32")
    return DeepseekV3ForCausalLM.from_pretrained(folder)


def drawn_pair(seed: int, tmp_path: Path) -> tuple[Transformer, DeepseekV3ForCausalLM]:
    model = randomise(Transformer(draw_config(seed)), seed)
    return model, peer_of(model, tmp_path / str(seed))


@torch.no_grad()
def difference(model: Transformer, peer: DeepseekV3ForCausalLM, seed: int = 0) -> float:
    """Largest absolute difference of the logits on two sequences of random tokens."""
    tokens = tiny_tokens(2, LENGTH, seed)
    ours, theirs = model(tokens), peer(tokens).logits
    assert 0.3 < ours.std() < 3, "an absolute tolerance is for logits of order 1"
    return float((ours - theirs).abs().max())


# ---- values, both directions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(60))
def test_same_logits(seed, tmp_path):
    model, peer = drawn_pair(seed, tmp_path)
    assert difference(model, peer) < TOLERANCE
    with torch.no_grad():
        for name, value in peer.state_dict().items():    # nothing of our weights may remain
            value.copy_(value.flip(0) if "kv_a_proj" not in name else value.flip(1))
    peer.save_pretrained(tmp_path / "theirs")
    assert difference(load_checkpoint(tmp_path / "theirs"), peer) < TOLERANCE


@pytest.mark.parametrize("seed", [1, 2, 3, 7, 8])
def test_same_gradients(seed, tmp_path):
    """Of the next-token loss with respect to every parameter, relative to that parameter's largest gradient."""
    model, peer = drawn_pair(seed, tmp_path)
    tokens = tiny_tokens(2, LENGTH)
    ours = model.loss(tokens)
    theirs = peer(tokens, labels=tokens).loss
    assert abs(ours.main.item() - theirs.item()) < TOLERANCE
    ours.main.backward()
    theirs.backward()
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():   # experts lie fused in the memory of both
        scale = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-5 + 1e-4 * scale, name


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 2, 3, 7, 8])
def test_same_decoding_token_by_token(seed, tmp_path):
    """Each with its own latent cache: both remember kv_lora_rank + qk_rope_head_dim values a token and layer."""
    model, peer = drawn_pair(seed, tmp_path)
    tokens = tiny_tokens(2, LENGTH)
    cache, past = LatentCache(model.config, 2, LENGTH), None
    for token in tokens.split(1, dim=1):
        theirs = peer(token, past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        assert (model(token, cache) - theirs.logits).abs().max() < TOLERANCE
    layer = past.layers[0]
    assert layer.keys.numel() + layer.values.numel() == cache.values[0].numel()


@torch.no_grad()
def test_latent_norms_ignore_rms_norm_eps_in_the_peer(tmp_path):
    """A trap of the peer: with another epsilon the two differ until its latent norms get it too."""
    model = randomise(Transformer(tiny_config(rms_norm_eps=1e-4, num_nextn_predict_layers=0)), 0)
    peer = peer_of(model, tmp_path / "hub")
    assert difference(model, peer) > 100 * TOLERANCE
    for layer in peer.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-4
    assert difference(model, peer) < TOLERANCE


def expect_drafts_from_layer_3(peer: DeepseekV3ForCausalLM) -> None:
    """A trap of the peer: it finds the MTP layers by the names its class ignores, and those say 61."""
    peer._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[3-9]\..*"]


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_same_drafts(depths, tmp_path):
    """Logits of every prediction module, through the peer's `MtpModel` (the part behind `generate(use_mtp=True)`)."""
    model = randomise(Transformer(tiny_config(num_nextn_predict_layers=depths)), 0)
    peer = peer_of(model, tmp_path / "hub")
    expect_drafts_from_layer_3(peer)
    tokens = tiny_tokens(1, LENGTH)
    drafting = MtpModel.from_pretrained(peer)
    cache = MtpCache(config=peer.config.get_mtp_config())
    hidden = model.hidden(tokens)
    ours, theirs = model.carried(hidden), peer(tokens, output_hidden_states=True).hidden_states[-1]
    for depth, module in enumerate(model.mtp_modules, start=1):
        ahead = tokens[:, depth:]                      # module k joins position i with token i + k
        ours, theirs = ours[:, :ahead.shape[1]], theirs[:, :ahead.shape[1]]
        h = module(ours, ahead, make_context(model.config, ahead.shape, ours.dtype, ours.device))
        positions = torch.arange(depth, LENGTH)[None]  # the peer counts on, ours restarts: RoPE is relative
        theirs = drafting.forward_layer(depth - 1, theirs, positions, cache, input_ids=ahead)
        ours = module.carried(h)
        assert (module.logits(h) - drafting._project_to_logits(theirs)).abs().max() < TOLERANCE


@torch.no_grad()
def test_peer_speculates_with_our_modules(tmp_path):
    """`generate(use_mtp=True)` (batch 1 only) loads our MTP layer and writes what our model finds likeliest."""
    model = randomise(Transformer(tiny_config()), 0)
    peer = peer_of(model, tmp_path / "hub")
    expect_drafts_from_layer_3(peer)
    prompt = tiny_tokens(1, 8)
    written = peer.generate(prompt, max_new_tokens=16, use_mtp=True, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 24)
    assert torch.equal(model(written)[:, 7:-1].argmax(-1), written[:, 8:])


# ---- mutations: the matrix must see every known misreading --------------------------------------------------------

def restated_route(logits: Tensor, bias: Tensor, *, n_group: int, topk_group: int, top_k: int, normalise: bool,
                   scaling_factor: float, masked: float = float("-inf"), best_of_group: int = 2,
                   biased_weights: bool = False, scale_first: bool = False) -> Routing:
    """The router written once more, with a switch for each known fault; without faults it equals `route`."""
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.unflatten(-1, (n_group, -1))
    kept = groups.topk(best_of_group, -1).values.sum(-1).topk(topk_group, -1).indices
    is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    experts = groups.masked_fill(~is_kept[..., None], masked).flatten(1).topk(top_k, -1).indices
    weights = (choice if biased_weights else scores).gather(1, experts)
    if scale_first:
        weights = weights * scaling_factor
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    if not scale_first:
        weights = weights * scaling_factor
    return Routing(logits, experts, weights, torch.bincount(experts.flatten(), minlength=len(bias)).float())


def misroute(**fault):
    return lambda patch: patch.setattr(minidsv3.moe, "route", functools.partial(restated_route, **fault))


def misscale(scale):
    return lambda patch: patch.setattr(minidsv3.attention, "softmax_scale", scale)


def half_layout_rope(patch):
    def rope(x, cos, sin, nope=0):
        first, second = x[..., nope:].chunk(2, -1)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.cat((x[..., :nope], first * cos - second * sin, second * cos + first * sin), -1)
    patch.setattr(minidsv3.attention, "rope", rope)


def default_epsilon_in_latents(patch):
    build = MLA.__init__

    def init(self, config, layer):
        build(self, config, layer)
        self.q_a_layernorm.eps = self.kv_a_layernorm.eps = 1e-5     # another library's default
    patch.setattr(MLA, "__init__", init)


def normed_rope_key(patch):
    def normed(self, x, context):
        latent, key = compress(self, x, context).tensor_split([self.config.kv_lora_rank], -1)
        return torch.cat((latent, key * key.square().mean(-1, keepdim=True).rsqrt()), -1)
    compress = MLA.compress
    patch.setattr(MLA, "compress", normed)


def up_before_gate(patch):
    patch.setattr(minidsv3.moe, "swiglu", lambda gate, up: torch.nn.functional.silu(up) * gate)


def scaled_shared_expert(patch):
    def forward(self, x):
        return 2.5 * run(self, x)
    run = minidsv3.moe.MLP.forward
    patch.setattr(minidsv3.moe.MLP, "forward", forward)


def amplitude_is_one(patch):
    patch.setattr("minidsv3.rope.rotary_amplitude", lambda yarn: 1.0)


def no_interpolation(patch):
    plain = minidsv3.rope.inverse_frequencies
    patch.setattr("minidsv3.rope.inverse_frequencies", lambda c, device: plain(c.replace(rope_scaling=None), device))


def temperature_of(config: ModelConfig) -> float:
    return temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim)


MUTATIONS = {
    "the weight is the biased score": misroute(biased_weights=True),
    "other groups masked with 0": misroute(masked=0.0),
    "a group scores its best expert alone": misroute(best_of_group=1),
    "scaling factor before normalising": misroute(scale_first=True),
    "rotary pairs as two halves": half_layout_rope,
    "no mscale in the softmax": misscale(lambda c: c.qk_head_dim ** -0.5),
    "mscale once, not squared": misscale(lambda c: c.qk_head_dim ** -0.5 * temperature_of(c)),
    "scale by 1 / sqrt(d_h)": misscale(lambda c: c.qk_nope_head_dim ** -0.5 * temperature_of(c) ** 2),
    "latent norms with an epsilon of their own": default_epsilon_in_latents,
    "the rotary key is normed": normed_rope_key,
    "up before gate": up_before_gate,
    "the shared expert scaled like the routed": scaled_shared_expert,
    "YaRN's frequencies forgotten": no_interpolation,
}
WITNESS = dict(num_nextn_predict_layers=0, rope_scaling=YarnScaling(factor=4, original_max_position_embeddings=16))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_catches(mutation, monkeypatch, tmp_path):
    """One configuration (4 groups of which 2, K = 2M, published YaRN) suffices to see each of these faults."""
    sound = randomise(Transformer(tiny_config(**WITNESS)), 0)
    peer = peer_of(sound, tmp_path / "hub")
    assert difference(sound, peer) < TOLERANCE
    MUTATIONS[mutation](monkeypatch)
    mutant = randomise(Transformer(tiny_config(**WITNESS)), 0)
    assert difference(mutant, peer) > 100 * TOLERANCE


def test_the_comparison_catches_a_missing_amplitude(monkeypatch, tmp_path):
    """Without mscale_all_dim the hub's rule moves the temperature into cos and sin (1.3689 at full size)."""
    config = tiny_config(num_nextn_predict_layers=0, rope_scaling=YarnScaling(
        factor=4, original_max_position_embeddings=16, mscale_all_dim=None))
    model = randomise(Transformer(config), 0)
    peer = peer_of(model, tmp_path / "hub")
    assert difference(model, peer) < TOLERANCE
    amplitude_is_one(monkeypatch)
    assert difference(model, peer) > 100 * TOLERANCE


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_router_without_a_fault_is_the_router(seed):
    """The switches above change the router by their fault alone."""
    logits, bias = torch.randn(50, 16), torch.randn(16)
    options = dict(n_group=4, topk_group=2, top_k=4, normalise=True, scaling_factor=2.5)
    ours, restated = route(logits, bias, **options), restated_route(logits, bias, **options)
    assert torch.equal(ours.load, restated.load)
    assert torch.allclose(ours.weights.sort().values, restated.weights.sort().values)
