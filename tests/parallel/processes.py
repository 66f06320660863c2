"""Moved to `minidsv3.parallel.processes`, where notebooks can import it; this name goes once no test uses it."""

from minidsv3.parallel.processes import RankFailed, run

__all__ = ["RankFailed", "run"]
