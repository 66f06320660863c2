"""A folder or a file appears on disk whole or not at all, whatever kills the process or fills the disk.

The recipe is the old one of databases: write under another name, fsync every file and the folder, rename (the one step
that a file system makes atomic), fsync the parent. Checkpoints (`checkpoint.py`) and training states (`run_state.py`)
are written this way.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the sentence names the file or tensor and what is wrong with it."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary sibling to fill; when the block ends, it is `path`, and what stood there is gone.

    A folder cannot be renamed over another in one step, so an old one is first set aside as `{path}.replaced` and
    removed last: a crash leaves at least one of the two whole. If the block raises, `path` is as it was and the
    temporary folder is gone. Raises `CheckpointError` if the system refuses to write, as when the disk is full.
    """
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f"{path.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        _rename_over(temporary, path, replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _refusal(path, error) from error
        raise


def _rename_over(source: Path, path: Path, replaced: Path) -> None:
    if path.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(path, replaced)
    try:
        os.rename(source, path)
        fsync(path.parent)
    except OSError:
        if not source.exists():
            os.rename(path, source)
        if replaced.exists():
            os.rename(replaced, path)
        raise


def replace_file(path: Path, text: str) -> None:
    """The file `path` holds `text`, or, after a crash, still what it held before. Raises `CheckpointError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _refusal(path, error) from error


def fsync(path: Path) -> None:
    """Returns when the file's or folder's content is on the disk itself."""
    if path.is_dir() and os.name == "nt":   # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"{path} could not be written ({reason}); what was saved before is untouched")
