"""Files appear whole or not at all: they are written aside and renamed into place.

What is written aside stands in a folder that is locked while its process lives. A killed process leaves such a folder
behind, unlocked, and the next that writes there removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dopt_api.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows: there, what killed processes leave stays
    fcntl = None

__all__ = ["StrPath", "staged", "write_text"]

StrPath = str | os.PathLike[str]

ASIDE = ".dopt-aside-"
"""What names of folders begin with in which files are written aside."""

MOMENT = 2.0
"""Seconds within which a new folder is locked for certain."""


@contextmanager
def staged(directory: StrPath) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``directory`` when the block succeeds.

    Each file appears by one rename, in alphabetical order. If the block fails, nothing is left behind; nor if a folder
    stands where a file is to appear.

    Args:
        directory: An existing folder.

    Raises:
        OutputError: The folder does not exist or cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with staged(folder) as aside:
        ...         _ = (aside / "a.txt").write_text("all of it")
        ...     os.listdir(folder)
        ['a.txt']
    """
    target = Path(directory)
    if not target.is_dir():
        kind = "is a file" if target.exists() else "does not exist"
        raise OutputError(
            f"The output directory {str(target)!r} {kind}",
            where=str(target.absolute()),
            expected="an existing directory",
            fix=f"Create it, for example by os.makedirs({str(target)!r}), or pass another one.",
        )
    aside: Path | None = None
    lock: int | None = None
    try:
        _remove_orphans(target)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=target))
        lock = _lock(aside)
        yield aside
        files = sorted(aside.iterdir())
        for file in files:
            _refuse_directory(target / file.name)
        for file in files:
            file.replace(target / file.name)
    except OSError as error:
        raise OutputError(
            f"Writing to {str(target)!r} failed: {error.strerror or error}",
            where=str(target.absolute()),
            expected="a writable directory with enough free space",
            fix="Free some space or pass another directory; nothing was left half-written.",
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def write_text(path: StrPath, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all, and return the path.

    Raises:
        OutputError: The folder does not exist or cannot be written, the path is a folder, or the disk is full.
    """
    target = Path(path)
    _refuse_directory(target)
    if target.is_symlink():  # write through the link: renaming onto it would replace the link itself
        with suppress(OSError, RuntimeError):  # a link that leads to itself is replaced
            target = target.resolve()
    with staged(target.parent) as aside:
        (aside / target.name).write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def _lock(folder: Path) -> int | None:
    """Lock a folder until what is returned is closed or the process ends; ``None`` if it is locked or cannot be."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody's, gone, or on a file system without locks
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_orphans(directory: Path) -> None:
    """Remove what killed processes were writing aside."""
    for folder in directory.glob(f"{ASIDE}*"):
        with suppress(OSError):  # another process may be quicker
            young = time.time() - folder.stat().st_mtime < MOMENT and not any(folder.iterdir())
            lock = None if young else _lock(folder)  # an empty one may be another's that is not locked yet
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _refuse_directory(file: Path) -> None:
    if file.is_dir():
        raise OutputError(
            f"{str(file)!r} is a directory",
            where=str(file.absolute()),
            expected="the path of a file",
            fix=f"Remove it, or pass the path of a file, such as {str(file / 'config_gen.json')!r}.",
        )
