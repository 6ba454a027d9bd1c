"""What a profile takes, before it is run: questions, orders, tokens, floating-point operations, GPU-hours, downloads, disk.

    python -m permdistill.paper plan --profile paper        (`make plan PROFILE=paper`)

Lengths are read off a sample of the questions, put into prompts and tokenised, where questions and tokenizer are at hand
(``PERMDISTILL_HUB``, or the hub client's cache): "measured". Where they are not, made-up texts of about the published
lengths and a simple rule for tokens stand in: "guessed". Nothing is downloaded from the hub, and no weights are loaded.

Operations are counted by formula (:func:`permdistill.paper.bench.flops`): 2 per weight and token in linear layers,
and attention. Hours are operations over the GPU's peak times :data:`UTILISATION`, an assumption: on a CPU the trie
reaches 40 to 50% of the
fastest matrix product (notebook 7); ``--measure`` puts what this machine reaches in its place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from permdistill.engine import forest, trie
from permdistill.heads import HEADS
from permdistill.orders import all_orders, cyclic_orders
from permdistill.paper import bench, hub, models
from permdistill.paper.models import MODELS
from permdistill.paper.profiles import Need, Profile, Run, needs, repositories
from permdistill.paper.tasks import GIGABYTES, SEED, SUMMARIES, TASKS, PairsTask, load_task
from permdistill.prompts import TEMPLATES, Template
from permdistill.questions import Question
from permdistill.teachers import CausalTeacher, Seq2SeqTeacher

# Dense bfloat16 peaks, FLOP/s, with float32 accumulation, as NVIDIA's data sheets give them: A100, H100 (SXM) and L40S
# Tensor Core GPU; GeForce RTX 4090: Ada architecture white paper.
GPUS = {"A100": 312e12, "H100": 989e12, "L40S": 362e12, "RTX 4090": 165e12}
UTILISATION = 0.4
SAMPLE = 30  # groups of questions, per task, whose prompts are tokenised


# --------------------------------------------------------------------------------------------------------------------
# Models without weights


@lru_cache(maxsize=32)
def architecture(name: str) -> PreTrainedModel:
    """A teacher or encoder of a profile without weights (on torch's meta device): for its class, layers and sizes.

    The configuration is the model's own where it is at hand, else the one of :data:`permdistill.paper.models.MODELS`.
    """
    config = AutoConfig.for_model(**MODELS[name].config)
    if (source := _at_hand(name)) is not None:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        encoder = config.model_type in ("bert", "roberta", "deberta-v2", "mpnet")
        return (AutoModel if encoder else kind).from_config(config, trust_remote_code=False)


def _at_hand(name: str) -> Path | None:
    """The folder of a model's configuration and tokenizer, without any download; None if there is none."""
    repo = MODELS[name].repo
    if repo is not None:
        return hub.local(repo) or hub.cached(repo, "tokenizer_config.json")
    made = models.folder(name, download=False)
    return made if made.is_dir() else None


@lru_cache(maxsize=32)
def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    source = _at_hand(name)
    return None if source is None else AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def flops(model: PreTrainedModel, tokens: int, pairs: int, rows: int) -> int:
    """Operations of ``tokens`` through a teacher, of ``pairs`` (token, token it attends to) and ``rows`` answers read.

    An encoder-decoder passes the tokens through its encoder and through the keys and values of its decoder's attention to
    them; the decoder itself sees one token for each answer.
    """
    if not model.config.is_encoder_decoder:
        return bench.flops(model, bench.Work(np.empty(0), tokens, pairs, rows))
    config, head = model.config, model.get_output_embeddings()
    read = step = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            if name.startswith("encoder") or re.search(r"EncDecAttention\.[kv]$", name):
                read += module.weight.numel()
            else:
                step += module.weight.numel()
    attention = (
        4 * config.num_heads * config.d_kv * (config.num_layers * pairs + config.num_decoder_layers * (tokens + rows))
    )
    return 2 * read * tokens + attention + 2 * (step + head.weight.numel()) * rows


def encoder_flops(model: PreTrainedModel, lengths: np.ndarray) -> int:
    """Operations of one forward pass of sequences of these lengths through a student's encoder."""
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 4 * model.config.num_hidden_layers * model.config.hidden_size
    return int(2 * linears * lengths.sum() + attention * (lengths.astype(np.float64) ** 2).sum())


# --------------------------------------------------------------------------------------------------------------------
# Questions


def guessed_tokens(text: str) -> list[str]:
    """Tokens of English text by a rule: words in pieces of up to six letters, and punctuation. About 1.35 a word."""
    return re.findall(r"\w{1,6}|[^\w\s]", text)


@lru_cache(maxsize=64)
def _guessed(task: str, split: str, n: int) -> tuple[list[Question], int]:
    """Questions of about the published lengths, a sample, and how many there are."""
    rng = np.random.default_rng(SEED)  # the same for each attribute of SummEval: they share articles and summaries

    def words(count: int) -> str:
        letters = rng.integers(97, 123, (count, 8))
        sizes = np.where(rng.random(count) < 0.35, 8, 4)
        return " ".join(bytes(row[:size].tolist()).decode() for row, size in zip(letters, sizes, strict=True))

    own = TASKS[task]
    context, question, option = own.words
    if isinstance(own, PairsTask):
        shared, asked = "article " + words(context), task + words(question)
        summaries = [words(option) for _ in range(own.systems)]
        made = [Question(f"{task}/{i}", shared, asked, pair) for i, pair in enumerate(combinations(summaries, 2))]
    else:
        made = [
            Question(f"{task}/{split}/{i}", words(context), words(question), tuple(words(option) for _ in range(own.k)))
            for i in range(SAMPLE)
        ]
    return made, min(n, own.published[split])


def _questions(need: Need) -> tuple[list[Question], int, bool]:
    """Questions of a task, how many there are in all, and whether they are the real ones."""
    repo = TASKS[need.task].repo
    if repo is not None and hub.local(repo) is None and hub.cached(repo) is None:
        return *_guessed(need.task, need.split, need.n), False
    found = load_task(need.task, need.split, need.template).first(need.n).questions
    return found, len(found), True


@dataclass
class Tokens:
    """What scoring all orders of some questions passes through a teacher.

    alone   (tokens, pairs) each prompt for itself, without padding
    shared  (tokens, pairs) in the trie
    rows    prompts
    """

    alone: tuple[float, float] = (0.0, 0.0)
    shared: tuple[float, float] = (0.0, 0.0)
    rows: float = 0.0


def _lists(name: str, questions: Sequence[Question], orders: np.ndarray, template: Template) -> list[list[int]]:
    """Prompts as lists of token ids, guessed without the tokenizer."""
    tokenizer, model = _tokenizer(name), architecture(name)
    if tokenizer is not None:
        kind = Seq2SeqTeacher if model.config.is_encoder_decoder else CausalTeacher
        return kind(Path(name).name, model, tokenizer, "").tokenize(questions, orders, template)
    numbers: dict[str, int] = {}
    chat = "" if model.config.is_encoder_decoder else "[INST]"
    result = []
    for question in questions:
        for order in orders:
            pieces = guessed_tokens(chat + template.user_message(question, order) + chat + template.answer_prefix)
            result.append([numbers.setdefault(piece, len(numbers)) for piece in pieces])
    return result


def count(name: str, groups: Iterable[Sequence[Question]], template: Template) -> Tokens:
    """Tokens of all orders of groups of questions; those of a forest (:mod:`permdistill.engine.forest`) share."""
    total, together = Tokens(), list[list[int]]()
    for group in groups:
        prompts = _lists(name, group, all_orders(len(group[0].options)), template)
        lengths = np.array([len(p) for p in prompts], dtype=np.float64)
        square = (lengths**2).sum() if architecture(name).config.is_encoder_decoder else (lengths * (lengths + 1) / 2).sum()
        total.alone = (total.alone[0] + lengths.sum(), total.alone[1] + square)
        total.rows += len(prompts)
        if together and sum(map(len, together)) + lengths.sum() > forest.PROMPT_TOKENS:
            total.shared = _more(total.shared, together)
            together = []
        together += prompts
    total.shared = _more(total.shared, together)
    return total


def _more(shared: tuple[float, float], prompts: list[list[int]]) -> tuple[float, float]:
    packed = trie.build(prompts)
    return shared[0] + len(packed), shared[1] + trie.attended(packed)


def grouped(questions: Iterable[Question]) -> list[list[Question]]:
    """As :func:`permdistill.scores.score` puts them together: by context and number of options."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((question.context or question.id, len(question.options)), []).append(question)
    return list(groups.values())


def sample(groups: Sequence[list[Question]], n: int = SAMPLE) -> list[list[Question]]:
    """``n`` of the groups, at random."""
    chosen = np.random.default_rng(SEED).permutation(len(groups))[:n]
    return [groups[i] for i in chosen]


# --------------------------------------------------------------------------------------------------------------------
# The plan


def teachers_plan(settings: Profile, n: int = SAMPLE) -> pd.DataFrame:
    """A row for each table, teacher, split and template: what is asked, and what it takes with and without sharing.

    Columns: table, model, tasks, split, template, questions, orders (all prompts), lengths, tokens_alone, tokens_shared,
    flops_alone, flops_shared (what the engine does: an encoder-decoder cannot share), bytes (of the store of scores).
    """
    together: dict[tuple, list[Need]] = {}
    for need in needs(settings):
        together.setdefault((need.table, need.teacher, need.split, need.template_name), []).append(need)
    rows = []
    for (table, teacher, split, template), parts in together.items():
        model, total, stored = architecture(teacher), Tokens(), 0.0
        questions, measured = 0, _tokenizer(teacher) is not None
        # The attributes of one pair of summaries are scored together, so they are counted together.
        strata: dict[str, list[Need]] = {}
        for need in parts:
            strata.setdefault(SUMMARIES if TASKS[need.task].family == SUMMARIES else need.task, []).append(need)
        for own in strata.values():
            loaded = [_questions(need) for need in own]
            groups = grouped(q for found, _, _ in loaded for q in found)
            drawn = sample(groups, n)
            size, real = sum(m for _, m, _ in loaded), all(r for _, _, r in loaded)
            counted = count(teacher, drawn, TEMPLATES[template])
            scale = size / sum(map(len, drawn))
            total.alone = (total.alone[0] + scale * counted.alone[0], total.alone[1] + scale * counted.alone[1])
            total.shared = (total.shared[0] + scale * counted.shared[0], total.shared[1] + scale * counted.shared[1])
            total.rows += scale * counted.rows
            stored += scale * sum(4 * len(all_orders(k)) * k for k in (len(q.options) for group in drawn for q in group))
            questions, measured = questions + size, measured and real
        alone, shared = (
            flops(model, round(tokens), round(pairs), round(total.rows)) for tokens, pairs in (total.alone, total.shared)
        )
        cannot = model.config.is_encoder_decoder
        rows.append(
            {"table": table, "model": Path(teacher).name, "tasks": len(parts), "split": split, "template": template}
            | {"questions": questions, "orders": round(total.rows), "lengths": "measured" if measured else "guessed"}
            | {"tokens_alone": total.alone[0], "tokens_shared": total.alone[0] if cannot else total.shared[0]}
            | {"flops_alone": alone, "flops_shared": alone if cannot else shared, "bytes": stored}
        )
    return pd.DataFrame(rows)


def students_plan(settings: Profile, n: int = SAMPLE) -> pd.DataFrame:
    """A row for each student: training (3 forward passes' worth of operations a sequence and epoch) and its test answers.

    Columns: table, model, run, questions (to train on), epochs, lengths, tokens (of all epochs), flops, bytes (of its
    checkpoint, without what a training in progress keeps).
    """
    rows = []
    for pool in settings.pools.values():
        first, table = settings.teachers[0], pool.table.split("_")[0]
        parts = {
            split: [_questions(Need(table, first, task, split, size)) for task in pool.tasks]
            for split, size in (("train", settings.n_train), ("test", pool.n_test))
        }
        for run in pool.runs:
            model, known = architecture(run.student.encoder), True
            passes = {}
            for split, loaded in parts.items():
                lengths, size = [], sum(m for _, m, _ in loaded)
                for found, _, real in loaded:
                    known &= real and _tokenizer(run.student.encoder) is not None
                    lengths += [_sequences(run, question) for [question, *_] in sample([[q] for q in found], n)]
                every = np.array([length for own in lengths for length in own])
                scale = size / len(lengths)
                passes[split] = (size, scale * every.sum(), scale * encoder_flops(model, every))
            again = 1 if HEADS[run.student.head].equivariant else len(cyclic_orders(run.student.k))
            epochs = run.training.epochs
            rows.append(
                {"table": table, "model": Path(run.student.encoder).name, "run": run.name, "questions": passes["train"][0]}
                | {"epochs": epochs, "lengths": "measured" if known else "guessed", "tokens": epochs * passes["train"][1]}
                | {"flops": 3 * epochs * passes["train"][2] + again * passes["test"][2]}
                | {"bytes": 4 * sum(p.numel() for p in model.parameters())}
            )
    return pd.DataFrame(rows)


def _sequences(run: Run, question: Question) -> list[int]:
    """Lengths of the sequences of one question in one order."""
    tokenizer = _tokenizer(run.student.encoder)
    decision = 0 if run.student.inputs == "prediction" else None
    head = HEADS[run.student.head]
    texts = head.texts(question, range(run.student.k), decision)
    if tokenizer is None:
        found = [len(guessed_tokens(f"{text.first} {text.second}")) + 3 for text in texts]
    else:
        found = [len(ids) for ids in tokenizer(*head.columns(texts), verbose=False)["input_ids"]]
    return [min(length, run.student.max_length) for length in found]


def downloads(settings: Profile) -> pd.DataFrame:
    """A row for each model and data set: revision, licence, whether it is gated, GB to download, GB of weights in bfloat16
    (teachers) or float32 (students)."""
    rows = []
    encoders = {run.student.encoder for run in settings.runs}
    for name in dict.fromkeys([*settings.teachers, *sorted(encoders)]):
        model, bytes_each = MODELS[name], 2 if name in settings.teachers else 4
        weights = sum(p.numel() for p in architecture(name).parameters())
        rows.append(_download(name, model.repo, model.licence, model.gigabytes, round(weights * bytes_each / 1e9, 1)))
    for repo in repositories(settings):
        if repo.kind == "dataset":
            rows.append(_download(repo.name, repo, repo.licence, GIGABYTES.get(repo.name, 0.02), 0.0))
    return pd.DataFrame(rows)


def _download(name: str, repo: hub.Repo | None, licence: str, gigabytes: float, in_memory: float) -> dict[str, Any]:
    return {
        "name": name,
        "revision": repo.revision[:12] if repo else "sha256",
        "licence": licence,
        "gated": "yes" if repo and repo.gated else "no",
        "GB": gigabytes,
        "GB in memory": in_memory,
    }


def rate(
    teacher: CausalTeacher,
    groups: Sequence[Sequence[Question]],
    template: Template,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s that this machine reaches with a loaded teacher on these groups of questions, after one pass to warm up."""
    teacher.log_probs(groups[0], all_orders(len(groups[0][0].options)), template)
    done, seconds = 0, 0.0
    for group in groups:
        orders, started = all_orders(len(group[0].options)), clock()
        teacher.log_probs(group, orders, template)
        seconds += clock() - started
        prompts = teacher.tokenize(group, orders, template)
        lengths, packed = np.array([len(p) for p in prompts]), trie.build(prompts)
        if teacher.model.config.is_encoder_decoder:
            done += flops(teacher.model, int(lengths.sum()), int((lengths**2).sum()), len(prompts))
        else:
            done += flops(teacher.model, len(packed), trie.attended(packed), len(prompts))
    return done / seconds


def hours(operations: float, speeds: Mapping[str, float]) -> dict[str, str]:
    """Hours on each machine of {name: FLOP/s}."""
    return {name: f"{operations / speed / 3600:.3g}" for name, speed in speeds.items()}


def report(settings: Profile, n: int = SAMPLE, speed: float | None = None) -> str:
    """The whole plan as text. ``speed``: FLOP/s that this machine was measured at, see :func:`rate`."""
    speeds = {name: UTILISATION * peak for name, peak in GPUS.items()} | ({"here": speed} if speed else {})
    asked, taught, needed = teachers_plan(settings, n), students_plan(settings, n), downloads(settings)
    shown = asked[["table", "model", "tasks", "split", "template", "questions", "orders", "lengths"]].assign(
        **{
            "tokens alone": (asked.tokens_alone / 1e6).map("{:,.1f}M".format),
            "shared": (asked.tokens_shared / 1e6).map("{:,.1f}M".format),
            "PFLOP alone": (asked.flops_alone / 1e15).map("{:,.3g}".format),
            "PFLOP": (asked.flops_shared / 1e15).map("{:,.3g}".format),
        },
        **pd.DataFrame([hours(f, speeds) for f in asked.flops_shared]).add_prefix("h, "),
    )
    learnt = taught[["table", "run", "questions", "epochs", "lengths"]].assign(
        tokens=(taught.tokens / 1e6).map("{:,.1f}M".format),
        PFLOP=(taught.flops / 1e15).map("{:,.3g}".format),
        **pd.DataFrame([hours(f, speeds) for f in taught.flops]).add_prefix("h, "),
    )
    total = {name: asked.flops_shared.sum() / s / 3600 + taught.flops.sum() / s / 3600 for name, s in speeds.items()}
    peaks = ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in GPUS.items())
    checkpoints, stored, weights = taught.bytes.sum() / 1e9, asked.bytes.sum() / 1e9, needed["GB"].sum()
    return "\n".join(
        [
            "Teachers: all orders of each question",
            shown.to_string(index=False),
            "\nStudents: training, and answers to the test questions",
            learnt.to_string(index=False),
            "\nModels and data",
            needed.to_string(index=False),
            "\nIn all: " + ", ".join(f"{name} {h:,.3g} h" for name, h in total.items()),
            f"Hours: operations / ({UTILISATION:.0%} of the dense bfloat16 peak, TFLOP/s: {peaks}; peaks: NVIDIA's data "
            "sheets, the share is assumed).",
            f"Downloads: {weights:,.1f} GB. Disk: {stored:,.2f} GB of scores, {checkpoints:,.1f} GB of students, besides.",
        ]
    )
