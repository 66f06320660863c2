"""The course refuses what it should: listed wrong answers, mutants, NaN, other shapes, guesses without meaning."""

import inspect
import random

import pytest
import torch

from minidsv3 import ModelConfig, course
from minidsv3.course import desk, overview
from minidsv3.course.compare import difference
from minidsv3.course.exercise import Exercise, Mutants
from minidsv3.course.predict import Option, Question
from minidsv3.data import Document, encode, held_out_batches, train_tokenizer, unigram_entropy

TASKS = list(desk.EXERCISES.values())
EXERCISES = [task for task in TASKS if isinstance(task, Exercise)]
MUTANTS = [task for task in TASKS if isinstance(task, Mutants)]
WRONG = [(task, name) for task in EXERCISES for name in task.wrong]
SEEDS = range(5)


@pytest.fixture(autouse=True)
def fresh_desk(monkeypatch):
    monkeypatch.setattr(desk, "_failed", set())
    monkeypatch.setattr(desk, "_student", 0)


def from_stub(task):
    scope = {}
    exec(task.stub, scope)
    (function,) = [value for value in scope.values() if inspect.isfunction(value)]
    return function


# ---- exercises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_the_solution_is_right(task, seed):
    assert task.judge(task.solution, seed).solved


@pytest.mark.parametrize("task", EXERCISES, ids=repr)
def test_the_reference_is_right(task):
    assert task.judge(task.reference, 0).solved


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task, name", WRONG)
def test_a_listed_wrong_answer_gets_its_sentence(task, name, seed):
    function, sentence = task.wrong[name]
    assert task.judge(function, seed) == (False, True, sentence)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_an_untouched_stub_is_not_solved_yet(task, capsys):
    course.attempt(task.id, from_stub(task))
    assert capsys.readouterr().out == f"{task}: not solved yet\n"
    assert not desk._failed


@pytest.mark.parametrize("task", EXERCISES, ids=repr)
def test_another_wrong_answer_is_told_the_case_and_not_the_solution(task):
    verdict = task.judge(lambda *arguments: near(task.reference(*arguments)), 0)
    first_case = next(iter(task.cases(random.Random(f"{task.id} 0"))))
    assert not verdict.solved and verdict.sentence.startswith(f"not yet: for {first_case}, ")
    wants = [task.reference(*arguments) for arguments in task.cases(random.Random(f"{task.id} 0")).values()]
    assert not any(f"{want:,}" in verdict.sentence for want in wants if isinstance(want, (int, float)))


def near(value):
    """A result that is a little off everywhere."""
    if isinstance(value, (tuple, list)):
        return [near(part) for part in value]
    if isinstance(value, dict):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, str):
        return value + "0"
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return value.long() + 1
    return value * 1.01 + 0.013


@pytest.mark.parametrize("task", EXERCISES, ids=repr)
def test_an_answer_that_raises_or_returns_nothing_is_told_so(task):
    assert "raised TypeError" in task.judge(lambda: 0, 0).sentence
    assert "NoneType" in task.judge(lambda *arguments: None, 0).sentence


@pytest.mark.parametrize("task", EXERCISES, ids=repr)
def test_cases_depend_on_the_student(task):
    def seen(student) -> list[str]:
        calls = []
        task.judge(lambda *arguments: calls.append(str(arguments)), student)
        return calls
    assert seen("ada") == seen("ada") != seen("alan")


def test_an_answer_for_the_published_model_alone_is_refused():
    assert not overview.ATTENTION.judge(lambda config: 187_107_328, 0).solved


def test_an_answer_cannot_spoil_the_cases():
    def spoils(train, held_out, vocab_size):
        right = overview.unigram_solution(train, held_out, vocab_size)
        train.clear()
        return right
    assert overview.UNIGRAM.judge(spoils, 0).solved


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_every_task_is_complete(task):
    assert task.stars in (1, 2, 3) and task.minutes > 0 and len(task.wrong) >= 3
    text = task._repr_markdown_()
    for part in (task.title, task.statement, task.why, *task.hints):
        assert part in text


# ---- mutants --------------------------------------------------------------------------------------------------------


def typical_test(rms_norm):
    """What one writes first: random rows, gains of 1, a small eps."""
    x = torch.randn(4, 8)
    want = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rms_norm(x, torch.ones(8), 1e-6), want, rtol=0, atol=1e-4)


def test_a_typical_test_spares_some_mutants():
    verdict = overview.NORM.judge(typical_test, 0)
    assert not verdict.solved and verdict.sentence.startswith("kills 4 of 6, spares the right one. Alive: no gain.")


def test_a_test_that_fails_everything_is_no_test():
    def refuses(rms_norm):
        raise AssertionError("no")
    verdict = overview.NORM.judge(refuses, 0)
    assert not verdict.solved
    assert verdict.sentence == "kills 6 of 6, but also the right one, with AssertionError: no"


def test_a_test_that_passes_everything_kills_nobody():
    assert overview.NORM.judge(lambda rms_norm: None, 0).sentence.startswith("kills 0 of 6")


@pytest.mark.parametrize("task", MUTANTS, ids=repr)
def test_each_mutant_is_wrong_alone(task):
    """No mutant is another's double, or it would count twice."""
    functions = [task.reference, *(function for function, _ in task.wrong.values())]
    results = [[function(*arguments) for arguments in task.cases(random.Random("1")).values()]
               for function in functions]
    for i, one in enumerate(results):
        assert all(difference(one, other, 1e-6) for other in results[:i])


def test_mutants_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    overview.NORM.judge(typical_test, 0)
    assert torch.equal(torch.get_rng_state(), before)


# ---- references are the package's ------------------------------------------------------------------------------------


def test_numbers_of_the_published_model():
    full = ModelConfig.preset("full")
    assert overview.attention_solution(full) == 187_107_328
    assert overview.attention_without_norms(full) == 187_105_280
    assert overview.attention_with_rope_key_per_head(full) == 245_368_832
    assert overview.active_solution(full) == 36_625_603_584
    assert overview.active_with_embedding(full) == 37_552_282_624


def test_unigram_reference_is_the_package_s():
    train = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * (i + 1)) for i in range(6)]
    held_out = [Document("z.py", "class Z:\n    y = 'never seen'\n" * 5)]
    tokenizer = train_tokenizer(train, 300)
    files = [[*encode(tokenizer, document.text), 1] for document in train]
    batches = held_out_batches(held_out, tokenizer, length=16, sequences=2)
    targets = [row[1:].tolist() for batch in batches for row in batch.tokens]
    want = unigram_entropy(train, batches, tokenizer)
    assert overview.unigram_reference(files, targets, tokenizer.get_vocab_size()) == pytest.approx(want, abs=1e-12)


# ---- the desk -------------------------------------------------------------------------------------------------------


def test_the_solution_opens_after_a_failed_attempt(capsys):
    course.solution("0.1")
    assert "def " not in capsys.readouterr().out
    course.attempt("0.1", lambda config: 1)
    course.solution("0.1")
    assert "def attention_solution(config)" in capsys.readouterr().out


@pytest.mark.parametrize("call, sentence", [
    (lambda: course.attempt("9.9", print), "there is no exercise '9.9'; there are 0.1"),
    (lambda: course.attempt("0.1", 187_107_328), "it must be a function"),
    (lambda: course.quiz("00.nothing"), "there is no question"),
    (lambda: course.quiz("00.loss", "z"), "one of a, b, c"),
    (lambda: course.reveal("bytes", 0, 5), "must be a positive number"),
])
def test_wrong_use_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_setup_makes_numbers_repeat():
    course.setup(seed=7)
    first = torch.rand(3), random.random()
    course.setup(seed=7)
    assert torch.equal(first[0], torch.rand(3)) and first[1] == random.random()
    assert torch.get_num_threads() == 1 and torch.get_default_dtype() == torch.float32


# ---- predictions and questions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess, value, said", [
    (None, 70272, "cache: 70,272 bytes\n"),
    (None, 9.2106, "cache: 9.211 bytes\n"),
    (100, 70272, "cache: 70,272 bytes\nYour guess of 100 was 702.7 times too small.\n"),
    (200, 100, "cache: 100 bytes\nYour guess of 200 was 2.0 times too large.\n"),
    (95, 100, "cache: 100 bytes\nYour guess of 95 was right within ten percent.\n"),
])
def test_reveal(guess, value, said, capsys):
    course.reveal("cache", guess, value, "bytes")
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("name", desk.QUESTIONS)
def test_questions(name):
    question = desk.QUESTIONS[name]
    shown = question.ask()
    answers = [question.ask("abcdefgh"[i]) for i in range(len(question.options))]
    assert all(option.text in shown and option.because not in shown for option in question.options)
    assert sum("is right:" in answer for answer in answers) == 1
    assert "is right:" in answers[question.right]


def test_right_answers_are_not_always_the_same_letter():
    assert len({question.right for question in desk.QUESTIONS.values()}) > 1


def test_a_letter_beyond_the_options_is_refused():
    with pytest.raises(ValueError, match="one of a, b, or None"):
        Question("?", (Option("x", "y"), Option("z", "w")), 0).ask("c")


# ---- check ----------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("got, want, tol", [
    (1.0, 1.0, 0), (3, 3, 0), (torch.tensor(2), 2, 0), ([1, 2], (1, 2), 0), ({"a": 1.0}, {"a": 1.0}, 0), ("x", "x", 0),
    (torch.ones(2, 3), torch.ones(2, 3).double(), 0), (1.05, 1.0, 0.1), (1.05e6, 1e6, 0.1),
    (float("-inf"), float("-inf"), 0), (torch.zeros(0), torch.zeros(0), 0),
    ([torch.ones(2), "x"], [torch.ones(2), "x"], 0),
])
def test_check_passes(got, want, tol, capsys):
    course.check("both", got, want, tol)
    assert capsys.readouterr().out == f"both: ok ({f'tol {tol:g}' if tol else 'exact'})\n"


@pytest.mark.parametrize("got, want, tol, said", [
    (NAN, NAN, 1, "nan is not right"), (NAN, 1.0, 1, "nan"),
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 1, r"index \[1\]"),
    (1.0, float("inf"), 1, "not right"), (float("inf"), 1.0, 1, "not right"),
    (torch.ones(2, 3), torch.ones(3, 2), 1, r"shape is \[2, 3\], but should be \[3, 2\]"),
    (torch.ones(3), torch.ones(1, 3), 1, "shape"),
    (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), 0, r"1 of 3 .* \[2\], which is 4"),
    (671_026_419_201, 671_026_419_200, 0, "not right"), (2**60 + 1, 2**60, 0, "not right"),
    (1.2, 1.0, 0.1, "not right"),
    ([1, 2], [1, 2, 3], 0, "found 2 values, where 3"), ([1, [2, 5]], [1, [2, 3]], 0, r"5 at \[1\]\[1\]"),
    ({"a": 1}, {"b": 1}, 0, "keys"),
    ({"a": 1}, {"a": 2}, 0, "at 'a'"), ("x", "y", 0, "'x'"), (None, 1, 0, "NoneType"),
    ("1", 1, 0, "str"), (5, [5], 0, "a int"),
])
def test_check_refuses(got, want, tol, said):
    with pytest.raises(AssertionError, match=f"both: .*{said}"):
        course.check("both", got, want, tol)


def test_check_compares_values_under_a_graph():
    x = torch.ones(2, requires_grad=True)
    course.check("same", x * 2, torch.full((2,), 2.0))
