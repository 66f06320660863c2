"""Chapter 03: one more token (report section 2.2)."""

from .exercise import Exercise, Mutants
from .predict import Question

EXERCISES: tuple[Exercise | Mutants, ...] = ()
QUESTIONS: dict[str, Question] = {}
