"""Executes every notebook in a fresh kernel and stores what it showed. Running it twice leaves no difference.

    python tools/notebooks.py                        all notebooks, outputs written back
    python tools/notebooks.py --check                all notebooks, nothing written
    python tools/notebooks.py notebooks/00_overview.ipynb

A cell that raises, or writes to stderr (a warning does), fails the run. What would differ between two runs or two
machines is not stored: timings, versions, widget states, and the name of the program that wrote a figure.
"""

import argparse
import base64
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

# The kernels inherit one thread: with two, sums come in another order and last digits move.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellControlSignal, DeadKernelError  # noqa: E402
from nbformat import NotebookNode  # noqa: E402

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT = 300      # seconds, as for nbval
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = ("tags", "slideshow", "nbgrader", "jupyter")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class NotebookFailed(Exception):
    """A cell raised or wrote to stderr; the sentence says which."""


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with outputs of a fresh kernel that works in `folder`. Raises NotebookFailed."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(stderr=subprocess.DEVNULL)   # the kernel's own log; what cells write arrives as outputs
    except (CellControlSignal, DeadKernelError) as error:   # raised, took too long, or killed its kernel
        raise NotebookFailed(str(error)) from None
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookFailed(f"cell {number} wrote to stderr:\n{cell.source}\n---\n{output.text}")
    return notebook


def normalise(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs between two runs or two machines."""
    notebook = notebook.copy()
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.cells = [nbformat.from_dict(normalise_cell(cell)) for cell in notebook.cells]
    return notebook


def normalise_cell(cell: NotebookNode) -> dict:
    kept = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
    cell = {**cell, "metadata": kept}
    if "outputs" in cell:
        cell["outputs"] = [normalise_output(output) for output in cell["outputs"]]
    return cell


def normalise_output(output: NotebookNode) -> dict:
    """Figures lose the text that names the program; a widget keeps its plain text, which no other kernel can revive."""
    if "data" not in output:
        return dict(output)
    data = {kind: value for kind, value in output["data"].items() if kind != WIDGET_VIEW}
    if "image/png" in data:
        png = strip_text(base64.b64decode(data["image/png"]))
        data["image/png"] = base64.b64encode(png).decode()
    return {**output, "data": data}


def strip_text(png: bytes) -> bytes:
    """The same picture without its tEXt chunks. A chunk is 4 bytes of length, 4 of name, the data, 4 of checksum."""
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at < len(png):
        end = at + 12 + struct.unpack(">I", png[at:at + 4])[0]
        if png[at + 4:at + 8] != b"tEXt":
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def process(path: Path, write: bool) -> None:
    """Executes one notebook, and writes it back if asked and changed. Raises NotebookFailed."""
    before = path.read_text(encoding="utf-8")
    notebook = execute(nbformat.reads(before, as_version=4), path.parent)
    after = nbformat.writes(normalise(notebook)) + "\n"
    if write and after != before:
        path.write_text(after, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook of the course")
    parser.add_argument("--check", action="store_true", help="only execute; write nothing")
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(FOLDER.glob("*.ipynb"))
    failed = []
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.stem} ... ", end="", flush=True)
        start = time.perf_counter()
        try:
            process(path, write=not arguments.check)
            print(f"ok, {time.perf_counter() - start:.0f} s", flush=True)
        except NotebookFailed as error:
            failed.append(path.name)
            print(f"FAILED\n{error}", flush=True)
    print(f"{len(failed)} of {len(paths)} notebooks failed: {', '.join(failed)}" if failed
          else f"all {len(paths)} notebooks ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
