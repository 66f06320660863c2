"""Chapter 01's exercises against published numbers and the package, and the tests that spare mutants."""

import math
import random

import pytest
import torch

from minidsv3 import ModelConfig
from minidsv3.attention import MLA, make_context
from minidsv3.config import YarnScaling
from minidsv3.course import mla
from minidsv3.course.compare import difference
from minidsv3.rope import softmax_scale

FULL, NANO = ModelConfig.preset("full"), ModelConfig.preset("nano")


def cases(task, seed: int = 0) -> list[tuple]:
    return list(task.cases(random.Random(f"{task.id} {seed}")).values())


# ---- published numbers ----------------------------------------------------------------------------------------------

def test_cache_numbers_of_the_published_model():
    assert mla.cache_solution(FULL) == mla.cache_reference(FULL) == 70_272
    assert mla.cache_without_rope_key(FULL) == 62_464
    assert mla.cache_of_keys_and_values(FULL) == 140_544
    assert mla.cache_with_mtp(FULL) == 62 * 1152


@pytest.mark.parametrize("logits, scale", [
    (mla.logits_solution, 0.1352337789), (mla.logits_with_mscale_once, 192 ** -0.5 * (0.1 * math.log(40) + 1)),
    (mla.logits_without_mscale, 192 ** -0.5), (mla.logits_over_content_width, 0.1352337789 * 1.5 ** 0.5)],
    ids=lambda value: getattr(value, "__name__", value))
def test_scales_of_the_published_model(logits, scale):
    one = torch.ones(1, 128).double(), torch.zeros(1, 64).double()
    key = torch.eye(1, 128).double(), torch.zeros(1, 64).double()
    assert logits(*one, *key, FULL).item() == pytest.approx(scale, rel=1e-6)


def test_each_part_by_its_own_root_is_too_wide():
    """Sums of 192 products of normal numbers: standard deviation 1 by one root, 1.41 by two."""
    plain, randn = FULL.replace(rope_scaling=None), mla.normal(random.Random("sd"))
    parts = [randn(400, width) for width in (128, 64, 128, 64)]
    assert mla.logits_reference(*parts, plain).std().item() == pytest.approx(1, abs=0.03)
    assert mla.logits_part_by_part(*parts, plain).std().item() == pytest.approx(2 ** 0.5, abs=0.04)


def test_largest_chunks_of_the_published_model():
    contexts = [128, 4096, 131_072]
    assert mla.chunk_reference(FULL, contexts) == mla.chunk_solution(FULL, contexts) == [73, 163, 170]
    assert mla.chunk_without_context(FULL, contexts) == [128, 170, 170]


# ---- what stands behind the wrong answers ----------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_faults_are_all_that_is_wrong(seed):
    """Without a fault the functions that make the wrong answers are right: each answer is wrong for its own reason."""
    for arguments in cases(mla.ABSORBED, seed):
        assert not difference(mla.faulty_absorbed(*arguments), mla.absorbed_reference(*arguments), 1e-12)
    for arguments in cases(mla.DECODE, seed):
        assert not difference(mla.faulty_decode(*arguments), mla.decode_reference(*arguments), 1e-10)
    for arguments in cases(mla.ATTENTION, seed):
        assert not difference(mla.faulty_attention(*arguments), mla.attention_reference(*arguments), 1e-10)


def test_cases_hide_nothing():
    for _, _, w, config in cases(mla.DECODE):
        assert config.num_attention_heads > 1 and softmax_scale(config) > config.qk_head_dim ** -0.5
        assert all((gain - 1).abs().max() > 0.1 for gain in w.values() if gain.dim() == 1)


@pytest.mark.parametrize("queries, wrong", [(1, "no mask"), (2, None)])
def test_one_new_token_needs_no_mask(queries, wrong):
    """What the sentence says: with one token the missing mask is right, with two it is not."""
    config, w = mla.small_attention(random.Random("mask"))
    x = mla.normal(random.Random("x"))(3 + queries, config.hidden_size)
    cached = mla.decode_reference(x[:3], mla.nothing_cached(config), w, config)[1]
    got = mla.DECODE.wrong["no mask"][0](x[3:], cached, w, config)
    want = mla.decode_reference(x[3:], cached, w, config)
    assert (difference(got, want, 1e-9) is None) == (wrong is not None)


def test_making_cases_leaves_torchs_numbers_alone():
    before = torch.get_rng_state()
    for task in mla.EXERCISES:
        cases(task)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the mutants ----------------------------------------------------------------------------------------------------

def typical_test(config: ModelConfig, tokens: int, even: bool, tol: float = 1e-5):
    """Compares with the package on a fresh layer of `config`; `even` leaves the gains at 1."""
    def test(attention):
        layer = MLA(config, 0).double()
        with torch.no_grad():
            if not even:
                layer.kv_a_layernorm.weight.uniform_(0.5, 1.5)
            x = torch.randn(tokens, config.hidden_size, dtype=torch.float64)
            want = layer(x[None], make_context(config, (1, tokens), x.dtype, x.device))[0]
            assert torch.allclose(attention(x, dict(layer.state_dict()), config), want, rtol=0, atol=tol)
    return test


YARN = NANO.replace(rope_scaling=YarnScaling(factor=4, original_max_position_embeddings=8))
ONE_HEAD = YARN.replace(num_attention_heads=1)


@pytest.mark.parametrize("test, spared", [
    (typical_test(YARN, 5, even=True), {"latent normed twice"}),
    (typical_test(NANO, 5, even=False), {"no mscale"}),
    (typical_test(ONE_HEAD, 5, even=False), {"a rope key per head", "keys, then values"}),
    (typical_test(YARN, 1, even=False), {"half layout", "future seen", "a rope key per head", "no mscale"}),
    (typical_test(NANO, 5, even=True), {"latent normed twice", "no mscale"}),
    (typical_test(YARN, 5, even=True, tol=1e-9), set()), (typical_test(YARN, 5, even=False), set()),
], ids=["gains of 1", "no YaRN", "one head", "one token", "a fresh nano", "gains of 1, strictly", "none of these"])
def test_easy_inputs_spare_mutants(test, spared):
    killed = 6 - len(spared)
    verdict = mla.ATTENTION.judge(test, 0)
    assert verdict.sentence.startswith(f"kills {killed} of 6, spares the right one")
    for name, (function, _) in mla.ATTENTION.wrong.items():
        alone = mla.ATTENTION.__class__(**{**vars(mla.ATTENTION), "wrong": {name: (function, name)}})
        assert alone.judge(test, 0).solved == (name not in spared), name
