"""What a stored notebook may hold. Each rule returns sentences, and is proved by a notebook that it refuses."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebooks import FOLDER, NotebookFailed, normalise, process, strip_text
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minidsv3.course.desk import EXERCISES, QUESTIONS

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BUDGET = 0                  # cells in the whole course that nbval may skip or not compare
MOST_BYTES = 300_000
MOST_LINES = 25
LEAST_FIGURES = 2
IGNORED = ("nbval-skip", "nbval-ignore-output")
CHANGES = {                 # what must not be in a stored text, because it differs between two runs or two machines
    "a path": re.compile(r"(?<![\w.:/])/(work|home|root|Users|tmp|mnt|usr|opt)/|[A-Z]:\\\\"),
    "an address": re.compile(r"\b0x[0-9a-f]{6,}"),
    "a version": re.compile(r"\b(torch|numpy|matplotlib|[Pp]ython)[ =]*\d+\.\d+"),
    "a duration": re.compile(r"\d ?(ms|µs|us|s|sec|seconds)\b(?! a| per)|\d\d:\d\d|it/s|tokens/s"),
}


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def figures(notebook: NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def stored_texts(notebook: NotebookNode) -> list[str]:
    streams = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    return streams + [value for output in outputs(notebook) for kind, value in output.get("data", {}).items()
                      if kind.startswith("text/")]


def ignored_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Cells that nbval would not compare: by tag, or by the comment it reads in the source."""
    return [cell for cell in code(notebook) if set(IGNORED) & set(cell.metadata.get("tags", ()))
            or re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source, re.M)]


def ran_once_from_the_top(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}, not 1..{len(counts)}"]


def without_errors(notebook):
    return [f"stored {output.output_type} {output.get('name', '')}" for output in outputs(notebook)
            if output.output_type == "error" or output.get("name") == "stderr"]


def cells_are_short_and_say_what_they_show(notebook):
    faults = []
    for cell in code(notebook):
        lines = cell.source.rstrip().splitlines()
        if not lines:
            faults.append("an empty code cell")
        elif lines[-1].rstrip().endswith(";"):
            faults.append(f"a trailing ';', which nbval does not see as silence: {lines[-1]}")
        if len(lines) > MOST_LINES:
            faults.append(f"a cell of {len(lines)} lines, {MOST_LINES} at most: {lines[0]}")
    return faults


def nothing_that_changes(notebook):
    return [f"stored {what}: {found[0]!r}" for text in stored_texts(notebook) for what, pattern in CHANGES.items()
            if (found := pattern.search(text))]


def is_normal(notebook):
    """No widget states, timings or versions: `make notebooks` writes all that back as it is here."""
    return [] if normalise(notebook) == notebook else ["metadata or outputs differ from what make notebooks writes"]


def shows_figures(notebook):
    count = len(figures(notebook))
    return [] if count >= LEAST_FIGURES else [f"{count} figures, {LEAST_FIGURES} at least"]


def figures_are_described(notebook):
    """Some Markdown follows each figure directly: the sentence on what to see, for readers with and without eyes."""
    faults = []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None]):
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if drawn and (following is None or following.cell_type != "markdown"):
            faults.append(f"no sentence after the figure of: {cell.source.splitlines()[0]}")
    return faults


def is_small(notebook):
    size = len(nbformat.writes(notebook).encode())
    return [] if size <= MOST_BYTES else [f"{size} bytes, {MOST_BYTES} at most: GitHub shows no larger ones well"]


RULES = (ran_once_from_the_top, without_errors, cells_are_short_and_say_what_they_show, nothing_that_changes, is_normal,
         shows_figures, figures_are_described, is_small)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook(path, rule):
    assert not rule(nbformat.read(path, as_version=4))


def test_budget_of_ignored_cells():
    assert sum(len(ignored_cells(nbformat.read(path, as_version=4))) for path in NOTEBOOKS) <= BUDGET


def missing_tasks(notebook: NotebookNode, chapter: int) -> list[str]:
    """Exercises and questions of the chapter that the notebook leaves out, by id."""
    source = "\n".join(cell.source for cell in code(notebook))
    def here(id: str) -> bool:
        return int(id.partition(".")[0]) == chapter
    calls = [f'course.attempt("{id}", {stub_name(task)})' for id, task in EXERCISES.items() if here(id)]
    calls += [f'course.quiz("{id}"' for id in QUESTIONS if here(id)]
    return [call for call in calls if call not in source]


def stub_name(task) -> str:
    return re.search(r"^def (\w+)", task.stub, re.M)[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_holds_its_exercises_and_questions(path):
    assert not missing_tasks(nbformat.read(path, as_version=4), int(path.stem[:2]))


def test_missing_tasks_are_seen():
    notebook = good_notebook()
    assert len(missing_tasks(notebook, 0)) == 10
    notebook.cells.append(new_code_cell('course.attempt("0.1", attention_parameters)\ncourse.quiz("00.loss", choice)'))
    assert len(missing_tasks(notebook, 0)) == 8


# ---- each rule refuses what it should -------------------------------------------------------------------------------

ONE_PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def figure() -> NotebookNode:
    return new_output("display_data", data={"image/png": ONE_PIXEL, "text/plain": "<Figure>"})


def good_notebook() -> NotebookNode:
    cells = [new_markdown_cell("# A chapter")]
    for number in (1, 2):
        cells.append(new_code_cell(f"draw({number})", execution_count=number, outputs=[figure()]))
        cells.append(new_markdown_cell("What to see."))
    said = new_output("stream", name="stdout", text="heads: ok (tol 1e-10)\n2,664,000 hours at 5 s a step\n")
    cells.append(new_code_cell("check()", execution_count=3, outputs=[said]))
    return normalise(new_notebook(cells=cells))


def say(text: str, name: str = "stdout"):
    def spoil(notebook):
        code(notebook)[-1].outputs = [new_output("stream", name=name, text=text)]
    return spoil


def write(source: str):
    def spoil(notebook):
        code(notebook)[-1].source = source
    return spoil


def unrun(notebook):
    code(notebook)[-1].execution_count = None


def without_figure(notebook):
    code(notebook)[0].outputs = []


def without_sentence(notebook):
    del notebook.cells[2]


def with_error(notebook):
    code(notebook)[-1].outputs = [new_output("error", ename="ValueError", evalue="", traceback=[])]


def with_widget_states(notebook):
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def with_timings(notebook):
    code(notebook)[0].metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}


SPOILT = [
    (ran_once_from_the_top, unrun), (without_errors, with_error), (without_errors, say("UserWarning", "stderr")),
    (cells_are_short_and_say_what_they_show, write("")), (cells_are_short_and_say_what_they_show, write("plot(x);")),
    (cells_are_short_and_say_what_they_show, write("\n".join("x" * 26))),
    (nothing_that_changes, say(f"saved to {Path.home()}/run")), (nothing_that_changes, say("<object at 0x7f01c2aa>")),
    (nothing_that_changes, say("torch 2.13.0")), (nothing_that_changes, say("took 3.2 s")),
    (nothing_that_changes, say("0/3 [00:00<?, ?it/s]")),
    (is_normal, with_widget_states), (is_normal, with_timings),
    (shows_figures, without_figure), (figures_are_described, without_sentence), (is_small, say("x" * MOST_BYTES)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_pass_a_good_notebook(rule):
    assert not rule(good_notebook())


@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_rules_refuse_a_bad_notebook(number):
    rule, spoil = SPOILT[number]
    notebook = good_notebook()
    spoil(notebook)
    assert rule(notebook)
    assert set(RULES) == {rule for rule, _ in SPOILT}


@pytest.mark.parametrize("source, tags", [("f()", ["nbval-skip"]), ("f()", ["nbval-ignore-output"]),
                                          ("# NBVAL_IGNORE_OUTPUT\nf()", [])])
def test_ignored_cells_are_counted(source, tags):
    notebook = good_notebook()
    notebook.cells.append(new_code_cell(source, metadata={"tags": tags}))
    assert len(ignored_cells(notebook)) == 1


# ---- the script that rebuilds ---------------------------------------------------------------------------------------


def written(path: Path, *sources: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_rebuilding_twice_leaves_no_difference(tmp_path):
    """Figures, widgets and prints: what a chapter stores."""
    path = written(tmp_path / "a.ipynb", "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
                   "from ipywidgets import IntSlider\nIntSlider()", "print(1)\nprint(2)")
    process(path, write=True)
    first = path.read_bytes()
    process(path, write=True)
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert not is_normal(notebook) and not ran_once_from_the_top(notebook) and len(figures(notebook)) == 1
    assert b"tEXt" not in base64.b64decode(figures(notebook)[0])


@pytest.mark.parametrize("source", ["1 / 0", "import warnings; warnings.warn('old')"])
def test_rebuilding_refuses(tmp_path, source):
    path = written(tmp_path / "a.ipynb", source)
    before = path.read_bytes()
    with pytest.raises(NotebookFailed):
        process(path, write=True)
    assert path.read_bytes() == before


def test_strip_text_leaves_the_picture():
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    picture, text, file = Image.linear_gradient("L"), PngInfo(), io.BytesIO()
    text.add_text("Software", "some program 1.2.3")
    picture.save(file, "png", pnginfo=text)
    stripped = strip_text(file.getvalue())
    assert b"Software" not in stripped
    assert Image.open(io.BytesIO(stripped)).tobytes() == picture.tobytes()
