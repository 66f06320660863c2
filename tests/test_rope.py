"""Rotary angles: the published numbers of YaRN, float64 until the last step, and what makes the embedding relative."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3 import ModelConfig
from minidsv3.config import YarnScaling
from minidsv3.kernels import rope
from minidsv3.rope import inverse_frequencies, rope_table, rotary_amplitude, softmax_scale, yarn_ramp
from tiny import tiny_config, tiny_model

FULL = ModelConfig.preset("full")


def test_published_numbers_of_the_full_model():
    """Traps 1 and 3: the temperature squared scales the whole logit; the ramp is [floor(10.47), ceil(22.51)]."""
    assert yarn_ramp(FULL) == (10, 23)
    assert softmax_scale(FULL) == pytest.approx(0.1352337789, abs=5e-11)
    assert softmax_scale(FULL) == 192 ** -0.5 * (0.1 * math.log(40) + 1) ** 2
    assert rotary_amplitude(FULL.rope_scaling) == 1.0


def test_pairs_below_the_ramp_keep_their_frequency_and_pairs_above_are_slowed_by_the_factor():
    plain, yarn = (inverse_frequencies(c).tolist() for c in (FULL.replace(rope_scaling=None), FULL))
    assert plain == pytest.approx([10000 ** (-2 * i / 64) for i in range(32)], rel=1e-15)
    slowing = [before / after for before, after in zip(plain, yarn)]
    assert slowing[:11] == [1.0] * 11
    assert slowing[23:] == pytest.approx([40.0] * 9)
    assert slowing == sorted(slowing) and len(set(slowing[10:24])) == 14
    assert yarn[16] == pytest.approx(plain[16] * (7 / 13 + 6 / 13 / 40))     # six steps up a ramp of thirteen


@pytest.mark.parametrize("mscale, mscale_all_dim, amplitude, temperature", [
    (1.0, 1.0, 1.0, 1.3689),
    (1.0, None, 1.3689, 1.0),       # trap 2: the hub's rule moves the temperature into cos and sin
    (None, 1.0, 1.3689, 1.3689),
    (None, None, 1.3689, 1.0),
    (0.707, 1.0, 1.2608 / 1.3689, 1.3689),
])
def test_mscales_of_the_hub(mscale, mscale_all_dim, amplitude, temperature):
    config = FULL.replace(rope_scaling=YarnScaling(
        factor=40, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale_all_dim))
    assert rotary_amplitude(config.rope_scaling) == pytest.approx(amplitude, abs=1e-4)
    assert softmax_scale(config) == pytest.approx(192 ** -0.5 * temperature ** 2, abs=1e-4)
    table, unscaled = (rope_table(c, torch.tensor([[5]]), torch.float64)[0] for c in (config, FULL))
    assert torch.allclose(table, unscaled * amplitude, atol=1e-4)


def test_a_factor_of_one_changes_nothing():
    config = FULL.replace(rope_scaling=YarnScaling(factor=1, original_max_position_embeddings=4096))
    plain = inverse_frequencies(config.replace(rope_scaling=None))
    assert inverse_frequencies(config).tolist() == pytest.approx(plain.tolist(), rel=1e-15)
    assert softmax_scale(config) == 192 ** -0.5


def test_tables_are_exact_at_the_far_end_of_the_context():
    """Angles in float64, rounded once. In float32 the angle 163839 has lost its last 7 bits: errors of 0.004."""
    last = FULL.max_position_embeddings - 1
    cos, sin = rope_table(FULL, torch.tensor([[last]]), torch.float32)
    angles = [last * f for f in inverse_frequencies(FULL).tolist()]
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=6e-8)
    assert sin[0, 0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=6e-8)
    single = (torch.tensor(float(last)) * inverse_frequencies(FULL).float()).cos()
    assert (single - cos[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("model, table", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                          (torch.float32, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_tables_have_at_least_float32(model, table):
    """Trap 34: no `.to(dtype)` reaches them, for no module holds them."""
    assert {t.dtype for t in rope_table(FULL, torch.arange(4)[None], model)} == {table}
    assert not [name for name, _ in tiny_model().named_buffers() if "bias" not in name]


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 10**4))
@settings(max_examples=50, deadline=None)
def test_only_the_distance_matters(here, there, shift):
    """q rotated at i times k rotated at j depends on i - j: why a whole sequence may start anywhere (trap 20)."""
    config = tiny_config(qk_rope_head_dim=16)
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        tables = (rope_table(config, torch.tensor([[position]]), torch.float64) for position in (i, j))
        q_turned, k_turned = (rope(x.view(1, 1, 1, 16), *table) for x, table in zip((q, k), tables))
        return float((q_turned * k_turned).sum())

    assert score(here, there) == pytest.approx(score(here + shift, there + shift), abs=1e-9)
