"""Generation: the cache, the batch and the drafts must not change a word; each check is shown to catch a fault.

A check takes the module under test: the same lines run on `generate.py` and on copies of it with one fault each.
"""

import copy
import inspect
import itertools
import math
import sys
import textwrap
import types

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokens

import minidsv3.generate  # noqa: F401  (the package may export the function under the same name)
from minidsv3 import ModelConfig, Transformer
from minidsv3.course.toys import table_model

REAL = sys.modules["minidsv3.generate"]
SHAPES = [{}, {"num_nextn_predict_layers": 2}, {"mtp_order": "hidden_first"}, {"mtp_hidden": "pre_norm"}]
PROMPTS = [tiny_tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 1, 7)]


@torch.no_grad()
def continue_slowly(model, prompt, new):
    """The definition of greedy decoding: the whole text through the model for each token, one row, no cache."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def as_lists(generation):
    return [row.tolist() for row in generation.tokens]


@torch.no_grad()
def counting_model(vocab=16):
    """A model without context: after token t comes t + 1 within each half of the vocabulary, round and round.

    Embeddings are unit vectors and all blocks are silent. The MTP module reads the embeddings of the lower half (and
    drafts right), and nothing of the upper half's (and drafts 0, which never comes there).
    """
    model = Transformer(tiny_config(vocab_size=vocab, hidden_size=vocab, num_hidden_layers=1)).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(vocab))
    half = vocab // 2
    for token in range(vocab):
        model.lm_head.weight[(token + 1) % half + token // half * half, token] = 1
    model.mtp_modules[0].eh_proj.weight[:half, :half] = torch.eye(half)
    return model


# ---- checks ---------------------------------------------------------------------------------------------------------

def check_text(module):
    """Greedy text of a batch of unequal prompts, plain and speculative, is the text of the definition."""
    for seed, shape in enumerate(SHAPES):
        model = tiny_model(seed, **shape)
        slow = [continue_slowly(model, prompt, 20) for prompt in PROMPTS]
        for speculative in (False, True):
            assert as_lists(module.generate(model, PROMPTS, 20, speculative=speculative)) == slow


@torch.no_grad()
def check_drafts(module):
    """Every draft comes from the distribution that the module gives for the whole text without a cache (eqs. 21-23)."""
    for seed, shape in enumerate(SHAPES):
        model = tiny_model(seed, **shape)
        decoder = module.Decoder(model, PROMPTS, 40, module.Sampler(1.0, 1.0, seed), speculative=True)
        texts, taken = [list(prompt) for prompt in PROMPTS], set()
        for _ in range(10):
            for text, new in zip(texts, decoder.step()[0]):
                text += new
                taken.add(len(new))
            for row, text in enumerate(texts):
                tokens = torch.tensor([text])
                carried = model.carried(model.hidden(tokens[:, :-1]))
                context = REAL.make_context(model.config, carried.shape[:2], carried.dtype, carried.device)
                ahead = model.mtp_modules[0](carried, tokens[:, 1:], context)
                right = model.mtp_modules[0].logits(ahead)[0, -1].softmax(-1)
                torch.testing.assert_close(decoder.q[row], right, rtol=0, atol=1e-10)
        assert taken == {1, 2}   # drafts were refused and accepted


def check_forced(module):
    """Acceptance of exactly 1, exactly 0 and both in one batch: tokens, passes and counts are known beforehand."""
    model, right, wrong = counting_model(), list(range(2, 8)), list(range(9, 15))
    for prompt, passes, accepted in ((right, 11, 10), (wrong, 21, 0)):
        got = module.generate(model, [prompt], 21, speculative=True)
        assert as_lists(got) == [continue_slowly(model, prompt, 21)]
        assert (got.passes, got.drafted, got.accepted) == (passes, passes - 1, accepted)
    both = module.generate(model, [right, wrong, right[:4]], 21, speculative=True)
    assert as_lists(both) == [continue_slowly(model, prompt, 21) for prompt in (right, wrong, right[:4])]
    assert (both.passes, both.drafted, both.accepted) == (21, 10 + 20 + 10, 10 + 10)


def check_end(module):
    """A row ends behind its first eos, be it a draft (after 4) or the token behind one (after 3); the others go on."""
    model = counting_model()
    for speculative in (False, True):
        rows = as_lists(module.generate(model, [[3], [4], [9]], 10, speculative=speculative, eos=7))
        assert rows == [[3, 4, 5, 6, 7], [4, 5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11]]


def check_mixed(module):
    """Three rows, drafts right two times in three, words that hang on what is cached; every word is once the end.

    So ends come as accepted drafts, behind them, and in place of refused ones, while other rows go on.
    """
    after, drafts = [(word + 3) % 8 for word in range(8)], [(word + 1 + 4 * (word % 3 == 0)) % 8 for word in range(8)]
    model, prompts = table_model(after, drafts, back=3), [[0, 1, 2], [5, 6, 7, 0], [2, 3, 4, 5, 6]]
    slow = [continue_slowly(model, prompt, 20) for prompt in prompts]
    whole = module.generate(model, prompts, 20, speculative=True)
    assert as_lists(whole) == slow and 0.3 < whole.accepted / whole.drafted < 0.9
    for eos in range(8):
        ends = [text[:text.index(eos, len(prompt)) + 1] for prompt, text in zip(prompts, slow)]
        for speculative in (False, True):
            assert as_lists(module.generate(model, prompts, 20, speculative=speculative, eos=eos)) == ends


@torch.no_grad()
def exact_distribution(model, sampler, prompt, new):
    """The probability of each of the vocab^new continuations, by the chain rule over all of them."""
    joint = torch.ones(1, dtype=torch.float64)
    for depth in range(new):
        texts = [prompt + list(text) for text in itertools.product(range(model.config.vocab_size), repeat=depth)]
        joint = (joint[:, None] * sampler.probabilities(model(torch.tensor(texts))[:, -1])).flatten()
    return joint


def chi_square_sigmas(module, speculative, temperature, top_p, rows=2000, vocab=4, new=4):
    """How many standard deviations the counts of all continuations are off the exact distribution; inf: impossible."""
    model, prompt = tiny_model(5, vocab_size=vocab), [2, 3, 1]
    exact = exact_distribution(model, REAL.Sampler(temperature, top_p, 0), prompt, new)
    tokens = torch.tensor([prompt] * rows)
    drawn = module.generate(model, tokens, new, temperature, top_p, speculative, seed=1).tokens[:, len(prompt):]
    seen = torch.bincount(drawn @ vocab ** torch.arange(new - 1, -1, -1), minlength=vocab ** new).double()
    if seen[exact == 0].any():
        return math.inf
    rare = exact * rows < 5   # pooled into one cell
    seen, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (seen, exact * rows))
    seen, expected = seen[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    return float((((seen - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


def check_distribution(module):
    """Plain and speculative sampling draw from the main model's distribution, with temperature and top_p."""
    for speculative, temperature, top_p in ((True, 1.0, 1.0), (True, 1.5, 0.8), (False, 1.5, 0.8)):
        assert chi_square_sigmas(module, speculative, temperature, top_p) < 4


# ---- the checks hold, and each catches its faults -------------------------------------------------------------------

@pytest.mark.parametrize("check", [check_text, check_drafts, check_forced, check_end, check_mixed,
                                   check_distribution])
def test_holds(check):
    check(REAL)


FAULTS = {
    "padding stays cached": (check_text, "self.last + accepted + 1", "self.window.shape[1]"),
    "refused drafts stay cached": (check_text, "self.last + accepted + 1", "self.last + 1 + (self.q is not None)"),
    "accepted drafts are forgotten": (check_drafts, "self.last + accepted + 1", "self.last + 1"),
    "drafts are kept unverified": (check_text, "torch.where(accepted, draft, self.draw(rest))", "draft"),
    "the bonus token is dropped": (check_forced, "accepted.long()", "0 * draft"),
    "the bonus comes from the draft's place": (check_forced, "draw(p[:, 1])", "draw(p[:, 0])"),
    "the module's cache starts one late": (check_drafts, "self.cache, start)", "self.cache, start + 1)"),
    "the module's cache starts at 0": (check_drafts, "self.cache, start)", "self.cache, 0 * start)"),
    "the module is fed a refused draft": (check_drafts, "following.scatter_(", "following.scatter("),
    "the module drafts behind a refused token": (check_drafts, "self.rows, self.last + accepted]", ":, -1]"),
    "tokens follow the eos": (check_end, "new.index(eos) + 1", "len(new)"),
    "the eos is cut": (check_end, "new.index(eos) + 1", "new.index(eos)"),
    "a row goes on behind its eos": (check_mixed, "rows[row][-1] == eos or ", ""),
    "the token behind an accepted end is kept": (check_mixed, "new.index(eos) + 1 if eos in new", "new.index(eos) + 1 "
                                                 "if new[-1] == eos"),
    "every draft is accepted": (check_distribution, "* q_draft < p_draft", "* q_draft >= 0"),
    "a refused draft is redrawn from p": (check_distribution, "rest = (p - q).clamp(min=0)", "rest = p"),
    "the draft is not drawn from its q": (check_distribution, "self.sampler.draw(self.q)", "self.q.argmax(-1)"),
    "the temperature is left out": (check_distribution, "logits / self.temperature", "logits"),
    "top_p drops the token that reaches it": (check_distribution, "ordered.cumsum(-1) - ordered >= top_p",
                                              "ordered.cumsum(-1) >= top_p"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_catches(fault):
    check, right, wrong = FAULTS[fault]
    source = inspect.getsource(REAL)
    assert source.count(right) == 1, f"{right!r} must stand once in generate.py; this fault has to follow the code"
    faulty = types.ModuleType("minidsv3.faulty")
    faulty.__package__ = "minidsv3"
    exec(compile(source.replace(right, wrong), fault, "exec"), faulty.__dict__)
    with pytest.raises(AssertionError):
        check(faulty)


# ---- a trained model, real text -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source():
    """A file of the standard library, one token a byte."""
    return torch.tensor([min(byte, 127) for byte in inspect.getsource(textwrap).encode()])


@pytest.fixture(scope="module")
def trained(source):
    """Nano, narrowed to two layers of width 64, after a few seconds of next-token and MTP loss."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", vocab_size=128, hidden_size=64, num_hidden_layers=2,
                                           intermediate_size=128, moe_intermediate_size=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(60):
        starts = torch.randint(len(source) - 33, (16,))
        loss = model.loss(torch.stack([source[start:start + 33] for start in starts]), mtp_weight=0.3).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_trained_module_saves_passes_and_changes_no_word(trained, source):
    prompts = [source[start:start + 10 + start % 7].tolist() for start in range(100, 3000, 500)]
    plain = REAL.generate(trained, prompts, 60)
    fast = REAL.generate(trained, prompts, 60, speculative=True)
    assert as_lists(fast) == as_lists(plain)
    assert (plain.passes, plain.drafted, plain.accepted) == (60, 0, 0)
    assert fast.passes < 60
    assert fast.accepted > 0.3 * fast.drafted
    assert fast.drafted + fast.accepted >= len(prompts) * 59   # all tokens but the prompt's own came from these


def test_sampled_text_is_seeded(trained):
    def sample(seed, speculative):
        return as_lists(REAL.generate(trained, [[40, 50, 60]], 30, temperature=1.0, seed=seed, speculative=speculative))

    state = torch.get_rng_state()
    for speculative in (False, True):
        assert sample(1, speculative) == sample(1, speculative) != sample(2, speculative)
        assert sample(None, speculative) != sample(None, speculative)
    assert torch.equal(torch.get_rng_state(), state)   # the global generator is left alone


# ---- rounding -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_speculative_equals_plain_in_float32(shape):
    for seed in range(3):
        model = tiny_model(seed, torch.float32, **shape)
        plain, fast = (REAL.generate(model, PROMPTS, 40, speculative=speculative) for speculative in (False, True))
        assert as_lists(fast) == as_lists(plain)
        assert fast.near_ties == 0


@pytest.mark.parametrize("gap, near_ties", [(1e-15, 20), (1e-14, 0)])
def test_near_ties_are_counted(gap, near_ties):
    """A second choice just below each best one: all tokens count but the first, which both kinds of decoding share."""
    model = counting_model()
    model.lm_head.weight.data += (1 - gap) * model.lm_head.weight.data.roll(1, 0)
    assert REAL.generate(model, [[2, 3], [9]], 11, speculative=True).near_ties == near_ties


def test_coarse_rounding_makes_near_ties(trained, source):
    prompts = [source[start:start + 10].tolist() for start in range(100, 3000, 300)]
    fine, coarse = (REAL.generate(copy.deepcopy(trained).to(dtype), prompts, 30, speculative=True).near_ties
                    for dtype in (torch.float32, torch.bfloat16))
    assert fine == 0 < coarse


# ---- the sampler ----------------------------------------------------------------------------------------------------

def test_probabilities_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()

    def probabilities(temperature, top_p):
        return REAL.Sampler(temperature, top_p, 0).probabilities(logits)

    torch.testing.assert_close(probabilities(1.0, 1.0), logits.exp())
    torch.testing.assert_close(probabilities(0.5, 1.0), torch.tensor([1, 16, 9, 4], dtype=torch.float64) / 30)
    torch.testing.assert_close(probabilities(1.0, 0.5), torch.tensor([0, 4, 3, 0], dtype=torch.float64) / 7)
    torch.testing.assert_close(probabilities(1.0, 0.01), torch.tensor([0, 1, 0, 0], dtype=torch.float64))
    assert probabilities(0.0, 1.0).tolist() == [0, 1, 0, 0]


def test_probabilities_are_float32_for_bfloat16_logits():
    assert REAL.Sampler(1.0, 0.9, 0).probabilities(torch.randn(2, 9).bfloat16()).dtype is torch.float32


# ---- forms and refusals ---------------------------------------------------------------------------------------------

def test_a_tensor_returns_a_tensor_filled_up_with_eos():
    model, tokens = counting_model(), torch.tensor([[2, 3], [9, 10]])
    out = REAL.generate(model, tokens, 5, eos=5).tokens
    assert out.tolist() == [[2, 3, 4, 5, 5, 5, 5], [9, 10, 11, 12, 13, 14, 15]]
    assert REAL.generate(model, tokens, 5).tokens.shape == (2, 7)
    assert [row.tolist() for row in REAL.generate(model, [[2, 3], torch.tensor([9])], 1).tokens] == [[2, 3, 4], [9, 10]]


def test_the_model_is_left_as_it_was():
    model = counting_model()
    for training in (True, False):
        model.train(training)
        out = REAL.generate(model, torch.tensor([[1]]), 3, speculative=True).tokens
        assert model.training is training
        model.loss(out).total.backward()   # generated tokens can be trained on
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("arguments, sentence", [
    (dict(tokens=[]), "there is no prompt"),
    (dict(tokens=[[1], []]), "prompt 1 is empty"),
    (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), "prompt 0 is empty"),
    (dict(tokens=torch.tensor([1, 2])), r"shape \[2\]"),
    (dict(tokens=[1, 2]), "entry 0 is 1"),
    (dict(tokens=["text"]), "entry 0 is 'text'"),
    (dict(tokens=[[1.5]]), "whole numbers"),
    (dict(tokens=torch.full((1, 3), 0.5)), "whole numbers"),
    (dict(tokens=[[1, 16]]), "from 1 to 16; the vocabulary has ids 0 to 15"),
    (dict(tokens=[[-1]]), "from -1 to -1"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(tokens=[[1], [1] * 60], max_new_tokens=5), "60 tokens and 5 new ones are more than the model's context"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(temperature=math.nan), "temperature is nan"),
    (dict(top_p=0.0), "top_p is 0.0"),
    (dict(top_p=1.1), "top_p is 1.1"),
], ids=str)
def test_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        REAL.generate(counting_model(), **{**dict(tokens=[[1]], max_new_tokens=3), **arguments})


def test_fills_the_whole_context():
    assert len(REAL.generate(counting_model(), [[1], [2] * 60], 4, speculative=True).tokens[1]) == 64


def test_refuses_to_draft_without_a_module():
    model = tiny_model(0, num_nextn_predict_layers=0)
    assert len(REAL.generate(model, [[1]], 3).tokens[0]) == 4
    with pytest.raises(ValueError, match="no MTP module"):
        REAL.generate(model, [[1]], 3, speculative=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damaged", ["model.norm.weight", "model.layers.1.shared_head.norm.weight"])
def test_refuses_logits_that_are_not_finite(temperature, damaged):
    model = counting_model()
    model.get_parameter(damaged).data[3] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        REAL.generate(model, [[1]], 3, temperature=temperature, speculative=True)
