"""Repositories of the model hub: which revision, from where, and whether we may have it. Which ones: models.py, readers.py.

A revision that is a commit is final; one that is a name ("main") is resolved to its commit when it is first needed, kept in
``revisions.json`` of the cache (:func:`permdistill.files.cache_dir`), and used from then on.

``PERMDISTILL_HUB=/path`` puts a folder in the place of the hub, laid out as ``owner/name/..``: nothing is downloaded, and
nothing outside it is looked at. A token, where one is needed, is the hub client's own (``HF_TOKEN``, ``hf auth login``);
nothing here reads or prints it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from permdistill.files import cache_dir, locked, write_text
from permdistill.paper.assets import AssetError

LOCAL = "PERMDISTILL_HUB"


@dataclass(frozen=True)
class Repo:
    """A repository of the hub.

    name      owner/name
    revision  a commit (40 hex digits), or the name of a branch or reference
    licence   as its publishers declare it
    kind      model | dataset
    gated     whether its licence has to be accepted on the hub
    """

    name: str
    revision: str
    licence: str
    kind: str = "model"
    gated: bool = False


def local(repo: Repo) -> Path | None:
    """The folder that stands for a repository under ``PERMDISTILL_HUB``, None where that is not set. Raises AssetError."""
    if not (root := os.environ.get(LOCAL)):
        return None
    folder = Path(root).expanduser() / repo.name
    if not folder.is_dir():
        raise AssetError(f"{LOCAL} is set, and holds no folder {repo.name}: put the repository there, or unset it")
    return folder


def locate(repo: Repo) -> tuple[str, str | None]:
    """What ``from_pretrained`` and ``load_dataset`` take as source and revision."""
    folder = local(repo)
    return (repo.name, commit(repo)) if folder is None else (str(folder), None)


def _kept() -> dict[str, str]:
    path = cache_dir() / "revisions.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def commit(repo: Repo) -> str:
    """The commit of a repository. Asks the hub once where only a reference is known, and keeps the answer."""
    if re.fullmatch("[0-9a-f]{40}", repo.revision):
        return repo.revision
    path = cache_dir() / "revisions.json"
    with locked(path.with_suffix(".lock")):
        known = _kept()
        if (key := f"{repo.name}@{repo.revision}") not in known:
            from huggingface_hub import HfApi

            try:
                known[key] = str(HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind).sha)
            except Exception as error:
                raise AssetError(f"{repo.name}, revision {repo.revision!r}: {_why(repo, error)}") from error
            write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known[key]


def revisions(repos: Iterable[Repo]) -> dict[str, str]:
    """For the manifest: {repository: its commit, as far as it is known; "local" under ``PERMDISTILL_HUB``}."""
    known, here = _kept(), bool(os.environ.get(LOCAL))
    return {r.name: "local" if here else known.get(f"{r.name}@{r.revision}", r.revision) for r in repos}


def check(repos: Iterable[Repo]) -> None:
    """Make sure, before any compute, that these can be had. Raises AssetError that lists all that cannot.

    With ``HF_HUB_OFFLINE`` nobody can be asked, and what is not in the hub client's cache fails later.
    """
    from huggingface_hub import HfApi, constants

    problems = []
    for repo in dict.fromkeys(repos):
        try:
            if local(repo) is None and not constants.HF_HUB_OFFLINE:
                HfApi().auth_check(repo.name, repo_type=repo.kind)
                HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind)
        except AssetError as error:
            problems.append(str(error))
        except Exception as error:  # whatever keeps the hub from saying yes, said in one line each
            problems.append(f"{repo.name}: {_why(repo, error)}")
    if problems:
        raise AssetError("not everything that this profile needs can be had:\n  " + "\n  ".join(problems))


def cached(repo: Repo, file: str = "") -> Path | None:
    """Where the hub client keeps a repository at the commit that counts, None if it has none, or not this file of it."""
    from huggingface_hub import snapshot_download

    try:
        revision = revisions([repo])[repo.name]  # the commit that a name stood for when it was asked first
        folder = Path(snapshot_download(repo.name, repo_type=repo.kind, revision=revision, local_files_only=True))
    except Exception:  # whatever says that it is not there
        return None
    return folder if (folder / file).exists() else None


def on_this_machine(repo: Repo) -> Path | None:
    """The folder of a repository, perhaps with some files only: under ``PERMDISTILL_HUB``, or in the hub client's cache."""
    try:
        return local(repo) or cached(repo)
    except AssetError:  # another folder stands for the hub
        return None


def _why(repo: Repo, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    address = f"https://huggingface.co/{'datasets/' * (repo.kind == 'dataset')}{repo.name}"
    if isinstance(error, GatedRepoError) or (repo.gated and isinstance(error, RepositoryNotFoundError)):
        return (
            f"gated under the {repo.licence}: accept it at {address} with your account, and set HF_TOKEN to a token "
            "of that account (or run `hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {repo.revision!r} ({address}): give another one in models.py or readers.py"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub does not show it ({address}): was it moved?"
    return f"the hub cannot be reached ({type(error).__name__}): connect, or put a folder in its place with {LOCAL}=/path"
