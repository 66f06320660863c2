"""The house stands: imports go down the floors, the two ways to install agree, and nothing needs Triton."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("minidsv3.kernels", "minidsv3", "minidsv3.parallel", "minidsv3.course", "minidsv3.views")
ENTRANCE = {"minidsv3.cli", "minidsv3.__main__"}     # the command line trains and plans on many GPUs
DRAWING = {"matplotlib", "ipywidgets", "IPython"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("minidsv3", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("minidsv3/**/*.py")])


def statements(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node below `node`; without `inside_functions` only what runs while the module is imported."""
    for child in ast.iter_child_nodes(node):
        if inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from statements(child, inside_functions)


def imports(source: str, module: str, is_package: bool, inside_functions: bool = True) -> set[str]:
    """Absolute names of the modules that `source` imports, and of what it takes from them."""
    names = set()
    for node in statements(ast.parse(source), inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[:len(base) - node.level + is_package] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names |= {target, *(f"{target}.{alias.name}" for alias in node.names)}
    return names


def floor(module: str) -> int:
    if module in ENTRANCE:
        return FLOORS.index("minidsv3.parallel")
    return FLOORS.index(max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len))


def breaks_floors(source: str, module: str, is_package: bool = False) -> list[str]:
    """Sentences on what in `source` reaches upwards, draws outside the views, or needs Triton to be imported."""
    used = imports(source, module, is_package)
    own = [name for name in used if name == "minidsv3" or name.startswith("minidsv3.")]
    faults = [f"{module} imports {name} from a floor above" for name in own if floor(name) > floor(module)]
    if floor(module) < FLOORS.index("minidsv3.views"):
        faults += [f"{module} imports {name}: only the views draw" for name in used if name.split(".")[0] in DRAWING]
    top = imports(source, module, is_package, inside_functions=False)
    if module != "minidsv3.kernels.backend":   # which goes on without it
        faults += [f"{module} imports triton at its top" for name in top if name.split(".")[0] == "triton"]
    return faults


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_down(path):
    assert not breaks_floors(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


@pytest.mark.parametrize("source, module", [
    ("from ..views import figures", "minidsv3.course.overview"),
    ("from minidsv3 import parallel", "minidsv3.train"),
    ("from . import cli", "minidsv3.train"),
    ("from .course import desk", "minidsv3.cli"),
    ("from ..course import check", "minidsv3.parallel.placement"),
    ("def f():\n    from ..config import ModelConfig", "minidsv3.kernels.route"),
    ("import matplotlib.pyplot as plt", "minidsv3.cost"),
    ("import triton", "minidsv3.kernels.route"),
    ("try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None", "minidsv3.kernels.route"),
])
def test_floor_rules_catch(source, module):
    assert breaks_floors(source, module)


def test_floor_rules_allow():
    assert not breaks_floors("def f():\n    import triton", "minidsv3.kernels.route")
    assert not breaks_floors("from ..parallel.placement import placement", "minidsv3.course.experts")
    assert not breaks_floors("import matplotlib\nfrom ..cost import parameters", "minidsv3.views.dial")


def test_imports_without_triton():
    """macOS and Windows have no Triton: every module imports where the import of it fails."""
    modules = [module_name(path) for path in sources() if path.name != "__main__.py"]
    blocker = ("import importlib, sys; sys.modules['triton'] = None\n"
               "for name in sys.argv[1:]: importlib.import_module(name)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocker, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_folder_under_its_own_name_is_no_second_copy():
    """transformers tries `import kernels`, which is another project's: modules loaded twice would register every
    operator twice, and the second would take the first one's place."""
    program = """import kernels, sys
import minidsv3.kernels
assert kernels is not minidsv3.kernels and kernels.rms_norm is minidsv3.kernels.rms_norm
assert [name for name in sys.modules if name.startswith("kernels.")] == []"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# ---- two ways to install --------------------------------------------------------------------------------------------


def makefile_arguments() -> str:
    (line,) = re.findall(r"-m pip install (.*)", (ROOT / "Makefile").read_text())
    return line


def conda_arguments() -> str:
    """The pip section of environment.yml, whose lines are what pip calls a requirements file."""
    section = (ROOT / "environment.yml").read_text().split("- pip:\n")[1]
    return " ".join(re.findall(r"^      - (.*)$", section, re.M))


def meaning(arguments: str) -> set[str]:
    quiet = {"--quiet", "--disable-pip-version-check"}
    return set(arguments.replace("'", "").replace("--", " --").split()) - quiet


def test_pip_and_conda_install_the_same():
    assert meaning(makefile_arguments()) == meaning(conda_arguments())
    assert {"--constraint", "constraints.txt", "--editable", ".[test]"} == meaning(conda_arguments())


def test_conda_offers_a_python_that_the_project_accepts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"- python{project['requires-python']}\n" in (ROOT / "environment.yml").read_text()


def requirement_names(lines: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}


def test_everything_named_is_pinned_and_the_pins_are_what_runs():
    from importlib.metadata import version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    needed = requirement_names(project["dependencies"] + project["optional-dependencies"]["test"])
    assert needed <= requirement_names(pins)
    for pin in pins:
        name, _, number = pin.partition("==")
        found = version(name).partition("+")[0]
        assert found == number, f"{name} {found} is installed, constraints.txt has {number}"


def test_every_package_is_declared():
    """A new folder with an __init__.py must be listed in pyproject.toml, or wheels come without it."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert declared == {module_name(path) for path in sources() if path.name == "__init__.py"}


def test_ci_runs_what_exists():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    named = re.findall(r"tests/\w+\.py|\.ci/\w+", workflow)
    assert ".ci/run" in named and all((ROOT / path).is_file() for path in named)
    assert "exec make test" in (ROOT / ".ci/run").read_text()


def test_make_lab_opens_a_notebook_that_exists():
    (path,) = re.findall(r"notebooks/\w+\.ipynb", (ROOT / "Makefile").read_text())
    assert (ROOT / path).is_file()


# ---- what the repository says ---------------------------------------------------------------------------------------

LOCAL_PATH = re.compile(r"(?<![\w.:/])/(work|home|root|Users|tmp|mnt)/")


def texts() -> list[Path]:
    folders = ("", "docs/", "notebooks/", "minidsv3/**/", "kernels/**/", "tools/", "tests/**/")
    kinds = ("*.md", "*.py", "*.ipynb", "*.toml", "*.yml")
    found = {path for folder in folders for kind in kinds for path in ROOT.glob(folder + kind)}
    return sorted(found - {Path(__file__)})


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    assert not LOCAL_PATH.search(text)


def test_local_paths_are_seen():
    assert LOCAL_PATH.search("open('/home/ada/x')")
    assert not LOCAL_PATH.search("https://example.org/home/x and docs/work/x")


def too_long(source: str, columns: int = 120) -> list[int]:
    """Numbers of the lines with more characters than `columns`."""
    return [number for number, line in enumerate(source.splitlines(), start=1) if len(line) > columns]


def test_no_python_line_is_longer_than_120_columns():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert Path(__file__) in paths
    faults = [f"{path.relative_to(ROOT)}:{number}" for path in paths
              for number in too_long(path.read_text(encoding="utf-8"))]
    assert not faults, f"longer than 120 columns: {', '.join(faults)}"


def test_long_lines_are_seen():
    assert too_long("\n" + "é" * 120 + "\n" + "x" * 121 + "\n") == [3]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_modules_open_with_a_docstring(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.name} should begin by saying what it is and where the equation is"
