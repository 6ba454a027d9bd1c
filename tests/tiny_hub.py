"""A folder that stands for the model hub: every repository of models.py and tasks.py in the layout that it has there,
with tiny random models of the real architectures, tokenizers trained here, and a few made-up questions.

    write(folder)                      everything
    write_model(folder, name)          one model
    write_data(folder, name, n)        one data set, n rows a split
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertTokenizer,
    DebertaV2Tokenizer,
    LlamaTokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

from permdistill.paper.models import MODELS
from permdistill.paper.readers import ATTRIBUTES
from permdistill.paper.tasks import TASKS

REPOS = {thing.repo.name: thing.repo for thing in (*MODELS.values(), *TASKS.values()) if thing.repo is not None}

NOUNS = "cat dog bird stone river tree horse boat lamp bridge cloud apple clock train piano".split()
ADJECTIVES = "tall small old new red green blue quick warm quiet heavy bright".split()
LETTERS = "ABCDEF"
# What Llama-2's chat template does with one turn of the user, shortened (it has system prompts and several turns too).
LLAMA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
SIZES = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "t5": {"num_layers": 2, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48},
}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"initializer_range": 0.3}


def sentences() -> list[str]:
    """Text to train tokenizers on: the words of the questions below, and of the prompts around them."""
    text = [f"The {a} {n} is near the {m}." for a, n, m in islice(product(ADJECTIVES, NOUNS, NOUNS), 900)]
    text += [f"{letter}) the {n}  {letter}. {i}: {i}" for letter, n, i in zip(cycle(LETTERS), NOUNS * 4, cycle("123456"))]
    prompts = "Answer the multiple-choice question. Reply with the letter of the correct option only. Question: Answer:"
    pairs = "Compare the summaries of this article. Article: Summary 1: Summary A: Which summary is more coherent? number"
    return [*text, *[prompts, pairs, "Prediction: A (chosen) (not chosen) [INST] [/INST] _ , ! - ' \""] * 20]


# --------------------------------------------------------------------------------------------------------------------
# Models


def _piece_file(folder: Path, name: str, kind: str, size: int) -> Path:
    """A SentencePiece model as Llama (bpe) and T5 and DeBERTa (unigram) have one."""
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "character_coverage": 1.0}
    if kind == "bpe":
        special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True, "split_digits": True}
    elif name == "spm.model":
        special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
        special |= {"eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    # Each label with the space before it is a token of its own, as it is in the real vocabularies.
    labels = [f"▁{label}" for label in [*LETTERS, *"123456"]] if kind != "bpe" else []
    with open(folder / name, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()), model_writer=file, model_type=kind, vocab_size=size,
            user_defined_symbols=labels, minloglevel=2, num_threads=1, hard_vocab_limit=False, **special,
        )  # fmt: skip
    return folder / name


def _save_tokenizer(folder: Path, kind: str) -> int:
    """A tokenizer of the real class, trained here; returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "deberta-v2":  # on the hub a SentencePiece model and two settings, no tokenizer.json
        _piece_file(folder, "spm.model", "unigram", 400)
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
        return len(DebertaV2Tokenizer.from_pretrained(folder))
    if kind == "llama":
        path = _piece_file(folder, "tokenizer.model", "bpe", 600)
        tokenizer = LlamaTokenizer.from_pretrained(path.parent)
        tokenizer.chat_template = LLAMA_TEMPLATE
    elif kind == "t5":
        path = _piece_file(folder, "spiece.model", "unigram", 400)
        tokenizer = T5Tokenizer.from_pretrained(path.parent)
    elif kind == "bert":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        raw.train_from_iterator(sentences(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
        words = sorted(raw.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
        tokenizer = BertTokenizer.from_pretrained(folder)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            sentences(), trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
        )
        raw.model.save(str(folder))  # vocab.json, merges.txt
        tokenizer = RobertaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A tiny random model of the architecture that ``name`` has, its configuration class and its tokenizer's."""
    home, settings = folder / name, dict(MODELS[name].config)
    kind = settings.pop("model_type")
    vocabulary = _save_tokenizer(home, kind)
    settings |= SIZES.get(kind, SMALL) | {"vocab_size": vocabulary}
    if kind == "llama":
        settings |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    elif kind == "t5":
        settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 2.0}
    elif kind == "roberta":
        settings |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    torch.manual_seed(seed)
    classes = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
    model = classes.get(kind, AutoModel).from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(home)
    return home


# --------------------------------------------------------------------------------------------------------------------
# Data


def texts(seed: int) -> Iterator[tuple[str, str, list[str], int]]:
    """Passage, question, four options, index of the right one."""
    rng = np.random.default_rng(seed)
    while True:
        nouns = [str(w) for w in rng.choice(NOUNS, 4, replace=False)]
        a, b = (str(w) for w in rng.choice(ADJECTIVES, 2, replace=False))
        answer = int(rng.integers(4))
        passage = f"The {a} {nouns[answer]} is near the {b} {nouns[answer - 1]}. {int(rng.integers(10**6))} people saw it."
        yield passage, f"What is {a} ?", [f"the {noun}" for noun in nouns], answer


def _race(n: int, seed: int, level: str) -> list[dict]:
    """Two questions share a passage and its example_id."""
    rows = []
    for number, (passage, question, options, answer) in enumerate(islice(texts(seed), n)):
        if number % 2:
            passage = rows[-1]["article"]
        name = f"{level}{number // 2}.txt"
        rows.append(
            {"example_id": name, "article": passage, "answer": LETTERS[answer], "question": question, "options": options}
        )
    return rows


def _race_c(n: int, seed: int) -> list[dict]:
    rows = []
    for number, (passage, question, options, answer) in enumerate(islice(texts(seed), n)):
        rows.append({"id": f"{number}.txt", "article": passage, "question": question, "option": options, "label": answer})
    return rows


def _cosmos(n: int, seed: int, hidden: bool) -> list[dict]:
    rows, rng = [], np.random.default_rng(seed)
    for number, (passage, question, options, answer) in enumerate(islice(texts(seed), n)):
        answers = {f"answer{i}": option for i, option in enumerate(options)}
        if number % 2:  # most of the set's questions have it, anywhere
            place = int(rng.choice([i for i in range(4) if i != answer]))
            answers[f"answer{place}"] = "None of the above choices ."
        row = {"id": f"blog##{number}", "context": passage, "question": question, **answers}
        rows.append(row | {"label": -1 if hidden else answer})
    return rows


def _medmcqa(n: int, seed: int, hidden: bool) -> list[dict]:
    rows = []
    for number, (_, question, options, answer) in enumerate(islice(texts(seed), n)):
        named = dict(zip(("opa", "opb", "opc", "opd"), options, strict=True))
        row = {"id": f"{seed}-{number}", "question": f"{number}. {question}", **named, "cop": -1 if hidden else answer}
        rows.append(row | {"choice_type": "single", "exp": None, "subject_name": "Anatomy", "topic_name": None})
    return rows


def _reclor(n: int, seed: int, split: str) -> list[dict]:
    return [
        {"context": passage, "question": question, "answers": options, "label": answer, "id_string": f"{split}_{number}"}
        for number, (passage, question, options, answer) in enumerate(islice(texts(seed), n))
    ]


def _summeval(n: int, systems: int) -> list[dict]:
    rows, rng = [], np.random.default_rng(5)
    for number, (passage, *_) in enumerate(islice(texts(9), n)):
        made = [f"Summary of {number}: the {NOUNS[(number + i) % 15]} is {ADJECTIVES[i % 12]} {i}." for i in range(systems)]
        scores = {attribute: (rng.integers(3, 16, systems) / 3).tolist() for attribute in ATTRIBUTES}
        rows.append(
            {"machine_summaries": made, "human_summaries": [passage], **scores, "text": passage, "id": f"dm-{number}"}
        )
    return rows


_LABELS = datasets.ClassLabel(names=["a", "b", "c", "d"])


def write_rows(rows: datasets.Dataset, path: Path) -> None:
    """Parquet, a JSON object a line, or one JSON list, by the name."""
    if path.suffix == ".parquet":
        rows.to_parquet(str(path))
    else:
        rows.to_json(str(path), lines=path.suffix == ".jsonl")


def write_data(folder: Path, name: str, n: int = 8) -> Path:
    """One data set with its columns, label coding, file names and configurations, ``n`` rows a split."""
    home = folder / name
    files: dict[str, list[dict]] = {}
    configs: dict[str, str] = {}  # of the repository's card: configuration -> folder
    if name == "ehovy/race":
        configs = {level: level for level in ("all", "high", "middle")}
        for seed, (level, split) in enumerate(product(("high", "middle"), ("train", "validation", "test"))):
            files[f"{level}/{split}-00000-of-00001.parquet"] = _race(n, seed, level)
        for split in ("train", "validation", "test"):
            both = [row for level in ("high", "middle") for row in files[f"{level}/{split}-00000-of-00001.parquet"]]
            files[f"all/{split}-00000-of-00001.parquet"] = both
    elif name == "tasksource/race-c":
        for seed, split in enumerate(("train", "validation", "test")):
            files[f"{'dev' if split == 'validation' else split}.jsonl"] = _race_c(n, 20 + seed)
    elif name == "allenai/cosmos_qa":
        for seed, split in enumerate(("train", "validation", "test")):
            files[f"default/{split}/0000.parquet"] = _cosmos(n, 30 + seed, hidden=split == "test")
    elif name == "openlifescienceai/medmcqa":
        for seed, split in enumerate(("train", "validation", "test")):
            files[f"data/{split}-00000-of-00001.parquet"] = _medmcqa(n, 40 + seed, hidden=split == "test")
    elif name == "metaeval/reclor":
        for seed, split in enumerate(("train", "validation")):
            short = "train" if split == "train" else "val"
            files[f"{short}.json"] = _reclor(n, 50 + seed, short)
    else:
        files["data/test-00000-of-00001-35901af5f6649399.parquet"] = _summeval(n, systems=4)
    for path, rows in files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        made = datasets.Dataset.from_list(rows)
        if "cop" in made.column_names:
            made = made.cast_column("cop", _LABELS)
        write_rows(made, home / path)
    if configs:
        card = "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {place}/{s}-*\n" for s in ("train", "validation", "test"))
            for config, place in configs.items()
        )
        (home / "README.md").write_text(f"---\nconfigs:\n{card}---\n\n# A data set\n", encoding="utf-8")
    return home


def write(folder: Path, n: int = 8) -> Path:
    """All of REPOS."""
    for seed, (name, repo) in enumerate(REPOS.items()):
        write_data(folder, name, n) if repo.kind == "dataset" else write_model(folder, name, seed)
    return folder
