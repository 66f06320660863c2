"""Counts against the published integers, against the model itself, and with every field moved."""

import itertools
import math
import random

import pytest
import torch

from minidsv3 import cost
from minidsv3.config import ModelConfig

FULL = ModelConfig.preset("full")


def test_published_model_by_part():
    parts = cost.parameters(FULL)
    assert parts.embedding == parts.head == 926_679_040
    assert parts.attention == 61 * 187_107_328
    assert parts.dense == 3 * 396_361_728
    assert parts.shared == 58 * 44_040_192
    assert parts.routed == 58 * 256 * 44_040_192
    assert parts.router == 58 * 1_835_008
    assert parts.biases == 58 * 256
    assert parts.norms == (2 * 61 + 1) * 7168


def test_published_totals():
    parts = cost.parameters(FULL)
    assert parts.main == 671_026_419_200
    assert parts.learned == 671_026_404_352
    assert parts.mtp == 11_610_068_224
    assert parts.mtp_stored == 13_463_426_304


def test_published_checkpoint():
    checkpoint = cost.stored(FULL)
    assert checkpoint == cost.Stored(weights=684_489_845_504, scales=41_540_496, tensors=91_991,
                                     bytes=688_574_839_360)
    assert checkpoint.values == 684_531_386_000


def test_active_parameters_under_each_rule():
    active = cost.active_parameters(FULL)
    assert active.learned == 37_552_282_624
    assert active.multiplied == 36_625_603_584
    assert active.body == 35_698_924_544
    assert active.mtp == 688_100_352
    assert active.mtp_stored == 2_541_458_432


@pytest.mark.parametrize("preset, main, total", [
    ("nano", 12_149_008, 14_137_024), ("mini", 1_242_794_688, 1_350_672_896)])
def test_small_presets(preset, main, total):
    parts = cost.parameters(ModelConfig.preset(preset))
    assert (parts.main, parts.total) == (main, total)


@pytest.mark.parametrize("wrong, integer", [
    (dict(kv_lora_rank=576), "attention"), (dict(qk_rope_head_dim=128), "attention"),
    (dict(v_head_dim=64), "attention"), (dict(n_shared_experts=2), "shared"),
    (dict(first_k_dense_replace=2), "routed"), (dict(intermediate_size=18304), "dense"),
    (dict(vocab_size=128_000), "head"), (dict(num_experts_per_tok=9), "routed")])
def test_every_field_reaches_its_part(wrong, integer):
    """Mutation: a field that a formula ignored would leave its part as it is."""
    count = cost.active_parameters if "num_experts_per_tok" in wrong else cost.parameters
    assert getattr(count(FULL.replace(**wrong)), integer) != getattr(count(FULL), integer)


def random_config(seed: int) -> ModelConfig:
    """Sizes that share no factors, so that no two formulas agree by accident."""
    pick = random.Random(seed)
    groups = pick.choice([1, 2, 4])
    size = pick.randrange
    return ModelConfig(
        vocab_size=size(50, 90), hidden_size=size(20, 50), num_hidden_layers=size(2, 5),
        first_k_dense_replace=size(0, 3), intermediate_size=size(20, 70), moe_intermediate_size=size(5, 40),
        num_attention_heads=size(1, 6), q_lora_rank=size(5, 30), kv_lora_rank=size(5, 30),
        qk_nope_head_dim=size(3, 20), qk_rope_head_dim=2 * size(1, 8), v_head_dim=size(3, 20),
        n_routed_experts=groups * size(2, 5), num_experts_per_tok=2, n_shared_experts=size(0, 3), n_group=groups,
        topk_group=1, num_nextn_predict_layers=size(0, 3), max_position_embeddings=64, rope_scaling=None)


@pytest.mark.parametrize("seed", range(20))
def test_counts_equal_the_model(seed):
    """Each part, MTP's own values and its stored copies, on the meta device: nothing is allocated."""
    from minidsv3.model import Transformer

    config = random_config(seed)
    with torch.device("meta"):
        model = Transformer(config)
    counted = cost.parameters(config)
    learned = sum(parameter.numel() for parameter in model.parameters())
    biases = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert counted.total == learned + sum(bias.numel() for bias in biases.values())
    assert counted.main + counted.mtp_stored == sum(value.numel() for value in model.state_dict().values())
    for part, names in {"embedding": "embed_tokens", "attention": "self_attn", "router": "mlp.gate.weight",
                        "shared": "shared_experts", "routed": "mlp.experts", "head": "lm_head",
                        "biases": "e_score_correction_bias"}.items():
        of_main = sum(value.numel() for name, value in model.state_dict().items()
                      if names in name and not is_mtp(name, config.num_hidden_layers))
        assert getattr(counted, part) == of_main, part


def is_mtp(name: str, layers: int) -> bool:
    return name.startswith("model.layers.") and int(name.split(".")[2]) >= layers


def test_full_size_on_the_meta_device():
    from minidsv3.model import Transformer

    with torch.device("meta"):
        model = Transformer(FULL)
    main = sum(value.numel() for name, value in model.state_dict().items() if not is_mtp(name, 61))
    assert main == cost.parameters(FULL).main == 671_026_419_200


def test_latent_cache():
    assert cost.kv_cache_bytes(FULL) == 70_272
    assert cost.kv_cache_bytes(FULL, tokens=131_072) == 131_072 * 61 * (512 + 64) * 2


def test_training_flops_of_a_dense_toy_by_hand():
    """One layer whose products can be listed: 6 FLOPs for each weight that is multiplied, 6 for each attended pair."""
    toy = ModelConfig.preset("nano", num_hidden_layers=1, num_nextn_predict_layers=0)
    flops = cost.training_flops(toy, context=3)
    matrices = [(96, 256), (8 * 48, 96), (80, 256), (8 * 64, 64), (256, 256),
                (768, 256), (768, 256), (256, 768), (4096, 256)]
    gains = 96 + 64 + 3 * 256
    assert flops.weights == 6 * (sum(rows * columns for rows, columns in matrices) + gains)
    pairs = 1 + 2 + 3                                   # keys seen by the three positions together
    assert 3 * flops.attention == 6 * pairs * 8 * (48 + 32)
    assert flops.mtp == 0


def test_full_size_training_flops():
    flops = cost.training_flops(FULL)
    assert round(flops.main / 1e9) == 250
    assert flops.weights == 6 * 36_625_603_584
    assert flops.total - flops.main == flops.mtp > 6 * (688_100_352 + 926_679_040)


def test_hours_and_dollars_of_the_report():
    assert cost.REPORT_HOURS.total == 2_788_000
    assert cost.dollars(cost.REPORT_HOURS.total) == 5_576_000
    flops = cost.training_flops(FULL).main
    assert cost.utilisation(flops, 14.8e12, cost.REPORT_HOURS.pre_training) == pytest.approx(0.3908, abs=5e-5)
    exact = cost.utilisation(flops, 14.8e12, cost.REPORT_HOURS.pre_training)
    assert cost.hours(flops, 14.8e12, mfu=exact) == pytest.approx(2_664_000, rel=1e-12)


def test_training_bytes():
    assert {name: each.total for name, each in cost.TRAINING_BYTES.items()} == {"fp32": 16, "bf16": 18, "fp8": 13}
    assert cost.training_bytes(FULL, "fp8") == 13 * (671_026_419_200 + 11_610_068_224)


def test_speculative_decoding_at_the_report_s_acceptance():
    """Section 5.4.3: 85 to 90 % accepted, 1.8 times the tokens a second."""
    assert cost.draft_cost(FULL) == (688_100_352 + 926_679_040) / 36_625_603_584
    assert [round(cost.speculative_speed(p, cost.draft_cost(FULL)), 2) for p in (0.85, 0.9)] == [1.77, 1.82]
    nano = cost.draft_cost(ModelConfig.preset("nano"))
    assert round(nano, 3) == 0.357 and cost.speculative_speed(nano, nano) == pytest.approx(1)
    assert cost.draft_cost(FULL.replace(num_nextn_predict_layers=2)) == cost.draft_cost(FULL)


@pytest.mark.parametrize("acceptance, depth", [(0.0, 1), (0.3, 1), (0.85, 3), (1.0, 2), (0.5, 0)])
def test_tokens_per_pass_is_the_mean_over_all_ways_to_accept(acceptance, depth):
    mean = 0.0
    for accepted in itertools.product((0, 1), repeat=depth):
        chance = math.prod(acceptance if each else 1 - acceptance for each in accepted)
        mean += chance * (1 + next((i for i, each in enumerate(accepted) if not each), depth))
    assert cost.tokens_per_pass(acceptance, depth) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("call, words", [
    (lambda: cost.draft_cost(FULL.replace(num_nextn_predict_layers=0)), "a draft needs an MTP module"),
    (lambda: cost.tokens_per_pass(1.2), "acceptance is 1.2"),
    (lambda: cost.tokens_per_pass(0.5, -1), "depth is -1"),
    (lambda: cost.speculative_speed(0.5, -0.1), "draft is -0.1"),
    (lambda: cost.kv_cache_bytes(FULL, tokens=0), "tokens is 0"),
    (lambda: cost.training_flops(FULL, context=-4), "context is -4"),
    (lambda: cost.hours(1e9, 1e12, mfu=39), "mfu is 39"),
    (lambda: cost.hours(1e9, float("nan")), "tokens is nan"),
    (lambda: cost.dollars(1.0, per_hour=0), "per_hour is 0"),
    (lambda: cost.training_bytes(FULL, "int4"), "precision is 'int4'")])
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
