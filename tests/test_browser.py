"""The course as readers meet it: JupyterLab in Chromium, a slider moved by the keyboard, other numbers in the drawing.

Of each notebook only the view's cell runs, and the cells that define the names it uses (`view_cells.py`): they are
copied into a notebook of their own, and the training of a chapter, which the view does not wait for, stays out. That
every cell runs is tested without a browser. Screenshots go to `build/browser/`.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from notebooks import FOLDER, METADATA
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright
from view_cells import views_of

ROOT = FOLDER.parent
SCREENSHOTS = ROOT / "build" / "browser"
PATIENCE = 90           # seconds, for each thing that the test waits for
MOST_TABS = 80          # how often Tab may be pressed before it reaches a control: menus and toolbars come first
NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}


class Move(NamedTuple):
    """One control of a chapter's view, a key for it, and a number in the drawing which must then be another."""

    notebook: str
    view: str           # the variable in the notebook
    control: str        # its description, as the reader sees it
    key: str
    number: str         # a regular expression with one group


MOVES = [
    Move("00_overview", "dial", "routed experts in a layer", "ArrowRight", r"Stored: (\S+ \S) parameters"),
    Move("01_mla", "calculator", "tokens asked at once, T", "ArrowRight", r"absorbed: (.+)"),
    Move("02_router", "explorer", "layer with experts", "ArrowLeft", r"next: (.+)"),
    Move("03_mtp", "view", "acceptance p (%)", "ArrowLeft", r"yours, c = \S+ (\S+) times"),
    Move("04_fp8", "explorer", "sizes of rows differ by e^n, n", "ArrowRight", r"(\d+) of 126 magnitudes"),
    Move("05_kernels", "stepper", "rows of a tile", "ArrowLeft", r"(\d+) FLOP a byte"),
    Move("06_expert_parallelism", "explorer", "redundant copies (slots a GPU)", "ArrowRight",
         r"fullest (\S+) times the mean \(dashed"),
    Move("07_dualpipe", "explorer", "ranks P", "ArrowLeft", r"in all (\S+)"),
]


# ---- JupyterLab -----------------------------------------------------------------------------------------------------

@contextmanager
def jupyter(command: list[str], folder: Path, home: Path, opens: str = "jpserver-[0-9]*-open.html") -> Iterator[dict]:
    """Runs a command that starts Jupyter; gives what the server says about itself, and the `page` that it opens.

    Settings, kernels, tokens and trust live under `home`; the port is any free one of the loopback; no browser opens.
    """
    settings = home / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(NO_NEWS))
    checkpoints = {"FileCheckpoints": {"checkpoint_dir": str(home / "checkpoints")}}    # not beside the notebooks
    (home / "config/jupyter_server_config.json").write_text(json.dumps(checkpoints))
    runtime = home / "runtime"
    environment = os.environ | {
        "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(runtime), "IPYTHONDIR": str(home / "ipython"), "BROWSER": "true",
        "JUPYTER_PORT": "0", "JUPYTER_TOKEN": secrets.token_hex(16)}
    with open(home / "log", "w+") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            page = wait_for(server, runtime, opens, log.name)
            yield json.loads(next(runtime.glob("jpserver-*.json")).read_text()) | {"page": page}
        finally:
            end(server)


def wait_for(server: subprocess.Popen, folder: Path, pattern: str, log: str) -> Path:
    """The file that Jupyter writes last before it serves: a page that leads to the notebook."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        if found := [path for path in folder.glob(pattern) if path.stat().st_size]:
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{Path(log).read_text()[-2000:]}")


def end(server: subprocess.Popen) -> None:
    """Ends the server, which ends its kernels; kills what does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(20)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


# ---- Chromium -------------------------------------------------------------------------------------------------------

def required(found: list[str | None], environment: dict) -> str:
    """The first path that was found. Without one the test is skipped, under CI=true it fails."""
    if paths := list(filter(None, found)):
        return paths[0]
    sentence = f"the test in a browser needs {' or '.join(NAMES)}; on Debian: apt-get install chromium"
    (pytest.fail if environment.get("CI") == "true" else pytest.skip)(sentence)


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    """Chromium with one cache for all tests, which load JupyterLab again and again."""
    path = required([shutil.which(name) for name in NAMES], os.environ)
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, timeout=1000 * PATIENCE)
        yield chromium.new_context(viewport={"width": 1400, "height": 1400})
        chromium.close()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory) -> Iterator[dict]:
    """A server in an empty folder, beside which notebooks find `../results`."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    (root / "results").symlink_to(ROOT / "results")
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser"]
    with jupyter(command, root / "notebooks", root / "home") as server:
        yield server


@pytest.fixture
def made_lab(browser, tmp_path) -> Iterator[dict]:
    """The server of `make lab`. `.venv` is taken as it is: setting it up again is no part of these tests."""
    if not (ROOT / ".venv/bin/jupyter").exists():
        pytest.skip("there is no .venv, so `make lab` would have to install it first")
    command = ["make", "--old-file=.venv/.ready", "lab"]
    with jupyter(command, ROOT, tmp_path, opens="jpserver-file-to-run-*-open.html") as server:
        yield server


@pytest.fixture
def page(browser, request) -> Iterator[Page]:
    """A page, of which a screenshot is kept as it looked at the end of the test, also of one that failed."""
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    yield page
    page.screenshot(path=SCREENSHOTS / f"{re.sub(r'[^-0-9A-Za-z]+', '_', request.node.name)}.png")
    page.close()


# ---- what a reader does ---------------------------------------------------------------------------------------------

def open_view(page: Page, lab: dict, sources: list[str]) -> Locator:
    """Opens a notebook of these cells in JupyterLab, runs it from the menu, and waits for its view."""
    name = secrets.token_hex(4)         # a workspace of its own, or JupyterLab shows the notebook of the last test too
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell(source) for source in sources], metadata=METADATA)
    nbformat.write(notebook, Path(lab["root_dir"]) / f"{name}.ipynb")
    page.goto(f"{lab['url']}lab/workspaces/{name}/tree/{name}.ipynb?token={lab['token']}")
    expect(page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(len(sources))
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()     # cells run earlier may be forgotten
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    failure = page.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type$='stderr']")
    view = page.locator(".widget-vbox").first
    view.or_(failure).first.wait_for()
    assert not failure.all_inner_texts()
    view.locator("svg").first.wait_for()
    return view


def cut_descriptions(view: Locator) -> list[str]:
    """Descriptions of controls that end in an ellipsis, because they are wider than their place."""
    labels = view.locator(".widget-label")
    return labels.evaluate_all("labels => labels.filter(l => l.scrollWidth > l.clientWidth).map(l => l.textContent)")


def move_by_keyboard(page: Page, view: Locator, move: Move, patience: float = PATIENCE) -> None:
    """Tab to the control, one key; AssertionError unless the control and then the drawn number change in time."""
    control = view.locator(".widget-inline-hbox", has=page.get_by_text(move.control, exact=True)).get_by_role("slider")
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        if control.evaluate("element => element === document.activeElement"):
            break
    expect(control, f"Tab never reached {move.control!r}").to_be_focused(timeout=1000)
    value, drawn = control.get_attribute("aria-valuenow"), drawn_number(view, move)
    page.keyboard.press(move.key)
    expect(control).not_to_have_attribute("aria-valuenow", value, timeout=1000 * patience)
    expect(view.locator("svg text", has_text=drawn[0])).to_have_count(0, timeout=1000 * patience)
    assert drawn_number(view, move)[1] != drawn[1]


def drawn_number(view: Locator, move: Move) -> re.Match:
    """The one place in the texts of the drawing that the move's expression fits."""
    texts = view.locator("svg text").all_text_contents()
    (found,) = [match for text in texts if (match := re.search(move.number, text))]
    return found


def cells_of(move: Move) -> list[str]:
    (view,) = [view for view in views_of(FOLDER / f"{move.notebook}.ipynb") if view.name == move.view]
    return [cell.source for cell in view.cells]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.notebook)
def test_a_slider_moved_by_the_keyboard_changes_the_drawing(move, lab, page):
    view = open_view(page, lab, cells_of(move))
    assert not cut_descriptions(view)
    move_by_keyboard(page, view, move)
    view.locator("svg").scroll_into_view_if_needed()        # for the screenshot


def test_faults_of_a_view_are_seen(lab, page):
    """Mutations: a description too long for its place, and a drawing that stays when a control moves."""
    move, long = MOVES[0], "layers, " * 9 + "and layers"
    spoil = (f"{move.view}.controls['layers'].description = '{long}'\n"
             f"{move.view}._render = lambda state, drawn={move.view}.drawing.value: drawn")
    view = open_view(page, lab, [*cells_of(move), spoil])
    expect(view.get_by_text(long)).to_be_visible()
    assert cut_descriptions(view) == [long]
    with pytest.raises(AssertionError, match="svg text"):
        move_by_keyboard(page, view, move, patience=3)


def test_make_lab_opens_the_course(made_lab, page):
    page.goto(made_lab["page"].as_uri())
    expect(page.get_by_role("heading", name="00 Overview")).to_be_visible()
    assert re.fullmatch(r"http://(127\.0\.0\.1|localhost):\d+/lab/tree/00_overview\.ipynb", page.url)


def test_every_view_has_a_move():
    views = {(path.stem, view.name) for path in FOLDER.glob("*.ipynb") for view in views_of(path)}
    assert {(move.notebook, move.view) for move in MOVES} == views


def test_without_chromium_it_is_skipped_but_not_in_continuous_integration():
    assert required([None, "b", "c"], {"CI": "true"}) == "b"
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        required([None], {})
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        required([None], {"CI": "true"})

