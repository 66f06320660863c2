"""Chapter 03's exercises: references are the package's, cases tell answers apart, the capstone names the wrong part."""

import random

import pytest
import torch

import minidsv3.model
import minidsv3.mtp
from minidsv3.course import capstone, mtp
from minidsv3.course.capstone import CAPSTONE, Parts, my_parts_solution
from minidsv3.course.compare import difference
from minidsv3.course.toys import Machine, table_model, uneven_model
from minidsv3.generate import generate

SEEDS = range(3)


# ---- references -----------------------------------------------------------------------------------------------------

def test_align_is_what_the_package_hands_over(monkeypatch):
    """Listens to module and loss while `Transformer.loss` runs."""
    model, heard = uneven_model(0, num_nextn_predict_layers=3), []
    forward, loss = minidsv3.mtp.MTPModule.forward, minidsv3.model.prediction_loss

    def listening_forward(self, hidden, joined, *rest):
        heard.append((hidden, joined))
        return forward(self, hidden, joined, *rest)

    def listening_loss(final, head, tokens, depth, documents=None):
        if depth:
            heard[-1] += (tokens[:, depth + 1:],)
            assert final.shape[:2] == heard[-1][2].shape
        return loss(final, head, tokens, depth, documents)

    monkeypatch.setattr(minidsv3.mtp.MTPModule, "forward", listening_forward)
    monkeypatch.setattr(minidsv3.model, "prediction_loss", listening_loss)
    tokens = torch.randint(29, (2, 10))
    model.loss(tokens, mtp_weight=0.3)
    assert len(heard) == 3
    for depth, (hidden, joined, target) in enumerate(heard, start=1):
        whole = torch.randn(2, 9 - depth + 1, 24, dtype=torch.float64)
        whole[:, :hidden.shape[1]] = hidden.detach()
        assert difference(mtp.align_reference(whole, tokens, depth), (hidden.detach(), joined, target), 0) is None


def test_loss_reference_is_the_model_s():
    model, tokens = uneven_model(1, num_nextn_predict_layers=2), torch.randint(29, (2, 9))
    want, carried, logits = model.loss(tokens, mtp_weight=0.3), model.carried(model.hidden(tokens[:, :-1])), []
    for depth, module in enumerate(model.mtp_modules, start=1):
        hidden, joined, _ = mtp.align_reference(carried, tokens, depth)
        context = minidsv3.model.make_context(model.config, joined.shape, hidden.dtype, hidden.device)
        carried = module(hidden, joined, context)
        logits.append(module.logits(carried))
        carried = module.carried(carried)
    assert mtp.loss_solution(want.main, logits, tokens, 0.3).item() == pytest.approx(want.total.item(), abs=1e-10)


def test_expected_tokens_of_the_chapter():
    assert mtp.expected_solution(0.85, 1) == pytest.approx(1.85) and mtp.expected_solution(1, 3) == 4


# ---- the machines of 3.4 --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_machines_force_acceptance_one_zero_and_between(seed):
    cases = mtp.machines(random.Random(seed))
    def counts(case):
        machine, prompt, new, eos = cases[case]
        written = generate(machine.model, [prompt], new, speculative=True, eos=eos)
        assert written.near_ties == 0
        return written
    right, wrong = counts("drafts that are always right"), counts("drafts that are always wrong")
    assert right.accepted == right.drafted > 0 and wrong.accepted == 0 < wrong.drafted
    for row in range(3):
        mixed = counts(f"row {row} of a batch of three")
        assert 0 < mixed.accepted < mixed.drafted
    for case, place in (("an end token that is a draft", 4), ("an end token behind a draft", 5)):
        machine, prompt, new, eos = cases[case]
        text = counts(case).tokens[0].tolist()
        assert text[-1] == eos and len(text) == len(prompt) + place < len(prompt) + new


@pytest.mark.parametrize("seed", SEEDS)
def test_three_rows_are_one_batch(seed):
    """The rows of the batch share a model and differ in length: together they are written as they are alone."""
    rows = [mtp.machines(random.Random(seed))[f"row {row} of a batch of three"] for row in range(3)]
    together = generate(rows[0][0].model, [row[1] for row in rows], rows[0][2], speculative=True)
    alone = [mtp.speculate_solution(*row)[0] for row in rows]
    assert [text.tolist() for text in together.tokens] == alone
    assert len({len(row[1]) for row in rows}) == 3


def test_a_machine_reads_as_the_model_does():
    model = uneven_model(4)
    machine, tokens = Machine(model, 12), torch.randint(29, (9,)).tolist()
    want = model(torch.tensor([tokens])).argmax(-1)[0].tolist()
    assert machine.read(tokens[:6]) == want[:6]
    machine.keep(4)
    assert machine.read(tokens[4:]) == want[4:] and machine.passes == 2


@pytest.mark.parametrize("back", [1, 2, 3, 4])
def test_table_model_looks_back(back):
    after, prompt = [3, 0, 4, 1, 2], [0, 3, 2, 4]
    text = generate(table_model(after, after, back), [prompt], 20).tokens[0].tolist()
    assert all(text[i + 1] == after[text[i - back + 1]] for i in range(len(prompt) - 1, len(text) - 1))


def test_table_model_refuses_what_is_no_permutation():
    with pytest.raises(ValueError, match="must be a permutation"):
        table_model([0, 0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="drafts as long"):
        table_model([1, 0], [0])


# ---- mutants --------------------------------------------------------------------------------------------------------

def typical_test(depth_loss):
    """What one writes first: one row, one document, depth 1."""
    logits, tokens = torch.randn(1, 6, 5, dtype=torch.float64), torch.randint(5, (1, 8))
    want = torch.nn.functional.cross_entropy(logits[0], tokens[0, 2:], reduction="sum") / 7
    torch.testing.assert_close(depth_loss(logits, tokens, 1, torch.zeros_like(tokens)), want)


def test_a_typical_test_spares_half_of_the_mutants():
    verdict = mtp.MUTANTS.judge(typical_test, 0)
    assert not verdict.solved and verdict.sentence.startswith("kills 3 of 6, spares the right one. Alive: crosses doc")


# ---- the capstone ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CAPSTONE.wrong)
def test_capstone_refuses_with_the_part_s_sentence(name, seed):
    function, sentence = CAPSTONE.wrong[name]
    assert CAPSTONE.judge(function, seed) == (False, True, sentence)
    assert sentence.split(":")[0] in Parts._fields


def test_capstone_knows_the_wrong_answers_of_the_first_chapters():
    assert CAPSTONE.wrong.keys() >= {"the bias leaks into the gate", "a rope key for each head", "shift by two",
                                     "scale by the wrong root", "0 for minus infinity"}


def test_a_wrong_part_is_named_among_right_ones():
    attention, _, mtp_part = my_parts_solution()
    spoilt, sentence = CAPSTONE.wrong["0 for minus infinity"]
    assert CAPSTONE.judge(lambda: (attention, spoilt().router, mtp_part), 0).sentence == sentence


def test_an_unlisted_mistake_is_told_the_part_and_the_place():
    attention, _, _ = my_parts_solution()
    def late(x, past, weights, config):
        out, entries = attention(x, past, weights, config)
        return out * 1.01, entries
    verdict = CAPSTONE.judge(lambda: (late, None, None), 0)
    assert verdict.sentence.startswith("your attention is not the package's yet. With plain RoPE, logits differ: ")


def test_right_parts_alone_are_not_the_whole():
    attention, router, _ = my_parts_solution()
    verdict = CAPSTONE.judge(lambda: (attention, router, None), 0)
    assert not verdict.solved and verdict.sentence.endswith("still the package's: mtp")


@pytest.mark.parametrize("answer, words", [
    (lambda: 0, "your function returned 0; it must return"), (lambda: (1, 2, 3), "three functions"),
    (lambda: (lambda *_: 1 / 0, None, None), "logits: your function raised ZeroDivisionError")])
def test_capstone_refuses_what_does_not_run(answer, words):
    verdict = CAPSTONE.judge(answer, 0)
    assert not verdict.solved and words in verdict.sentence


def test_a_part_that_raises_not_implemented_is_not_solved_yet():
    def stub(*_):
        raise NotImplementedError
    assert not CAPSTONE.judge(lambda: (None, stub, None), 0).attempted


def test_installed_parts_compute_and_the_model_is_left_alone():
    """Each function is called, in the copy only."""
    calls = dict.fromkeys(Parts._fields, 0)

    def counted(name, part):
        def function(*arguments):
            calls[name] += 1
            return part(*arguments)
        return function

    (model, tokens), *_ = capstone.odd_models(random.Random(0)).values()
    parts = Parts(*(counted(name, part) for name, part in Parts(*my_parts_solution())._asdict().items()))
    before = dict(capstone.behaviour(model, tokens))
    assert capstone.fault(model, tokens, parts) is None and min(calls.values()) > 0
    seen = dict(calls)
    assert difference(dict(capstone.behaviour(model, tokens)), before, 0) is None and calls == seen


@pytest.mark.parametrize("left_out, name", [
    ("the latent cache", "latent cached before its norm"), ("the drafts' logits", "halves swapped")])
def test_each_comparison_is_needed(left_out, name, monkeypatch):
    """Mutation: without this comparison and what follows from it, a wrong part would pass."""
    behaviour = capstone.behaviour
    follows = {left_out, "its passes and accepted drafts"}
    monkeypatch.setattr(capstone, "behaviour", lambda *arguments: ((key, value) for key, value in behaviour(*arguments)
                                                                   if key not in follows))
    for model, tokens in capstone.odd_models(random.Random(0)).values():
        assert capstone.fault(model, tokens, CAPSTONE.wrong[name][0]()) is None


def test_spoilt_answers_follow_the_solution():
    with pytest.raises(ValueError, match="stands 0 times"):
        capstone.spoilt("router", ("no such line", ""))
