"""A copy of a module with one place of its source changed: shows that a comparison sees that change."""

import importlib.util
from itertools import count
from pathlib import Path
from types import ModuleType

_numbers = count()


def mutated(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """`module` with `right` replaced by `wrong`, imported from `folder`; its operators get names of their own."""
    source = Path(module.__file__).read_text()
    assert right in source, f"{module.__name__} has no {right!r}"
    number = next(_numbers)
    path = folder / f"mutant{number}.py"
    path.write_text(source.replace(right, wrong).replace("minidsv3::", f"mutant{number}::"))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.mutant{number}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
