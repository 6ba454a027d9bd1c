"""Files that are there whole or not at all: write-then-rename, locks, hashes, and the folder for downloads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """``$PERMDISTILL_CACHE``, or ``~/.cache/permdistill``."""
    return Path(os.environ.get("PERMDISTILL_CACHE") or Path.home() / ".cache" / "permdistill").expanduser()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` (made if need be) as a lock: of two processes that make the same thing, the second waits for the first.

    The system frees the lock when the process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the block ends without an error.

    Its name is hidden and this process's own, so that two writers of one file do not meet. Folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
