"""A compiled step is the model: logits, cache and text; and it refuses what it was not compiled for."""

import os
import shutil

import pytest
import torch
from tiny import tiny_model

from minidsv3 import generate
from minidsv3.attention import LatentCache
from minidsv3.compiled import CompiledStep, _Step

# torch.export itself still uses what torch warns of
pytestmark = [pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")]
CAPACITY = 12
# without a compiler the tests are left out on a reader's machine, and fail where CI runs
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and os.environ.get("CI") != "true",
                                    reason="compiling needs g++: apt-get install g++")


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def step(model):
    return CompiledStep(model, 2, CAPACITY)


def behind_prompts(model, rows: int = 2, capacity: int = CAPACITY) -> LatentCache:
    """A cache that holds prompts of unequal length."""
    cache = LatentCache(model.config, rows, capacity)
    with torch.no_grad():
        model(torch.arange(4 * rows).view(rows, 4), cache)
    cache.lengths = 4 - torch.arange(rows)
    return cache


def check(step, model) -> None:
    """Three tokens a row through the step and through the model leave the same logits and the same cache."""
    mine, theirs = behind_prompts(model), behind_prompts(model)
    for tokens in torch.tensor([[[7], [9]], [[11], [13]], [[60], [0]]]):
        with torch.no_grad():
            torch.testing.assert_close(step(tokens, mine), model(tokens, theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.values, theirs.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.lengths, theirs.lengths)


@needs_compiler
def test_a_compiled_step_is_the_model(step, model):
    check(step, model)


def uncompiled(model, change=lambda step: None):
    """The program before compilation, with a fault put into it."""
    program = _Step(model, CAPACITY)
    change(program)

    def step(tokens, cache):
        logits = program(tokens, cache.lengths[:, None], cache.values)
        cache.advance(1)
        return logits
    return step


def test_the_program_is_the_model(model):
    check(uncompiled(model), model)


@pytest.mark.parametrize("change", [
    lambda step: step.cos.copy_(step.cos.roll(1, 0)),                        # the angle of another position
    lambda step: setattr(step, "sin", -step.sin),                            # turned the other way
], ids=["position", "direction"])
def test_a_fault_of_the_program_is_seen(model, change):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(uncompiled(model, change), model)


@needs_compiler
def test_compiled_text_is_plain_text(step, model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    want, got = generate(model, prompts, 6), generate(model, prompts, 6, compiled=step)
    assert [row.tolist() for row in got.tokens] == [row.tolist() for row in want.tokens]
    assert got.passes == want.passes


@needs_compiler
def test_a_step_refuses_what_it_was_not_compiled_for(step, model):
    token = torch.tensor([[1], [2]])
    with pytest.raises(ValueError, match=r"for tokens \[2, 1\] and a cache \[4, 2, 12, 24\]; got .* \[4, 2, 13, 24\]"):
        step(token, behind_prompts(model, capacity=13))
    with pytest.raises(ValueError, match=r"got tokens \[2, 2\]"):
        step(token.expand(2, 2), behind_prompts(model))
    cache = behind_prompts(model)
    cache.lengths = torch.tensor([3, CAPACITY])
    with pytest.raises(ValueError, match="the cache is full with 12 tokens"):
        step(token, cache)
    with pytest.raises(ValueError, match="compiled for 2 rows of 12 tokens; these prompts need 1 rows of 8"):
        generate(model, [[1, 2, 3]], 5, compiled=step)
    with pytest.raises(ValueError, match="2 rows of 13"):
        generate(model, [[1, 2, 3], [1, 2, 3]], 10, compiled=step)
    with pytest.raises(ValueError, match="drafts need two"):
        generate(model, [[1, 2, 3], [1, 2, 3]], 5, speculative=True, compiled=step)


@needs_compiler
def test_a_step_keeps_the_weights_it_was_compiled_with():
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2, num_nextn_predict_layers=0).eval()
    step = CompiledStep(model, 1, CAPACITY)
    before = step(torch.tensor([[1]]), LatentCache(model.config, 1, CAPACITY))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(step(torch.tensor([[1]]), LatentCache(model.config, 1, CAPACITY)), before)
