"""The configuration: three presets, the hub's file in both directions, and a sentence for everything that cannot be."""

import json

import pytest
import transformers
from transformers import DeepseekV3Config

from minidsv3 import ConfigError, ModelConfig
from minidsv3.config import YarnScaling
from tiny import TINY, tiny_config

# config.json of deepseek-ai/DeepSeek-V3, as published.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
                 "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280}


# ---- presets ----------------------------------------------------------------------------------------------------

def test_full_is_the_published_file():
    assert ModelConfig.from_hub(PUBLISHED) == ModelConfig.preset("full") == ModelConfig()


def test_full_writes_the_published_values():
    """Everything published that describes the model comes back; the rest describes one upload of it."""
    model = PUBLISHED.keys() - {"auto_map", "quantization_config", "torch_dtype", "transformers_version"}
    written = ModelConfig.preset("full").to_hub()
    assert {key: written[key] for key in model} == {key: PUBLISHED[key] for key in model}


@pytest.mark.parametrize("name, std", [("full", 0.006), ("mini", 0.015875), ("nano", 0.031749)])
def test_initial_spread_keeps_the_gates_spread_at_every_width(name, std):
    """0.006 x sqrt(7168 / hidden): 0.006 is the report's value at full size, and flat at small width."""
    assert ModelConfig.preset(name).init_std == pytest.approx(std, abs=5e-7)
    assert ModelConfig.preset(name, init_std=0.02).init_std == 0.02


def test_any_field_can_be_overridden():
    config = ModelConfig.preset("full", num_hidden_layers=4, init_std=0.1)
    assert (config.num_hidden_layers, config.init_std, config.hidden_size) == (4, 0.1, 7168)
    assert config.replace(num_hidden_layers=61, init_std=None) == ModelConfig.preset("full")


# ---- the hub, and transformers' way of writing it ------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    ModelConfig.preset("full"), ModelConfig.preset("mini"), ModelConfig.preset("nano"),
    tiny_config(mtp_order="hidden_first", mtp_hidden="pre_norm", init_std=0.3, num_nextn_predict_layers=0),
    tiny_config(rope_scaling=YarnScaling(factor=3, original_max_position_embeddings=16, mscale_all_dim=None)),
], ids=["full", "mini", "nano", "ours", "yarn"])
def test_round_trips(config, tmp_path):
    """Through our dict, through JSON, and through what transformers makes of it and saves."""
    assert ModelConfig.from_hub(config.to_hub()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hub()))
    assert ModelConfig.from_hub(tmp_path) == ModelConfig.from_hub(tmp_path / "config.json") == config
    theirs = DeepseekV3Config.from_pretrained(tmp_path)
    assert ModelConfig.from_hub(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_theta" not in saved
    assert ModelConfig.from_hub(tmp_path / "again") == config


def test_what_transformers_writes_on_its_own_is_accepted(tmp_path):
    """Its defaults are not the published file: context 4096, no YaRN, no `scoring_func`, rope inside a dict."""
    sizes = {k: v for k, v in TINY.items() if k != "rope_scaling"} | {"num_key_value_heads": None}
    DeepseekV3Config(**sizes).save_pretrained(tmp_path)
    assert ModelConfig.from_hub(tmp_path) == tiny_config()
    assert ModelConfig.from_hub(DeepseekV3Config().to_dict()) == ModelConfig.preset(
        "full", max_position_embeddings=4096, rope_scaling=None)


def test_a_factor_unequal_to_the_length_ratio_is_kept(tmp_path):
    transformers.logging.set_verbosity_error()    # the peer warns: 163840 / 4096 is not 20
    yarn = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096, "rope_theta": 5e4}
    DeepseekV3Config(max_position_embeddings=163840, rope_parameters=yarn).save_pretrained(tmp_path)
    config = ModelConfig.from_hub(tmp_path)
    assert (config.rope_theta, config.rope_scaling.factor) == (5e4, 20)
    assert config.rope_scaling.mscale is None and config.rope_scaling.mscale_all_dim is None


# ---- refusals ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, sentence", [
    (dict(vocab_size=0), "vocab_size is 0; it must be at least 1"),
    (dict(hidden_size=-8), "hidden_size is -8; it must be at least 1"),
    (dict(hidden_size="32"), "hidden_size is '32'; it must be a whole number"),
    (dict(hidden_size=32.0), "hidden_size is 32.0; it must be a whole number"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True; it must be a whole number"),
    (dict(q_lora_rank=None), "q_lora_rank is None; it must be a whole number"),
    (dict(num_attention_heads=0), "num_attention_heads is 0; it must be at least 1"),
    (dict(qk_rope_head_dim=7), "qk_rope_head_dim is 7; rotary pairs need an even number"),
    (dict(first_k_dense_replace=4), "first_k_dense_replace is 4; the model has only 3 layers"),
    (dict(n_routed_experts=18), "n_group is 4; it must divide n_routed_experts, which is 18"),
    (dict(n_routed_experts=4, num_experts_per_tok=2), "n_group is 4 for n_routed_experts 4: a group holds 1 expert"),
    (dict(topk_group=5), "topk_group is 5; there are only n_group = 4 groups"),
    (dict(num_experts_per_tok=9), "num_experts_per_tok is 9; the 2 chosen groups hold only 8 experts"),
    (dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers is -1; it must be at least 0"),
    (dict(norm_topk_prob="false"), "norm_topk_prob is 'false'; it must be True or False"),
    (dict(rms_norm_eps=0.0), "rms_norm_eps is 0.0; it must be a positive number"),
    (dict(rope_theta=float("nan")), "rope_theta is nan; it must be a positive number"),
    (dict(routed_scaling_factor=-1.0), "routed_scaling_factor is -1.0; it must be a positive number"),
    (dict(init_std=0), "init_std is 0; it must be a positive number"),
    (dict(eos_token_id=61), "eos_token_id 61 must lie below vocab_size 61"),
    (dict(mtp_order="emb"), "mtp_order is 'emb'; it must be 'embedding_first'"),
    (dict(mtp_hidden="norm"), "mtp_hidden is 'norm'; it must be 'post_norm' or 'pre_norm'"),
    (dict(rope_scaling=40), "rope_scaling is 40; it must be None or a YarnScaling"),
])
def test_wrong_fields_are_refused_by_name_and_value(wrong, sentence):
    with pytest.raises(ConfigError) as error:
        tiny_config(**wrong)
    assert sentence in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("wrong, sentence", [
    (dict(factor=0.5), "rope_scaling.factor is 0.5; YaRN stretches, so it must be at least 1"),
    (dict(factor="40"), "rope_scaling.factor is '40'; it must be a number"),
    (dict(original_max_position_embeddings=0), "rope_scaling.original_max_position_embeddings is 0"),
    (dict(beta_fast=1, beta_slow=32), "rope_scaling has beta_fast 1 and beta_slow 32; beta_fast must be the larger"),
    (dict(mscale="1"), "rope_scaling.mscale is '1'; it must be a number"),
])
def test_wrong_yarn_is_refused(wrong, sentence):
    with pytest.raises(ConfigError) as error:
        YarnScaling(**{"factor": 4, "original_max_position_embeddings": 16, **wrong})
    assert sentence in str(error.value)


@pytest.mark.parametrize("wrong, sentence", [
    (dict(scoring_func="softmax"), "scoring_func is 'softmax'; DeepSeek-V3 has 'sigmoid'"),
    (dict(topk_method="greedy"), "topk_method is 'greedy'; DeepSeek-V3 has 'noaux_tc'"),
    (dict(rope_interleave=False), "rope_interleave is False; DeepSeek-V3 has True"),   # silently wrong
    (dict(attention_bias=True), "attention_bias is True; DeepSeek-V3 has False"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
    (dict(moe_layer_freq=2), "moe_layer_freq is 2"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(num_key_value_heads=8), "num_key_value_heads is 8; latent attention expands one key"),
    (dict(q_lora_rank=None), "the config has no q_lora_rank"),                # must not become 1536
    (dict(rope_scaling={"type": "linear", "factor": 2}), "the rotary embedding is of type 'linear'"),
    (dict(rope_scaling={"type": "yarn"}), "rope_scaling has no factor, original_max_position_embeddings"),
    (dict(rope_scaling=PUBLISHED["rope_scaling"] | {"attention_factor": 1.2}), "rope_scaling.attention_factor is 1.2"),
    (dict(rope_scaling=PUBLISHED["rope_scaling"] | {"truncate": False}), "rope_scaling.truncate is False"),
    (dict(rope_scaling=PUBLISHED["rope_scaling"] | {"low_freq_factor": 1}), "rope_scaling has low_freq_factor"),
])
def test_what_would_be_computed_differently_is_refused(wrong, sentence):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hub(PUBLISHED | wrong)
    assert sentence in str(error.value)


def test_a_missing_width_does_not_become_the_671b_models():
    with pytest.raises(ConfigError, match="the config has no hidden_size, vocab_size"):
        ModelConfig.from_hub({k: v for k, v in PUBLISHED.items() if k not in ("hidden_size", "vocab_size")})


@pytest.mark.parametrize("content, sentence", [
    (None, "there is no config.json at"), ("{", "is not valid JSON"), ("\x00\xff", "is not valid JSON"),
    ("[1]", "holds a list")])
def test_files_that_are_no_config_are_refused(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_hub(tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="there is no preset 'micro'; choose one of full, mini, nano"):
        ModelConfig.preset("micro")
    with pytest.raises(ConfigError, match="hidden_dim is no field of ModelConfig; its fields are .*hidden_size"):
        ModelConfig.preset("nano", hidden_dim=3)
