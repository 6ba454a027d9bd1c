"""The manifest of a run: what was run, on what, and what came of it.

``python -m permdistill.paper manifest BUILD`` writes ``BUILD/manifest.json``, the last file of ``make paper``: commit,
versions, revisions of the hub's repositories, sha256 of every score file, parameters and times of every executed
notebook, sha256 of every figure and table.

``python -m permdistill.paper manifest BUILD --measure NAME -- COMMAND ...`` runs a command, hands on its exit status, and
keeps its time and peak memory in ``BUILD/resources/NAME.json`` for the manifest.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from permdistill.files import sha256_of, write_text
from permdistill.paper import models, tasks
from permdistill.paper.hub import revisions
from permdistill.paper.paths import ROOT


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    # The figures are products: drawing them anew does not make the sources differ from the commit.
    changes = _git("status", "--porcelain", "--", ".", ":!figures")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _hashes(folder: Path, pattern: str = "*", below: Path | None = None) -> dict[str, str]:
    """{path relative to ``below``: sha256} of the files under ``folder``; none if there is no such folder."""
    files = sorted(p for p in folder.rglob(pattern) if p.is_file() and p.suffix != ".part")
    return {p.relative_to(below or folder.parent).as_posix(): sha256_of(p) for p in files}


def _notebooks(build: Path) -> dict[str, dict[str, Any]]:
    """{name: parameters, times (ISO 8601, UTC) and seconds} of the executed notebooks, as papermill wrote them."""
    result = {}
    for path in sorted((build / "notebooks").glob("*.ipynb")):
        if path.name.endswith(".part.ipynb"):
            continue
        ran = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill")
        if ran is None:
            raise ValueError(f"{path} was not executed by papermill: delete it and run `make paper` again")
        result[path.stem] = {
            "parameters": ran["parameters"],
            "start": ran["start_time"],
            "end": ran["end_time"],
            "seconds": ran["duration"],
            "sha256": sha256_of(path),
        }
    return result


def _write_json(path: Path, content: Any) -> Path:
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def write(build: Path) -> Path:
    """Write ``build/manifest.json``, atomically, and return its path. Raises ValueError on an unexecuted notebook."""
    build = Path(build)
    resources = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((build / "resources").glob("*.json"))}
    manifest = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": dict(sorted({d.metadata["Name"].lower(): d.version for d in distributions()}.items())),
        "revisions": revisions(r.repo for r in (*models.MODELS.values(), *tasks.TASKS.values()) if r.repo is not None),
        "scores": _hashes(ROOT / "scores", "*.parquet") | _hashes(build / "scores", "*.parquet", build.parent),
        "notebooks": _notebooks(build),
        "resources": resources,
        "products": {
            name: sha256
            for kind in ("tables", "figures")
            for folder in sorted(build.glob(f"*/{kind}"))
            for name, sha256 in _hashes(folder, below=build).items()
        },
    }
    return _write_json(build / "manifest.json", manifest)


def measure(command: Sequence[str], target: Path) -> int:
    """Run ``command`` and return its exit status; if that is 0, write seconds and peak memory to ``target``.

    The peak is that of the largest single process that the command started (getrusage(2), ru_maxrss), in bytes: for a
    notebook, its kernel. The command keeps the terminal.
    """
    import fcntl  # POSIX only, like make
    import resource

    began = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    # What a killed make left running goes on writing, and dies with this process or holds the lock in its place.
    with open(target.with_suffix(".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the end of {target.stem}, which a killed make has left running", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        status = _run(command, lock.fileno())
    if status == 0:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        _write_json(target, {"seconds": round(time.monotonic() - began, 1), "peak_memory_bytes": peak})
    return status


def _run(command: Sequence[str], lock: int) -> int:
    """Run a command, which holds the lock too, to its end, or to that of make. Returns its exit status."""
    make = os.getppid()
    process = subprocess.Popen(command, pass_fds=[lock])
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if os.getppid() != make:
                process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def main(argv: Sequence[str]) -> int:
    """Entry point of ``python -m permdistill.paper manifest``; see the module's docstring."""
    if len(argv) == 1 and not argv[0].startswith("-"):
        print(write(Path(argv[0])))
        return 0
    if len(argv) > 4 and argv[1] == "--measure" and argv[3] == "--":
        return measure(argv[4:], Path(argv[0]) / "resources" / f"{argv[2]}.json")
    print("usage: python -m permdistill.paper manifest BUILD [--measure NAME -- COMMAND ...]", file=sys.stderr)
    return 2
