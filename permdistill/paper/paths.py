"""Where the committed files are, and where results go: into the checkout where the package lies in one, else into the
working folder. Never beside an installed package."""

from __future__ import annotations

from pathlib import Path

_BESIDE = Path(__file__).parents[2]
ROOT = _BESIDE if (_BESIDE / "pyproject.toml").is_file() else Path()


def committed(name: str) -> Path:
    """A file or folder that git keeps, e.g. "figures/cost.json". Raises FileNotFoundError."""
    if not (path := ROOT / name).exists():
        raise FileNotFoundError(f"{path} is not in {ROOT.absolute()}: work in a checkout of permdistill, or give a path")
    return path


def tables_folder(output: str) -> Path:
    """Where a notebook finds the tables that others wrote: those of a run with this ``output``; "": the committed ones."""
    return Path(output) / "tables" if output else committed("figures")


def output_folder(output: str, profile: str) -> Path:
    """Where results go: ``output`` if given, else build/<profile>."""
    return Path(output) if output else ROOT / "build" / profile
