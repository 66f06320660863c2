"""Deaths at chosen moments: a process that stops at its k-th call to the file system, or a disk that refuses it."""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHANGES = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")   # what our code and pathlib and shutil call
WRITES = ("write_text", "write_bytes")                                 # of Path: the dying one leaves half a file
NEED_SPACE = ("mkdir", "fsync", "rename", "replace")


class Crash(BaseException):
    """The process is gone: nothing after this reaches the disk, clean-up included."""


def every_crash(action: Callable[[], object], check: Callable[[], object], prepare: Callable[[], object]) -> int:
    """Runs prepare, action and check again and again, action dying at its 1st, 2nd, .. change; returns how often."""
    for step in itertools.count(1):
        prepare()
        with pytest.MonkeyPatch.context() as patch:
            calls = itertools.count(1)
            for name in CHANGES:
                patch.setattr(os, name, _dying(getattr(os, name), calls, step))
            for name in WRITES:
                patch.setattr(Path, name, _dying_in_the_middle(getattr(Path, name), calls, step))
            try:
                action()
                return step - 1
            except Crash:
                pass
        check()


def _dying(real: Callable, calls: Iterator[int], step: int) -> Callable:
    def call(*args, **kwargs):
        if next(calls) >= step:
            raise Crash
        return real(*args, **kwargs)
    return call


def _dying_in_the_middle(write: Callable, calls: Iterator[int], step: int) -> Callable:
    def call(path, content, **kwargs):
        if next(calls) >= step:
            write(path, content[:len(content) // 2], **kwargs)
            raise Crash
        return write(path, content, **kwargs)
    return call


def every_full_disk(action: Callable[[], object], check: Callable[[], object]) -> int:
    """As `every_crash`, but the step is refused with ENOSPC, the process lives on and must raise a ValueError."""
    for step in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            calls = itertools.count(1)
            for name in NEED_SPACE:
                patch.setattr(os, name, _refused_once(getattr(os, name), calls, step))
            try:
                action()
            except ValueError as error:
                assert os.strerror(errno.ENOSPC) in str(error)
            if next(calls) <= step:
                return step - 1
        check()


def _refused_once(real: Callable, calls: Iterator[int], step: int) -> Callable:
    def call(*args, **kwargs):
        if next(calls) == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)
    return call


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """The system itself refuses files above `size` bytes, whoever writes them."""
    import resource   # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
