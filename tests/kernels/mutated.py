"""A copy of a kernel's module with one place of its source changed: shows that a comparison sees that change."""

import importlib.util
from itertools import count
from pathlib import Path
from types import ModuleType

import minidsv3.kernels

_numbers = count()
_kept: list[ModuleType] = []    # a mutant that is collected takes its operators along, while torch may hold them


def mutated(name: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """`minidsv3.kernels.<name>` with `right` replaced by `wrong`, by way of a file in `folder`; its operators get names
    of their own."""
    source = Path(minidsv3.kernels.__file__).with_name(f"{name}.py").read_text()
    assert right in source, f"{name} has no {right!r}"
    number = next(_numbers)
    path = folder / f"mutant{number}.py"
    path.write_text(source.replace(right, wrong).replace("minidsv3::", f"mutant{number}::"))
    spec = importlib.util.spec_from_file_location(f"minidsv3.kernels.mutant{number}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    _kept.append(mutant)
    return mutant
