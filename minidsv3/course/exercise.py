"""Exercises. One description serves the reader, who is judged by it, and the tests, which prove that it can refuse.

An `Exercise` asks for a function and runs it on fresh cases. If it agrees with one of the listed wrong answers on all
of them, that answer's sentence is the reply; otherwise the first case that differs is named, never the solution.
`Mutants` turns this round: the reader writes a test, and it must fail the wrong functions and spare the right one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .compare import difference


class Verdict(NamedTuple):
    """What is said about an answer. An answer that raises NotImplementedError was not attempted."""

    solved: bool
    attempted: bool
    sentence: str


NOT_YET = Verdict(False, False, "not solved yet")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every exercise has. `stub` is the source of the cell that the reader fills in."""

    id: str
    title: str
    stars: int                                      # 1 to 3
    minutes: int
    why: str                                        # one line
    statement: str                                  # Markdown
    stub: str
    hints: tuple[str, str]                          # a nudge, then a plan
    reference: Callable                             # the package's function: the truth
    solution: Callable                              # what a reader could have written
    wrong: dict[str, tuple[Callable, str]]          # name -> (function, what to say to it)
    cases: Callable[[random.Random], dict[str, tuple]]   # arguments, each with words that name the case

    def _repr_markdown_(self) -> str:
        stars = "★" * self.stars + "☆" * (3 - self.stars)
        folded = [f"<details><summary>{title}</summary>\n\n{hint}\n\n</details>"
                  for title, hint in zip(("Hint 1: a nudge", "Hint 2: a plan"), self.hints)]
        return "\n\n".join([f"**{self.id} {self.title}** · {stars} · {self.minutes} minutes", self.statement,
                            f"*Why it matters:* {self.why}", *folded])

    def __repr__(self) -> str:
        return f"{self.id} {self.title}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Exercise(Task):
    """Write a function, which is judged on the `cases` that a source of random numbers makes."""

    tol: float = 0.0

    def judge(self, answer: Callable, seed: object) -> Verdict:
        """Runs the answer on the cases that `seed` gives."""
        want = self._results(self.reference, seed)
        try:
            got = self._results(answer, seed)
        except NotImplementedError:
            return NOT_YET
        except Exception as error:      # whatever the reader's code raises is an answer too
            return Verdict(False, True, f"your function raised {type(error).__name__}: {error}")
        differing = {case: found for case in want if (found := difference(got[case], want[case], self.tol))}
        if not differing:
            return Verdict(True, True, f"right, on {len(want)} cases")
        for function, sentence in self.wrong.values():
            if difference(got, self._results(function, seed), self.tol) is None:
                return Verdict(False, True, sentence)
        case, found = next(iter(differing.items()))
        return Verdict(False, True, f"not yet: for {case}, {found}")

    def _results(self, function: Callable, seed: object) -> dict[str, object]:
        """Cases are made again for each function, so that none sees what another did to its arguments."""
        cases = self.cases(random.Random(f"{self.id} {seed}"))
        return {case: function(*arguments) for case, arguments in cases.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Mutants(Task):
    """Write a test: a function that takes an implementation and asserts. `solution` is such a test.

    `cases` are arguments on which every mutant differs from the others, which proves that none is counted twice.
    """

    def judge(self, answer: Callable, seed: object) -> Verdict:
        """Runs the test on the right implementation and on every wrong one."""
        try:
            complaint = _complaint(answer, self.reference, seed)
        except NotImplementedError:
            return NOT_YET
        alive = [name for name, (function, _) in self.wrong.items() if _complaint(answer, function, seed) is None]
        killed = f"kills {len(self.wrong) - len(alive)} of {len(self.wrong)}"
        if complaint is not None:
            return Verdict(False, True, f"{killed}, but also the right one, with {complaint}")
        if alive:
            return Verdict(False, True, f"{killed}, spares the right one. Alive: {alive[0]}. {self.wrong[alive[0]][1]}")
        return Verdict(True, True, f"{killed}, spares the right one")


def _complaint(test: Callable, implementation: Callable, seed: object) -> str | None:
    """What the test raised about an implementation, or None. Its random numbers are the same for all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(f"{seed}").getrandbits(32))
        try:
            test(implementation)
        except NotImplementedError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}".rstrip(": ")
    return None
