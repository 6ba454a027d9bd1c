"""Files that are there whole or not at all: write-then-rename, locks, hashes, and the folder for downloads."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

# What a disk may say in the middle of writing: full, over a quota, over a file's longest, broken.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_SAID = "cannot be written ("
STAMPS = ".stamps.json"
QUIET = 5.0  # seconds that a lock is waited for without a word


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

    The system frees the lock when the process ends, however it ends. Where nothing can be written, nobody makes anything
    either, and the block runs without a lock. Raises OSError for a symbolic link, which is not followed.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=QUIET)
        except Timeout:
            print(f"waiting for another process, which holds {path}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} is a symbolic link, and should be an empty file (a lock): remove it") from None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or _writable(path.parent):
            raise
    try:
        yield
    finally:
        lock.release()


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the block ends without an error, its bytes on disk.

    Its name is hidden and this process's own, so that two writers of one file do not meet. Folders are made. Raises OSError
    that names ``path`` where the disk is full or broken.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # of a killed process with this number, or a link to who knows what
        try:
            yield part
            sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Make ``text`` a file's whole content, see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file, a folder and all in it, or a symbolic link, but never what that leads to; what is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


_SEAL = b"\nsha256 "


def seal(path: Path) -> None:
    """Write the hash of what a file holds at its end, for formats that let something follow and check nothing."""
    sha256 = sha256_of(path)
    with open(path, "ab") as file:
        file.write(_SEAL + sha256.encode())


def sealed(path: Path) -> bool:
    """Whether a file holds what it did when it was sealed. One that never was is taken as it is."""
    with open(path, "rb") as file:
        length = max(0, file.seek(0, os.SEEK_END) - len(_SEAL) - 64)
        file.seek(length)
        end = file.read()
        if not end.startswith(_SEAL):
            return True
        found, left = hashlib.sha256(), length
        file.seek(0)
        while left and (block := file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
    return end == _SEAL + found.hexdigest().encode()


@contextmanager
def disk_errors(path: Path, safe: str = "what was there before is as it was") -> Iterator[None]:
    """Errors of the disk, raised in the block while ``path`` is written, become an OSError that names it and what is
    ``safe``."""
    try:
        yield
    except Exception as error:  # torch hides the system's error in a RuntimeError, safetensors in the text of its own
        told = re.search(r"os error (\d+)", str(error))
        numbers = {int(told[1]) if told else 0, *(getattr(e, "errno", 0) for e in (error, error.__context__))} & _DISK
        if not numbers or _SAID in str(error):
            raise
        number = numbers.pop()
        text = f"{path} {_SAID}{os.strerror(number)}): {safe}; make room, then run the same again"
        raise OSError(number, text) from error


# --------------------------------------------------------------------------------------------------------------------
# Stamps: a file's hash, and its size, time and inode when it was hashed. As long as these stay, it is not read again.


def _mark(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def stamps(folder: Path) -> dict[str, list]:
    """{name: [sha256, size, time, inode]} of a folder's files as they were when they were stamped; {} for none."""
    try:
        found = dict(json.loads((folder / STAMPS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {name: mark for name, mark in found.items() if isinstance(mark, list) and mark and isinstance(mark[0], str)}


def stamp(folder: Path) -> None:
    """Stamp all files of a folder, as they are now, but for hidden ones."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    _keep_stamps(folder, {path.name: [sha256_of(path), *_mark(path)] for path in paths})


def _keep_stamps(folder: Path, marks: dict[str, list]) -> None:
    with suppress(OSError):  # in a folder that cannot be written, files are read each time
        write_text(folder / STAMPS, json.dumps(marks, indent=1) + "\n")


def intact(path: Path, sha256: str = "", thorough: bool = False) -> bool:
    """Whether a file is there with the bytes of ``sha256``; "" is what it was stamped with. It is read where size, time or
    inode are not those of its stamp, or ``thorough``; if it is right, it is stamped anew."""
    marks = stamps(path.parent)
    known = marks.get(path.name)
    sha256 = sha256 or (known[0] if known else "")
    if not sha256 or not path.is_file():
        return False
    now = [sha256, *_mark(path)]
    if known == now and not thorough:
        return True
    if sha256_of(path) != sha256:
        return False
    if known != now:
        _keep_stamps(path.parent, marks | {path.name: now})
    return True
