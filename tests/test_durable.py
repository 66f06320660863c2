"""Whole or not at all: folders and files under crashes at every step, a full disk and errors of the caller."""

import os
import shutil
from pathlib import Path

import pytest
from crash import every_crash, every_full_disk

from minidsv3 import durable
from minidsv3.durable import CheckpointError, replace_file, whole_folder


@pytest.fixture(autouse=True)
def unsynced(monkeypatch) -> None:
    """Here processes die, not machines: nobody needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(path: Path, text: str) -> None:
    with whole_folder(path) as new:
        (new / "a").write_text(text)
        (new / "b").write_text(text)


def read(path: Path) -> set[str]:
    return {file.read_text() for file in path.iterdir()}


def whole_after_every_crash(tmp_path: Path) -> int:
    """Whether an old folder that is being replaced, or its replacement, is whole wherever the process died."""
    path, aside = tmp_path / "x", tmp_path / "x.replaced"

    def fresh() -> None:
        shutil.rmtree(tmp_path)
        write(path, "old")

    def check() -> None:
        survivor = path if path.exists() else aside
        assert read(survivor) in ({"old"}, {"new"}) and len(list(survivor.iterdir())) == 2
        write(path, "next")     # and what the dead process left behind is in nobody's way
        assert read(path) == {"next"} and os.listdir(tmp_path) == ["x"]

    return every_crash(lambda: write(path, "new"), check, fresh)


def test_a_crash_at_any_step_leaves_the_old_or_the_new_folder(tmp_path):
    assert whole_after_every_crash(tmp_path) >= 11


def mutant_rename_over(source: Path, path: Path, replaced: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    os.rename(source, path)


def test_removing_the_old_folder_first_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_rename_over", mutant_rename_over)
    with pytest.raises((AssertionError, FileNotFoundError)):
        whole_after_every_crash(tmp_path)


def recorded(patch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk, in order: ("sync", name) and ("rename", new name)."""
    events, fsync, rename = [], durable.fsync, os.rename
    patch.setattr(durable, "fsync", lambda path: (events.append(("sync", path.name)), fsync(path)))
    for name in ("rename", "replace"):
        patch.setattr(os, name, lambda old, new: (events.append(("rename", new.name)), rename(old, new)))
    return events


def test_everything_is_on_the_disk_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    write(tmp_path / "x", "new")
    assert set(events[:2]) == {("sync", "a"), ("sync", "b")}
    assert events[2:] == [("sync", ".x.tmp"), ("rename", "x"), ("sync", tmp_path.name)]
    events.clear()
    replace_file(tmp_path / "latest", "x")
    assert events == [("sync", ".latest.tmp"), ("rename", "latest"), ("sync", tmp_path.name)]


def test_fsync_reaches_the_system_for_files_and_folders(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    (tmp_path / "a").write_text("a")
    durable.fsync(tmp_path / "a")
    durable.fsync(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_a_full_disk_gives_a_sentence_and_leaves_the_old_folder(tmp_path):
    path = tmp_path / "x"
    write(path, "old")

    def check() -> None:
        assert read(path) in ({"old"}, {"new"}) and os.listdir(tmp_path) == ["x"]

    assert every_full_disk(lambda: write(path, "new"), check) >= 6


def test_an_error_of_the_caller_passes_through_and_nothing_remains(tmp_path):
    write(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path / "x") as new:
            (new / "a").write_text("half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x"] and read(tmp_path / "x") == {"old"}


def test_a_crash_leaves_the_old_or_the_new_pointer(tmp_path):
    pointer = tmp_path / "latest"
    crashes = every_crash(lambda: replace_file(pointer, "new"), lambda: pointer.read_text() in ("old", "new") or 1 / 0,
                          lambda: pointer.write_text("old"))
    assert crashes == 4


def test_a_folder_that_cannot_be_made_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="x could not be written .*; what was saved before is untouched"):
        write(tmp_path / "file" / "x", "new")
