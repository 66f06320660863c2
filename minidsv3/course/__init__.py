"""What the notebooks share: one set-up, checks against the package, predictions, exercises and the table of symbols."""

from .compare import check
from .desk import attempt, exercise, quiz, setup, solution
from .predict import reveal
from .symbols import symbols

__all__ = ["attempt", "check", "exercise", "quiz", "reveal", "setup", "solution", "symbols"]
