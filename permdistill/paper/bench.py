"""What sharing prefixes is worth: four ways to score all orders, the same questions and probabilities, one after the other.

    python -m permdistill.paper.bench --output figures/bench.json          (`make bench`)

Arms, each given the same groups of prompts:

    padded         one padded batch for each question
    sorted         the prompts of all questions sorted by length, in batches, as evaluation harnesses do
    cached prefix  what all prompts of a group begin with is computed once; padded batches of the rest use its keys, values
    trie           :mod:`permdistill.engine.trie`
    one order      not a rival: each question in one order, nothing shared, to say what *all* orders cost more

Serving engines with a radix cache share more than the third arm; they need a GPU and are not compared here.

All arms use the same packed weights and compute logits of last tokens only. Workloads are groups of questions with real
texts: short questions, the same behind a passage of 350-400 tokens, all pairs of a SummEval document's summaries on four
attributes. On the last the rivals would take hours: they get a sample of the questions, evenly spaced by length, and what
they pay once for the whole document counts in proportion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permdistill.engine import batches, trie
from permdistill.engine.placement import PackedLinear, PeakMemory, matmul_peak, synchronise
from permdistill.files import replacing
from permdistill.orders import all_orders
from permdistill.paper.paths import committed
from permdistill.paper.readers import ATTRIBUTES, summary_pairs, summeval_file
from permdistill.paper.tasks import SEED, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question, unlabelled
from permdistill.teachers import CausalTeacher, load_teacher

MODELS = (("qwen2.5-coder-1.5b", torch.bfloat16), ("smollm2-135m", torch.float32))
WORKLOADS = ("short questions", "passages", "summaries")
RIVALS = ("padded", "sorted", "cached prefix")
PASSAGE_TOKENS = (350, 400)
QUESTIONS_A_ROUND = {"short questions": 3, "passages": 2}
SAMPLE = {"padded": 6, "sorted": 6, "cached prefix": 24, "one order": 6}  # questions of a document; the trie gets all


# --------------------------------------------------------------------------------------------------------------------
# Workloads


def rounds(name: str, teacher: CausalTeacher, n: int) -> list[list[list[Question]]]:
    """``n`` rounds of groups of questions that belong together: three short questions each a group of its own, two
    questions behind a passage, or all pairs and attributes of one document."""
    if name == "summaries":
        documents = summary_pairs(summeval_file(), 16, SEED, ATTRIBUTES)
        return [[unlabelled(questions)] for questions in list(documents.values())[:n]]
    each = QUESTIONS_A_ROUND[name]
    questions = unlabelled(load_task("arc_easy", "test").questions[: n * each])
    if name == "passages":
        articles = [article for article, _ in summeval_file().values()]
        passages = [p for p in (_passage(article, teacher) for article in articles) if p]
        questions = [Question(q.id, p, q.question, q.options) for q, p in zip(questions, passages, strict=False)]
    return [[[q] for q in questions[i : i + each]] for i in range(0, len(questions), each)]


def _passage(article: str, teacher: CausalTeacher) -> str | None:
    """Sentences from the beginning of an article until there are 350-400 tokens, None where that does not work out."""
    passage = ""
    for sentence in article.split(". "):
        passage = f"{passage}. {sentence}" if passage else sentence
        length = len(teacher.tokenizer.encode(passage, add_special_tokens=False))
        if length >= PASSAGE_TOKENS[0]:
            return passage if length <= PASSAGE_TOKENS[1] else None
    return None


# --------------------------------------------------------------------------------------------------------------------
# Arms

Groups = Sequence[Sequence[Sequence[list[int]]]]  # token ids of prompts: (group, question, order)


@dataclass
class Work:
    """What an arm did: log-probabilities (prompt, label), and how much went through the model.

    tokens  that went through the model, padding included
    pairs   (token, token it attends to)
    rows    places that went through the output layer
    once    (seconds, tokens, pairs) of it that the groups take once, however many of their questions are scored
    """

    log_probs: np.ndarray
    tokens: int
    pairs: int
    rows: int
    once: tuple[float, int, int] = (0.0, 0, 0)

    def __add__(self, other: Work) -> Work:
        once = (self.once[0] + other.once[0], self.once[1] + other.once[1], self.once[2] + other.once[2])
        log_probs = np.concatenate([self.log_probs, other.log_probs])
        return Work(log_probs, self.tokens + other.tokens, self.pairs + other.pairs, self.rows + other.rows, once)


def _causal(lengths: np.ndarray) -> int:
    """Pairs (token, token it attends to) of sequences of these lengths."""
    return int((lengths * (lengths + 1) // 2).sum())


def _in_batches(model: PreTrainedModel, prompts: Sequence[list[int]], labels: Sequence[int], max_tokens: int) -> Work:
    log_probs, tokens = batches.next_token_log_probs(model, prompts, labels, max_tokens)
    lengths = np.array([len(p) for p in prompts])
    passed = [np.full(len(b), lengths[b[0]]) for b in batches.by_length(lengths, max_tokens)]
    return Work(log_probs, tokens, _causal(np.concatenate(passed)), len(prompts))


def padded(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """One batch for each question."""
    return reduce(add, [_in_batches(model, own, labels, 10**9) for group in groups for own in group])


def length_sorted(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """Batches of all prompts by length."""
    return _in_batches(model, [p for group in groups for own in group for p in own], labels, batches.MAX_TOKENS)


def cached_prefix(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """The common beginning of each group's prompts once, the rest in padded batches by length."""
    return reduce(add, [_cached_prefix(model, [p for own in group for p in own], labels) for group in groups])


@torch.inference_mode()
def _cached_prefix(model: PreTrainedModel, prompts: Sequence[list[int]], labels: Sequence[int]) -> Work:
    first, last = min(prompts), max(prompts)
    same = [a == b for a, b in zip(first, last, strict=False)]
    shared = min(same.index(False) if False in same else len(same), min(map(len, prompts)) - 1)
    started, prefix, device = time.perf_counter(), DynamicCache(), model.device
    model(torch.tensor([first[:shared]], device=device), past_key_values=prefix, use_cache=True, logits_to_keep=1)
    synchronise(device)
    once = (time.perf_counter() - started, shared, _causal(np.array([shared])))
    lengths = np.array([len(p) - shared for p in prompts])
    result = np.empty((len(prompts), len(labels)), dtype=np.float32)
    tokens, pairs = once[1:]
    for batch in batches.by_length(lengths, batches.MAX_TOKENS):
        own = torch.from_numpy(lengths[batch])
        inside = torch.arange(int(own.max())) < own[:, None]
        ids = torch.zeros(inside.shape, dtype=torch.long)
        ids[inside] = torch.tensor([t for i in batch for t in prompts[i][shared:]])
        cache = DynamicCache()
        layer: Any
        for number, layer in enumerate(prefix.layers):
            cache.update(layer.keys.expand(len(batch), -1, -1, -1), layer.values.expand(len(batch), -1, -1, -1), number)
        mask = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), inside], dim=1).long()
        last_places = (own - 1)[:, None].to(device)
        output = model(
            ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, logits_to_keep=last_places
        )
        logits = output.logits[:, 0].float()
        result[batch] = (logits[:, list(labels)] - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
        tokens += ids.numel()
        pairs += ids.numel() * shared + _causal(np.full(len(batch), ids.shape[1]))
    return Work(result, tokens, pairs, len(prompts), once)


def shared_trie(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """Each group's trie."""
    parts = []
    for group in groups:
        prompts = [p for own in group for p in own]
        log_probs, tokens = trie.next_token_log_probs(model, prompts, labels)
        built = trie.build(prompts)  # a second time, to count
        parts.append(Work(log_probs, tokens, trie.attended(built), len(set(built.leaf.tolist()))))
    return reduce(add, parts)


def one_order(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """The first order of each question, one at a time."""
    return reduce(add, [_in_batches(model, own[:1], labels, 1) for group in groups for own in group])


ARMS: dict[str, Callable[[PreTrainedModel, Groups, Sequence[int]], Work]] = {
    "padded": padded,
    "sorted": length_sorted,
    "cached prefix": cached_prefix,
    "trie": shared_trie,
    "one order": one_order,
}


# --------------------------------------------------------------------------------------------------------------------
# Measurement


def flops(model: PreTrainedModel, work: Work) -> int:
    """Floating-point operations by formula: 2 per weight and token in linear layers, 4 x heads x head size per layer and
    attended pair (scores, and values weighted by them), 2 per weight of the output layer and row that it computes."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    kinds = (torch.nn.Linear, PackedLinear, Conv1D)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds) and m is not head)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * size
    return 2 * linears * work.tokens + attention * work.pairs + 2 * head.weight.numel() * work.rows


@torch.inference_mode()
def layers_speed(model: PreTrainedModel, rows: int = 512, passes: int = 3) -> float:
    """FLOP/s of the model's linear layers alone, one after the other, on ``rows`` tokens: the most that any engine built
    of these products can reach. Below the machine's peak where layers are narrow or their weights come from memory."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, (torch.nn.Linear, PackedLinear)) and m is not model.get_output_embeddings()
    ]
    inputs = {m.weight.shape[1]: torch.randn(1, rows, m.weight.shape[1]).to(m.weight.device, model.dtype) for m in layers}
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.weight.shape[1]])
        synchronise(model.device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * sum(m.weight.numel() for m in layers) / min(seconds)


@dataclass(frozen=True)
class Row:
    """One arm in one round of one workload. ``apart``: total variation from the trie's probabilities. Of a sample of a
    group, what the group takes once counts in proportion, in seconds, tokens and flops."""

    model: str
    dtype: str
    workload: str
    round: int
    arm: str
    questions: int
    seconds: float
    tokens: int
    flops: int
    share_of_peak: float
    peak_bytes: int
    apart_mean: float
    apart_max: float


def measure(teacher: CausalTeacher, workload: str, n: int, peak: float) -> list[Row]:
    """Every arm in every one of ``n`` rounds of a workload; the arms take turns, in each round another one first."""
    template = TEMPLATES["summaries" if workload == "summaries" else "letters"]
    rows: list[Row] = []
    for number, chosen in enumerate(tqdm(rounds(workload, teacher, n), desc=f"{teacher.name}, {workload}", unit="round")):
        orders = all_orders(len(chosen[0][0].options))
        labels = teacher.label_tokens(orders.shape[1], template)
        # Outside the clock: the same for all arms.
        prompts = [[teacher.tokenize([q], orders, template) for q in group] for group in chosen]
        if number == 0:  # what is done once in a process belongs to no arm
            for warm_up in ARMS.values():
                warm_up(teacher.model, [prompts[0][:1]], labels)
        found: dict[str, np.ndarray] = {}  # probabilities (question, order, label)
        done: list[Row] = []
        arms = list(ARMS)
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            places = [_sample(group, SAMPLE.get(arm)) for group in prompts]
            part = sum(map(len, places)) / sum(map(len, prompts))
            given = [[group[i] for i in own] for group, own in zip(prompts, places, strict=True)]
            with PeakMemory(teacher.model.device) as memory:
                started = time.perf_counter()
                work = ARMS[arm](teacher.model, given, labels)
                synchronise(teacher.model.device)
                seconds = time.perf_counter() - started
            values = np.exp(work.log_probs.astype(np.float64)).reshape(sum(map(len, places)), -1, len(labels))
            found[arm] = np.full((sum(map(len, prompts)), len(orders), len(labels)), np.nan)
            starts = np.cumsum([0, *map(len, prompts[:-1])])
            flat = np.concatenate([start + np.array(own) for start, own in zip(starts, places, strict=True)])
            found[arm][flat, : values.shape[1]] = values / values.sum(-1, keepdims=True)
            seconds, tokens, pairs = (
                whole - (1 - part) * once for whole, once in zip((seconds, work.tokens, work.pairs), work.once, strict=True)
            )
            operations = flops(teacher.model, replace(work, tokens=round(tokens), pairs=round(pairs)))
            done.append(
                Row(
                    teacher.name, str(teacher.model.dtype).removeprefix("torch."), workload, number, arm, len(flat), seconds,
                    round(tokens), operations, operations / seconds / peak, memory.bytes, 0.0, 0.0,
                )
            )  # fmt: skip
        for row in done:
            apart = np.abs(found[row.arm] - found["trie"]).sum(-1) / 2
            rows.append(replace(row, apart_mean=float(np.nanmean(apart)), apart_max=float(np.nanmax(apart))))
    return rows


def _sample(group: Sequence[Sequence[list[int]]], n: int | None) -> list[int]:
    """Places of ``n`` questions of a group, evenly spaced by length; None: of all."""
    if n is None or n >= len(group):
        return list(range(len(group)))
    by_length = np.argsort([len(own[0]) for own in group], kind="stable")
    return by_length[((np.arange(n) + 0.5) * len(group) / n).astype(int)].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Exactness


def exactness(teacher: CausalTeacher, n: int, orders_each: int = 2) -> dict[str, Any]:
    """The trie over all orders against one prompt at a time, on a sample of orders of ``n`` short questions.

    Differences of the probabilities of options, and the share of decisions that change.
    """
    rng = np.random.default_rng(SEED)
    apart, changed = [], []
    names = ("arc_easy", "arc_challenge", "openbookqa")
    questions = [q for name in names for q in unlabelled(load_task(name, "test").questions[: -(-n // len(names))])][:n]
    for question in tqdm(questions, desc=f"{teacher.name}, exactness", unit="question"):
        prompts = teacher.tokenize([question], all_orders(len(question.options)), TEMPLATES["letters"])
        labels = teacher.label_tokens(len(question.options), TEMPLATES["letters"])
        packed, _ = trie.next_token_log_probs(teacher.model, prompts, labels)
        for place in rng.choice(len(prompts), size=orders_each, replace=False):
            alone, _ = batches.next_token_log_probs(teacher.model, [prompts[place]], labels)
            a, b = (np.exp(x.astype(np.float64)) for x in (alone[0], packed[place]))
            apart.append(np.abs(a / a.sum() - b / b.sum()))
            changed.append(a.argmax() != b.argmax())
    return {
        "model": teacher.name,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "questions": len(questions),
        "prompts": len(apart),
        "mean_dp": float(np.mean(apart)),
        "max_dp": float(np.max(apart)),
        "decisions_changed": float(np.mean(changed)),
    }


@torch.inference_mode()
def breakdown(teacher: CausalTeacher, workload: str) -> dict[str, float]:
    """Where the trie's time goes in the first round of a workload: shares of linear and output layers, attention, rest."""
    template = TEMPLATES["summaries" if workload == "summaries" else "letters"]
    [groups] = rounds(workload, teacher, 1)
    orders = all_orders(len(groups[0][0].options))
    prompts = [[teacher.tokenize([q], orders, template) for q in group[: SAMPLE["cached prefix"]]] for group in groups]
    head = teacher.model.get_output_embeddings().weight.shape
    weights = {m.weight.shape for m in teacher.model.modules() if isinstance(m, (torch.nn.Linear, PackedLinear))}
    with torch.profiler.profile(record_shapes=True) as profile:
        shared_trie(teacher.model, prompts, teacher.label_tokens(orders.shape[1], template))
    seconds = dict.fromkeys(("linear layers", "output layer", "attention", "rest"), 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        shapes = {torch.Size(shape) for shape in event.input_shapes if shape}
        turned = {torch.Size(tuple(shape)[::-1]) for shape in shapes}  # torch's own products take the weight transposed
        if head in shapes | turned:
            kind = "output layer"
        elif weights & (shapes | turned):
            kind = "linear layers"
        elif "attention" in event.key or "linear" in event.key or event.key in ("aten::mm", "aten::bmm"):
            kind = "attention"
        else:
            kind = "rest"
        seconds[kind] += event.self_device_time_total or event.self_cpu_time_total
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


def run(models: Sequence[tuple[str, torch.dtype]], n: dict[str, int], n_exact: int, path: Path) -> dict[str, Any]:
    """The whole benchmark. Returns what the JSON file ``path`` holds: machine, peaks, times by kind, exactness, rows.

    What is finished is on disk before the next part starts, and is not measured again on the same machine: a killed run
    goes on where it was. To measure anew, delete the file.
    """
    result: dict[str, Any] = {"machine": machine()}
    if path.exists() and (earlier := read(path))["machine"] == result["machine"]:
        result = earlier
    for name in ("peak_flops", "layers_flops", "time", "exactness", "rows"):
        result.setdefault(name, {} if name in ("peak_flops", "layers_flops", "time") else [])

    def save() -> None:
        with replacing(path) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name, dtype in models:
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        teacher = load_teacher(name, dtype)
        measured = {row["workload"] for row in result["rows"] if f"{row['model']} {row['dtype']}" == key}
        for workload in WORKLOADS:
            if workload not in measured:
                peak = matmul_peak(teacher.model.device, dtype)
                result["rows"] += [asdict(row) for row in measure(teacher, workload, n[workload], peak)]
                # The machine's clock may move during the run: the peak before and after it.
                result["peak_flops"].setdefault(key, []).extend([peak, matmul_peak(teacher.model.device, dtype)])
                save()
        if key not in result["time"]:
            result["layers_flops"][key] = layers_speed(teacher.model)
            result["time"][key] = {workload: breakdown(teacher, workload) for workload in WORKLOADS}
            save()
        if key not in {f"{row['model']} {row['dtype']}" for row in result["exactness"]}:
            result["exactness"].append(exactness(teacher, n_exact))
            save()
        del teacher
    return result


def machine() -> dict[str, Any]:
    """What times depend on: processor, cores, threads, versions."""
    return {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def read(path: str | Path = "") -> dict[str, Any]:
    """What an earlier run of the benchmark wrote; by default the committed one."""
    return json.loads(Path(path or committed("figures/bench.json")).read_text(encoding="utf-8"))


def table(result: dict[str, Any]) -> pd.DataFrame:
    """One row for each model, workload and arm: medians over rounds; ``ratio`` is the arm's time over the trie's for the
    same questions, with its smallest and largest value over the rounds. ``share`` counts the arm's own FLOPs only."""
    frame = pd.DataFrame(result["rows"])
    frame["each"] = frame.seconds / frame.questions
    rows = []
    for (model, dtype, workload), part in frame.groupby(["model", "dtype", "workload"], sort=False):
        each = part.pivot(index="round", columns="arm", values="each")
        for arm in ARMS:
            own, ratio = part[part.arm == arm], each[arm] / each["trie"]
            row = {"model": model, "dtype": dtype, "workload": workload, "arm": arm, "rounds": len(own)}
            row |= {"questions_per_s": 1 / own.each.median(), "tokens": (own.tokens / own.questions).median()}
            row |= {"gflop": (own.flops / own.questions).median() / 1e9, "share": own.share_of_peak.median()}
            row |= {"peak_mb": own.peak_bytes.max() / 1e6, "tv_max": own.apart_max.max()}
            row |= {"ratio": ratio.median(), "ratio_low": ratio.min(), "ratio_high": ratio.max()}
            rows.append(row)
    return pd.DataFrame(rows)


def pretty(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`table` for people."""
    span = [f"{r:.2f} [{a:.2f}, {b:.2f}]" for r, a, b in zip(frame.ratio, frame.ratio_low, frame.ratio_high, strict=True)]
    return pd.DataFrame(
        {
            "model": [f"{m}, {d}" for m, d in zip(frame.model, frame["dtype"], strict=True)],
            "workload": frame.workload,
            "arm": frame.arm,
            "questions/s": [f"{v:.3g}" for v in frame.questions_per_s],
            "tokens a question": frame.tokens.round().astype(int),
            "GFLOP a question": frame.gflop.round().astype(int),
            "share of matmul peak": [f"{v:.0%}" for v in frame.share],
            "peak memory, MB": frame.peak_mb.round().astype(int),
            "time / the trie's": span,
        }
    )


def limits(result: dict[str, Any]) -> pd.DataFrame:
    """What the machine gave, GFLOP/s: its fastest matrix product (lowest and highest of those before and after each
    workload), the model's linear layers alone (:func:`layers_speed`); and where the trie's time goes (:func:`breakdown`)."""
    rows = []
    for key, peaks in result["peak_flops"].items():
        layers = result["layers_flops"][key]
        row = {"model": key, "matmul peak": f"{min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}"}
        row |= {"its linear layers alone": round(layers / 1e9), "their share of the peak": f"{layers / max(peaks):.0%}"}
        for workload, shares in result["time"][key].items():
            rows.append({**row, "workload": workload, **{f"time: {kind}": f"{v:.0%}" for kind, v in shares.items()}})
    return pd.DataFrame(rows)


def over_one_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`table`: all orders in the trie in units of one pass with one order, median [min, max] over rounds."""
    one = frame[frame.arm == "one order"]
    span = [
        f"{1 / m:.2f} [{1 / b:.2f}, {1 / a:.2f}]" for m, a, b in zip(one.ratio, one.ratio_low, one.ratio_high, strict=True)
    ]
    return one[["model", "workload"]].assign(**{"all orders / one order": span}).reset_index(drop=True)


def agreement(result: dict[str, Any]) -> pd.DataFrame:
    """The trie against one prompt at a time: differences of the options' probabilities, share of decisions that change."""
    return pd.DataFrame(result["exactness"])


def main() -> None:
    """Entry point of ``python -m permdistill.paper.bench``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="finished parts in it are kept")
    parser.add_argument(
        "--models", nargs="+", default=[name for name, _ in MODELS], help="of those two, or others in bfloat16"
    )
    parser.add_argument("--short", type=int, default=3, help="rounds of three short questions")
    parser.add_argument("--passages", type=int, default=3, help="rounds of two questions behind a passage")
    parser.add_argument("--documents", type=int, default=3, help="rounds of a document, 16 systems x 4 attributes")
    parser.add_argument("--exact", type=int, default=40, help="questions compared with one prompt at a time")
    args = parser.parse_args()
    n = dict(zip(WORKLOADS, (args.short, args.passages, args.documents), strict=True))
    known = dict(MODELS)
    models = [(name, known.get(name, torch.bfloat16)) for name in args.models]
    result = run(models, n, args.exact, args.output)
    print(pretty(table(result)).to_string(index=False))
    print(agreement(result).to_string(index=False, float_format="%.2g"))


if __name__ == "__main__":
    main()
