"""`python -m minidsv3`: the command line."""

from .cli import app

app(prog_name="python -m minidsv3")
