"""Chapter 02: who is chosen (report section 2.1.2)."""

from .exercise import Exercise, Mutants
from .predict import Question

EXERCISES: tuple[Exercise | Mutants, ...] = ()
QUESTIONS: dict[str, Question] = {}
