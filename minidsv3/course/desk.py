"""The reader's desk: what a notebook calls, and the little that one kernel remembers about its reader.

`setup` once at the top; `exercise` shows a task, `attempt` judges an answer, `solution` opens after a failed attempt,
`quiz` asks. The cases come from the student's number, so that answers to a neighbour's cases prove nothing.
"""

import inspect
import random
from collections.abc import Callable

import torch

from . import dualpipe, experts, fp8, kernels, mla, mtp, overview, router
from .exercise import Exercise, Mutants

CHAPTERS = (overview, mla, router, mtp, fp8, kernels, experts, dualpipe)
EXERCISES = {task.id: task for chapter in CHAPTERS for task in chapter.EXERCISES}
QUESTIONS = {name: question for chapter in CHAPTERS for name, question in chapter.QUESTIONS.items()}

_student: object = 0
_failed: set[str] = set()


def setup(seed: int = 0, student: object = 0) -> None:
    """Makes a notebook's numbers the same everywhere: seeds, one thread, and tensors printed with four digits.

    `student` (a number or a name) chooses the cases of all exercises.
    """
    global _student
    _student = student
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)


def exercise(id: str) -> Exercise | Mutants:
    """The exercise, which a notebook shows as text with folded hints. Raises ValueError for an unknown id."""
    return _find(id, EXERCISES, "exercise")


def attempt(id: str, answer: Callable) -> None:
    """Judges an answer and prints what there is to say; one that raises NotImplementedError is not solved yet."""
    task = exercise(id)
    if not callable(answer):
        raise ValueError(f"the answer to {id} is {answer!r}; it must be a function: pass its name without calling it")
    verdict = task.judge(answer, _student)
    if verdict.attempted and not verdict.solved:
        _failed.add(id)
    print(f"{task}: {verdict.sentence}")


def solution(id: str) -> None:
    """Prints a solution, once an attempt has failed in this kernel."""
    task = exercise(id)
    print(inspect.getsource(task.solution) if id in _failed
          else f"{task}: the solution opens after your first failed attempt; the hints are open now.")


def quiz(id: str, choice: str | None = None) -> None:
    """Asks a question, or answers the letter chosen. Raises ValueError for an unknown question or letter."""
    print(_find(id, QUESTIONS, "question").ask(choice))


def _find(id: str, known: dict, kind: str):
    if id not in known:
        raise ValueError(f"there is no {kind} {id!r}; there are {', '.join(known)}")
    return known[id]
