"""Names of models -> where ``transformers`` loads them from, and the key by which their scores and students are found.

A name is a local folder, a repository of the model hub, or a name that a *provider* knows. :mod:`permdistill.paper.models`
is one: it knows the paper's models, and those that the Python package index delivers. A package of yours makes its
models known
with :func:`register`, or with an entry point of the group ``permdistill.models`` that names the module that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    location  -> a folder, or a repository of the model hub; downloads what has to be there first
    revision  of the repository, None for a folder or its newest
    key       identifies the weights ("sha256:..", "hub:name@commit"); "" means: by the content of the folder's files
    """

    location: Callable[[], str]
    revision: str | None = None
    key: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes. A model that brings code of its own is refused, never run."""
        at = {"revision": self.revision} if self.revision else {}
        return {"pretrained_model_name_or_path": self.location(), "trust_remote_code": False, **at}


def check_whole(location: str, about: Mapping[str, Any]) -> None:
    """Raises ValueError where ``from_pretrained(.., output_loading_info=True)`` says that the weights in ``location`` lack
    some, which are random then. Tied ones, which a file holds once, are not among these."""
    lacking = sorted({*about["missing_keys"], *(name for name, *_ in about["mismatched_keys"])})
    if lacking:
        raise ValueError(f"{location}: its weights lack {lacking[0]} ({len(lacking)} in all): restore the file")


def short(name: str) -> str:
    """What a model is called in tables and folders: the last word of its name, of "." and ".." that of their path."""
    return Path(name).name if Path(name).name not in ("", "..") else Path(name).resolve().name


Provider = Callable[[str], Source | None]
_PROVIDERS: list[Provider] = []


def register(provider: Provider) -> None:
    """Ask ``provider`` for names too: it gives the Source of a name that it knows, else None."""
    if provider not in _PROVIDERS:
        _PROVIDERS.append(provider)


@lru_cache(maxsize=1)
def _load_plugins() -> None:
    for plugin in entry_points(group="permdistill.models"):
        plugin.load()


def find(name: str) -> Source:
    """The source of a model: a folder, what a provider knows under this name, or else a repository of the model hub."""
    _load_plugins()
    for provider in _PROVIDERS:
        if (source := provider(name)) is not None:
            return source
    return Source(lambda: name, key="" if Path(name).is_dir() else f"hub:{name}")
