"""What the profile "paper" takes from the model hub: which revision, from where, and whether we may have it.

Every repository stands once, in :data:`REPOS`, with its revision. A revision that is a commit is final; one that is a name
("main") is resolved to its commit when it is first needed, kept in ``revisions.json`` of the cache
(:func:`permdistill.assets.cache_dir`), and used from then on; the manifest of a run lists them all.

``PERMDISTILL_HUB=/path`` puts a folder in the place of the hub, laid out as ``owner/name/..``: nothing is downloaded, and
nothing outside it is looked at. A token, where one is needed, is the hub client's own (``HF_TOKEN``, ``hf auth login``);
nothing here reads or prints it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permdistill.assets import AssetError, cache_dir, locked

LOCAL = "PERMDISTILL_HUB"


@dataclass(frozen=True)
class Repo:
    """A repository of the hub.

    revision   a commit (40 hex digits), or the name of a branch or reference
    licence    as its publishers declare it
    kind       model | dataset
    gated      whether its licence has to be accepted on the hub
    gigabytes  what is downloaded of it, roughly
    config     of a model: its architecture (transformers' model_type and sizes), for counting before anything is downloaded
    """

    revision: str
    licence: str
    gigabytes: float
    kind: str = "model"
    gated: bool = False
    config: dict[str, Any] = field(default_factory=dict, hash=False)


def _llama(layers: int, size: int, inner: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": size, "intermediate_size": inner, "vocab_size": 32000}
    return {"model_type": "llama", "num_attention_heads": size // 128, "max_position_embeddings": 4096, **sizes}


def _flan_t5(heads: int, size: int, inner: int) -> dict[str, Any]:
    sizes = {"num_layers": 24, "num_heads": heads, "d_model": size, "d_kv": 64, "d_ff": inner, "vocab_size": 32128}
    return {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **sizes}


def _encoder(kind: str, large: bool, vocabulary: int, positions: int = 512) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    sizes = dict(zip(names, (24, 1024, 16, 4096) if large else (12, 768, 12, 3072), strict=True))
    extra = {}
    if kind == "deberta-v2":
        extra = {"relative_attention": True, "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
        extra |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
    return {"model_type": kind, "vocab_size": vocabulary, "max_position_embeddings": positions, **sizes, **extra}


_LLAMA = "Llama 2 Community License"
# Commits are those that many public projects name for these repositories. Where none was found, the revision is a name.
REPOS: dict[str, Repo] = {
    # Teachers
    "google/flan-t5-xl": Repo(
        "7d6315df2c2fb742f0f5b556879d730926ca9001", "Apache-2.0", 11.4, config=_flan_t5(32, 2048, 5120)
    ),
    "google/flan-t5-xxl": Repo(
        "ae7c9136adc7555eeccc78cdd960dfd60fb346ce", "Apache-2.0", 45.1, config=_flan_t5(64, 4096, 10240)
    ),
    "meta-llama/Llama-2-7b-chat-hf": Repo(
        "f5db02db724555f92da89c216ac04704f23d4590", _LLAMA, 13.5, gated=True, config=_llama(32, 4096, 11008)
    ),
    "meta-llama/Llama-2-13b-chat-hf": Repo(
        "a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8", _LLAMA, 26.0, gated=True, config=_llama(40, 5120, 13824)
    ),
    # Students
    "google-bert/bert-base-uncased": Repo(
        "86b5e0934494bd15c9632b12f734a8a67f723594", "Apache-2.0", 0.44, config=_encoder("bert", False, 30522)
    ),
    "google-bert/bert-large-uncased": Repo(
        "6da4b6a26a1877e173fca3225479512db81a5e5b", "Apache-2.0", 1.35, config=_encoder("bert", True, 30522)
    ),
    "FacebookAI/roberta-base": Repo(
        "e2da8e2f811d1448a5b465c236feacd80ffbac7b", "MIT", 0.5, config=_encoder("roberta", False, 50265, 514)
    ),
    "FacebookAI/roberta-large": Repo(
        "722cf37b1afa9454edce342e7895e588b6ff1d59", "MIT", 1.42, config=_encoder("roberta", True, 50265, 514)
    ),
    "microsoft/deberta-v3-base": Repo(
        "8ccc9b6f36199bec6961081d44eb72fb3f7353f3", "MIT", 0.37, config=_encoder("deberta-v2", False, 128100)
    ),
    "microsoft/deberta-v3-large": Repo(
        "64a8c8eab3e352a784c658aef62be1662607476f", "MIT", 0.87, config=_encoder("deberta-v2", True, 128100)
    ),
    # Data
    "ehovy/race": Repo("2fec9fd81f1dc971569a9b729c43f2f0e6436637", "non-commercial research", 0.06, "dataset"),
    "tasksource/race-c": Repo("main", "non-commercial research", 0.02, "dataset"),
    # This one is a loading script, which datasets no longer runs; the hub keeps the same data as parquet beside it.
    "allenai/cosmos_qa": Repo("refs/convert/parquet", "CC-BY-4.0", 0.02, "dataset"),
    "openlifescienceai/medmcqa": Repo("91c6572c454088bf71b679ad90aa8dffcd0d5868", "Apache-2.0", 0.09, "dataset"),
    "metaeval/reclor": Repo("main", "non-commercial research", 0.01, "dataset"),
    "mteb/summeval": Repo("cda12ad7615edc362dbf25a00fdd61d3b1eaf93c", "MIT", 0.01, "dataset"),
}


def local(name: str) -> Path | None:
    """The folder that stands for a repository under ``PERMDISTILL_HUB``, None where that is not set. Raises AssetError."""
    if not (root := os.environ.get(LOCAL)):
        return None
    folder = Path(root).expanduser() / name
    if not folder.is_dir():
        raise AssetError(f"{LOCAL} is set, and holds no folder {name}: put the repository there, or unset it")
    return folder


def locate(name: str) -> tuple[str, str | None]:
    """What ``from_pretrained`` and ``load_dataset`` take as source and revision; what is not in :data:`REPOS` as it is."""
    if name not in REPOS:
        return name, None
    folder = local(name)
    return (name, commit(name)) if folder is None else (str(folder), None)


def commit(name: str) -> str:
    """The commit of one of :data:`REPOS`. Asks the hub once where only a reference is known, and keeps the answer."""
    repo = REPOS[name]
    if re.fullmatch("[0-9a-f]{40}", repo.revision):
        return repo.revision
    path = cache_dir() / "revisions.json"
    with locked(path.with_suffix(".lock")):
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if (key := f"{name}@{repo.revision}") not in known:
            from huggingface_hub import HfApi

            try:
                known[key] = HfApi().repo_info(name, revision=repo.revision, repo_type=repo.kind).sha
            except Exception as error:
                raise AssetError(f"{name}, revision {repo.revision!r}: {_why(name, error)}") from error
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            part.replace(path)
    return known[key]


def revisions() -> dict[str, str]:
    """For the manifest: {repository: its commit, as far as it is known; "local" under ``PERMDISTILL_HUB``}."""
    if os.environ.get(LOCAL):
        return dict.fromkeys(REPOS, "local")
    path = cache_dir() / "revisions.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: known.get(f"{name}@{repo.revision}", repo.revision) for name, repo in REPOS.items()}


def check(names: Iterable[str]) -> None:
    """Make sure, before any compute, that these of :data:`REPOS` can be had. Raises AssetError that lists all that cannot.

    With ``HF_HUB_OFFLINE`` nobody can be asked, and what is not in the hub client's cache fails later.
    """
    from huggingface_hub import HfApi, constants

    problems = []
    for name in dict.fromkeys(names):
        try:
            if local(name) is None and not constants.HF_HUB_OFFLINE:
                HfApi().auth_check(name, repo_type=REPOS[name].kind)
                HfApi().repo_info(name, revision=REPOS[name].revision, repo_type=REPOS[name].kind)
        except AssetError as error:
            problems.append(str(error))
        except Exception as error:  # whatever keeps the hub from saying yes, said in one line each
            problems.append(f"{name}: {_why(name, error)}")
    if problems:
        raise AssetError("not everything that this profile needs can be had:\n  " + "\n  ".join(problems))


def _why(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    address = f"https://huggingface.co/{'datasets/' * (REPOS[name].kind == 'dataset')}{name}"
    if isinstance(error, GatedRepoError) or (REPOS[name].gated and isinstance(error, RepositoryNotFoundError)):
        return (
            f"gated under the {REPOS[name].licence}: accept it at {address} with your account, and set HF_TOKEN to a token "
            "of that account (or run `hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {REPOS[name].revision!r} ({address}): give another one in permdistill.hub.REPOS"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub does not show it ({address}): was it moved?"
    return f"the hub cannot be reached ({type(error).__name__}): connect, or put a folder in its place with {LOCAL}=/path"
