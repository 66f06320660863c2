"""Predict, then run: a number guessed before it is computed, and questions whose wrong options are common beliefs.

A notebook is stored with `guess = None` and no choice made, so that its outputs are the same for everybody.
"""

from dataclasses import dataclass

CLOSE = 1.1     # a guess within ten percent is called right


def reveal(question: str, guess: float | None, value: float, unit: str = "") -> None:
    """Prints `value`, and how many times off `guess` was; with None the value alone. Whole numbers are printed exactly.

    Raises ValueError for a guess that is no positive number: "how many times off" would have no meaning.
    """
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    print(f"{question}: {shown} {unit}".rstrip())
    if guess is None:
        return
    if not guess > 0:
        raise ValueError(f"the guess is {guess!r}; it must be a positive number, or None to see the value alone")
    times = max(guess / value, value / guess)
    verdict = "right within ten percent" if times <= CLOSE else (
        f"{times:,.1f} times too {'large' if guess > value else 'small'}")
    print(f"Your guess of {guess:,} was {verdict}.")


@dataclass(frozen=True)
class Option:
    """One answer to a question. `because` answers it: why it is right, or which belief it is and what corrects it."""

    text: str
    because: str


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: every wrong option is a belief that people do hold."""

    text: str
    options: tuple[Option, ...]
    right: int

    def ask(self, choice: str | None = None) -> str:
        """The question with its options as letters, or the answer to the letter that was chosen. Raises ValueError."""
        letters = "abcdefgh"[:len(self.options)]
        if choice is None:
            options = [f"  {letter}) {option.text}" for letter, option in zip(letters, self.options)]
            return "\n".join([self.text, *options])
        if choice not in letters or len(choice) != 1:
            raise ValueError(f"the choice is {choice!r}; it must be one of {', '.join(letters)}, "
                             "or None to see the question")
        number = letters.index(choice)
        return f"{choice}) is {'right' if number == self.right else 'not right'}: {self.options[number].because}"
