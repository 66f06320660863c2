"""Chapter 01: what a token leaves behind (report section 2.1.1)."""

from .exercise import Exercise, Mutants
from .predict import Question

EXERCISES: tuple[Exercise | Mutants, ...] = ()
QUESTIONS: dict[str, Question] = {}
