"""What sharing prefixes is worth: ways to score all orders, the same questions and probabilities, one after the other.

    python -m permdistill.paper.bench --keep figures                       (`make bench`)
    python -m permdistill.paper.bench --quick --keep figures               two minutes of a GPU, once weights are loaded

A CPU's figures are kept as ``figures/bench.json``, a GPU's beside them as ``figures/bench-<name of the card>.json``.

Arms (:mod:`permdistill.paper.arms`), each given the same groups of prompts:

    padded         one padded batch for each question
    sorted         the prompts of all questions sorted by length, in batches, as evaluation harnesses do
    cached prefix  what all prompts of a group begin with is computed once; padded batches of the rest use its keys, values
    trie           a trie for each group (:mod:`permdistill.engine.trie`)
    forest         many groups a pass (:mod:`permdistill.engine.forest`), what scoring does
    one order      not a rival: each question in one order, nothing shared, to say what *all* orders cost more

On a GPU also the forest without attention by blocks. Serving engines with a radix cache share more than the third arm:
`vllm serve MODEL --enable-prefix-caching` and `python -m sglang.launch_server --model-path MODEL` answer `permdistill ask`;
no figures of them are shown here.

All arms use the same packed weights and compute logits of last tokens only. Workloads are groups of questions with real
texts: short questions, the same behind a passage of 350-400 tokens, all pairs of a SummEval document's summaries on four
attributes, and 16 questions (64 on a GPU) at a time of some sets. Where rivals would take hours, they get a sample of the
questions, evenly spaced by length, and what they pay once for the whole document counts in proportion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from permdistill.engine import attention, batches, trie
from permdistill.engine.placement import PackedLinear, PeakMemory, matmul_peak, synchronise
from permdistill.files import write_text
from permdistill.orders import all_orders, to_options
from permdistill.paper import hub
from permdistill.paper.arms import ARMS, GPU_ARMS, Groups, Work, counted, flops, layers_speed, one_order, sample, shared_trie
from permdistill.paper.paths import committed
from permdistill.paper.readers import ATTRIBUTES, summary_pairs, summeval_file
from permdistill.paper.tasks import SEED, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question, unlabelled
from permdistill.teachers import CausalTeacher, load_teacher

__all__ = ["ARMS", "Groups", "Work", "flops", "one_order", "shared_trie"]  # of arms, for who counts costs

MODELS = (("qwen2.5-coder-1.5b", torch.bfloat16), ("smollm2-135m", torch.float32))
WORKLOADS = ("short questions", "passages", "summaries")
PASSAGE_TOKENS = (350, 400)
QUESTIONS_A_ROUND = {"short questions": 3, "passages": 2}
SETS = {"PIQA": "piqa", "SocialIQA": "socialiqa", "ARC-Easy": "arc_easy", "OpenBookQA": "openbookqa", "RACE": "race_middle"}
QUESTIONS_OF_A_SET, QUESTIONS_OF_A_SET_GPU = 16, 64
SAMPLE = {"padded": 6, "sorted": 6, "cached prefix": 24, "one order": 6}  # questions of a round; trie and forest get all
QUICK_ARMS = ("sorted", "trie", "forest", *GPU_ARMS)
SECONDS = 80.0  # after which --quick begins nothing else
QUICK = ("ARC-Easy", "RACE", "PIQA", "SocialIQA", "summaries")


# --------------------------------------------------------------------------------------------------------------------
# Workloads


def rounds(name: str, teacher: CausalTeacher, n: int) -> list[list[list[Question]]]:
    """``n`` rounds of groups of questions that belong together: three short questions each a group of its own, two
    questions behind a passage, all pairs and attributes of one document, or a set's questions by their context."""
    if name in SETS:
        return _rounds_of_a_set(SETS[name], n, QUESTIONS_OF_A_SET if on_cpu(teacher) else QUESTIONS_OF_A_SET_GPU)
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


def _rounds_of_a_set(task: str, n: int, each: int) -> list[list[list[Question]]]:
    questions = unlabelled(load_task(task, "test").questions[: n * each])
    result = []
    for start in range(0, len(questions), each):
        groups: dict[str, list[Question]] = {}
        for question in questions[start : start + each]:
            groups.setdefault(question.context or question.id, []).append(question)
        result.append(list(groups.values()))
    return result


def on_cpu(teacher: CausalTeacher) -> bool:
    return teacher.model.device.type == "cpu"


def available(workload: str) -> bool:
    """Whether a workload's questions are here: RACE is not packaged, and comes from a folder that stands for the hub."""
    return workload != "RACE" or hub.LOCAL in os.environ


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
# Measurement


@dataclass(frozen=True)
class Row:
    """One arm in one round of one workload. ``apart``: total variation from the trie's probabilities. Of a sample of a
    group, what the group takes once counts in proportion, in seconds, tokens and flops. ``host_seconds``: of prompts, token
    ids and tries of all questions, on one thread; while an arm of forests runs, another thread does that."""

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
    host_seconds: float = float("nan")


def measure(
    teacher: CausalTeacher, workload: str, n: int, peak: float, chosen_arms: Sequence[str] = (*ARMS, *GPU_ARMS)
) -> list[Row]:
    """Every arm in every one of ``n`` rounds of a workload; the arms take turns, in each round another one first."""
    template = TEMPLATES["summaries" if workload == "summaries" else "letters"]
    ways = {name: run for name, run in ARMS.items() if name in chosen_arms}
    ways |= {name: run for name, run in GPU_ARMS.items() if name in chosen_arms and attention.flexible(teacher.model)}
    rows: list[Row] = []
    for number, chosen in enumerate(tqdm(rounds(workload, teacher, n), desc=f"{teacher.name}, {workload}", unit="round")):
        orders = all_orders(len(chosen[0][0].options))
        labels = teacher.label_tokens(orders.shape[1], template)
        started = time.perf_counter()
        prompts = [[teacher.tokenize([q], orders, template) for q in group] for group in chosen]
        trie.build([p for group in prompts for own in group for p in own])
        host = time.perf_counter() - started  # outside the arms' clock: much the same for all of them
        if number == 0:  # what is done once in a process belongs to no arm
            for warm_up in ways.values():
                warm_up(teacher.model, [prompts[0][:1]] if on_cpu(teacher) else prompts, labels)
        found: dict[str, np.ndarray] = {}  # probabilities (question, order, label)
        done: list[Row] = []
        arms = list(ways)
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            row, found[arm] = _one(teacher, ways[arm], prompts, sample(prompts, SAMPLE.get(arm)), labels, peak)
            done.append(replace(row, workload=workload, round=number, arm=arm, host_seconds=host))
        for row in done:
            apart = np.abs(found[row.arm] - found["trie"]).sum(-1) / 2
            rows.append(replace(row, apart_mean=float(np.nanmean(apart)), apart_max=float(np.nanmax(apart))))
    return rows


def _one(
    teacher: CausalTeacher,
    run: Callable[[PreTrainedModel, Groups, Sequence[int]], Work],
    prompts: Groups,
    places: Sequence[Sequence[int]],
    labels: Sequence[int],
    peak: float,
) -> tuple[Row, np.ndarray]:
    """One arm once, on the questions at ``places`` of each group: what it took, and probabilities (question, order, label),
    nan for what it did not get."""
    used = [(group, own) for group, own in zip(prompts, places, strict=True) if own]
    part = sum(len(own) for _, own in used) / sum(len(group) for group, _ in used)
    given = [[group[i] for i in own] for group, own in used]
    with PeakMemory(teacher.model.device) as memory:
        started = time.perf_counter()
        work = run(teacher.model, given, labels)
        synchronise(teacher.model.device)
        seconds = time.perf_counter() - started
    work = counted(work, given)
    starts = np.cumsum([0, *map(len, prompts[:-1])])
    flat = np.concatenate([start + np.array(own, dtype=int) for start, own in zip(starts, places, strict=True)])
    values = np.exp(work.log_probs.astype(np.float64)).reshape(len(flat), -1, len(labels))
    found = np.full((sum(map(len, prompts)), len(prompts[0][0]), len(labels)), np.nan)
    found[flat, : values.shape[1]] = values / values.sum(-1, keepdims=True)
    seconds, tokens, pairs = (
        whole - (1 - part) * once for whole, once in zip((seconds, work.tokens, work.pairs), work.once, strict=True)
    )
    operations = flops(teacher.model, replace(work, tokens=round(tokens), pairs=round(pairs)))
    row = Row(
        teacher.name, str(teacher.model.dtype).removeprefix("torch."), "", 0, "", len(flat), seconds,
        round(tokens), operations, operations / seconds / peak, memory.bytes, 0.0, 0.0,
    )  # fmt: skip
    return row, found


# --------------------------------------------------------------------------------------------------------------------
# Exactness


def exactness(teacher: CausalTeacher, n: int, orders_each: int = 2) -> dict[str, Any]:
    """All orders in forests against one prompt at a time, on a sample of orders of ``n`` short questions of several K.

    Differences of the probabilities of options, and the share of decisions that change.
    """
    rng = np.random.default_rng(SEED)
    names, template = ("arc_easy", "piqa", "openbookqa", "socialiqa", "arc_challenge"), TEMPLATES["letters"]
    questions = [q for name in names for q in unlabelled(load_task(name, "test").questions[: -(-n // len(names))])][:n]
    questions = [questions[i] for i in rng.permutation(n)]  # of several K in a pass
    packed = dict(pair for done in teacher.stream([[question] for question in questions], template) for pair in done)
    apart, changed = [], []
    for number, question in enumerate(tqdm(questions, desc=f"{teacher.name}, exactness", unit="question")):
        orders = all_orders(len(question.options))
        labels = teacher.label_tokens(len(question.options), template)
        for place in rng.choice(len(orders), size=min(orders_each, len(orders)), replace=False):
            [prompt] = teacher.tokenize([question], orders[[place]], template)
            alone, _ = batches.next_token_log_probs(teacher.model, [prompt], labels)
            a, b = (
                np.exp(to_options(alone, orders[[place]])[0].astype(np.float64)),
                np.exp(packed[number][place].astype(np.float64)),
            )
            apart.append(np.abs(a / a.sum() - b / b.sum()).max())
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


def run(
    models: Sequence[tuple[str, torch.dtype]], n: dict[str, int], n_exact: int, path: Path, quick: float | None = None
) -> dict[str, Any]:
    """The whole benchmark. Returns what the JSON file ``path`` holds: machine, peaks, times by kind, exactness, rows.

    n      rounds of each workload
    quick  seconds after which no other workload is begun; then there are few arms, and no times by kind

    What is finished is on disk before the next part starts, and is not measured again on the same machine: a killed run
    goes on where it was. To measure anew, delete the file.
    """
    result: dict[str, Any] = {"machine": machine()}
    if path.exists() and (earlier := read(path))["machine"] == result["machine"]:
        result = earlier
    for name in ("peak_flops", "layers_flops", "time", "exactness", "rows"):
        result.setdefault(name, {} if name in ("peak_flops", "layers_flops", "time") else [])
    for name, dtype in models:
        teacher = load_teacher(name, dtype)
        _measure_all(teacher, dtype, n, result, path, quick)
        if quick is None:
            _look_closer(teacher, f"{name} {str(dtype).removeprefix('torch.')}", n, n_exact, result, path)
        del teacher
    return result


def _save(result: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def _measure_all(
    teacher: CausalTeacher, dtype: torch.dtype, n: dict[str, int], result: dict[str, Any], path: Path, quick: float | None
) -> None:
    key = f"{teacher.name} {str(dtype).removeprefix('torch.')}"
    measured = {row["workload"] for row in result["rows"] if f"{row['model']} {row['dtype']}" == key}
    started = time.perf_counter()
    for workload in n:
        late = quick is not None and time.perf_counter() - started > quick
        if workload in measured or not n[workload] or not available(workload) or late:
            continue
        peak = matmul_peak(teacher.model.device, dtype)
        arms = {} if quick is None else {"chosen_arms": QUICK_ARMS}
        result["rows"] += [asdict(row) for row in measure(teacher, workload, n[workload], peak, **arms)]
        # The machine's clock may move during the run: the peak before and after it.
        result["peak_flops"].setdefault(key, []).extend([peak, matmul_peak(teacher.model.device, dtype)])
        _save(result, path)


def _look_closer(
    teacher: CausalTeacher, key: str, n: dict[str, int], n_exact: int, result: dict[str, Any], path: Path
) -> None:
    """Times by kind and exactness."""
    if key not in result["time"]:
        result["layers_flops"][key] = layers_speed(teacher.model)
        result["time"][key] = {workload: breakdown(teacher, workload) for workload in WORKLOADS if workload in n}
        _save(result, path)
    if key not in {f"{row['model']} {row['dtype']}" for row in result["exactness"]}:
        result["exactness"].append(exactness(teacher, n_exact))
        _save(result, path)


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


def file_name(processor: str) -> str:
    """Where figures of the machine at hand are kept: bench.json on a CPU, on a GPU bench-<its name>.json."""
    card = re.sub("[^a-z0-9]+", "-", processor.lower()).strip("-")
    return f"bench-{card}.json" if torch.cuda.is_available() else "bench.json"


def of_cards(folder: str | Path = "") -> pd.DataFrame:
    """:func:`pretty` of all GPUs whose figures are in ``folder`` ("": the committed ones), with a column "card"."""
    files = sorted(Path(folder or committed("figures")).glob("bench-*.json"))
    cards = {found["machine"]["processor"]: pretty(table(found)) for found in map(read, files)}
    return pd.concat(cards, names=["card"]).reset_index("card") if cards else pd.DataFrame({"card": []})


def table(result: dict[str, Any]) -> pd.DataFrame:
    """One row for each model, workload and arm: medians over rounds; ``ratio`` is the arm's time over the trie's for the
    same questions, with its smallest and largest value over the rounds. ``share`` counts the arm's own FLOPs only."""
    frame = pd.DataFrame(result["rows"])
    frame["each"] = frame.seconds / frame.questions
    rows = []
    for (model, dtype, workload), part in frame.groupby(["model", "dtype", "workload"], sort=False):
        whole = part.questions.max()  # what the host prepares is that of all questions of a round
        each = part.pivot(index="round", columns="arm", values="each")
        for arm in [arm for arm in (*ARMS, *GPU_ARMS) if arm in each]:
            own, ratio = part[part.arm == arm], each[arm] / each["trie"]
            row = {"model": model, "dtype": dtype, "workload": workload, "arm": arm, "rounds": len(own)}
            row |= {"questions_per_s": 1 / own.each.median(), "tokens": (own.tokens / own.questions).median()}
            row |= {"gflop": (own.flops / own.questions).median() / 1e9, "share": own.share_of_peak.median()}
            row |= {"peak_mb": own.peak_bytes.max() / 1e6, "tv_max": own.apart_max.max()}
            row |= {"host_ms": 1000 * (own.host_seconds / whole).median()} if "host_seconds" in own else {}
            row |= {"ratio": ratio.median(), "ratio_low": ratio.min(), "ratio_high": ratio.max()}
            rows.append(row)
    return pd.DataFrame(rows)


def pretty(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`table` for people."""
    span = [f"{r:.2f} [{a:.2f}, {b:.2f}]" for r, a, b in zip(frame.ratio, frame.ratio_low, frame.ratio_high, strict=True)]
    result = pd.DataFrame(
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
    # Figures of before have none of it.
    return result.assign(**{"host, ms a question": frame.host_ms.round(2)}) if "host_ms" in frame else result


def limits(result: dict[str, Any]) -> pd.DataFrame:
    """What the machine gave, GFLOP/s: its fastest matrix product (lowest and highest of those before and after each
    workload), the model's linear layers alone (:func:`layers_speed`); and where the trie's time goes (:func:`breakdown`)."""
    rows = []
    for key in (key for key in result["peak_flops"] if key in result["time"]):  # a run that was stopped lacks some
        peaks, layers = result["peak_flops"][key], result["layers_flops"][key]
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
    parser.add_argument("--keep", type=Path, help="folder for a copy of the whole, under the card's name")
    parser.add_argument(
        "--models", nargs="+", default=[name for name, _ in MODELS], help="of those two, or others in bfloat16"
    )
    parser.add_argument("--short", type=int, default=3, help="rounds of three short questions")
    parser.add_argument("--passages", type=int, default=3, help="rounds of two questions behind a passage")
    parser.add_argument("--documents", type=int, default=3, help="rounds of a document, 16 systems x 4 attributes")
    parser.add_argument("--sets", type=int, default=2, help=f"rounds of questions of {', '.join(SETS)}")
    parser.add_argument("--exact", type=int, default=40, help="questions compared with one prompt at a time")
    parser.add_argument(
        "--quick", action="store_true", help="few arms, two minutes of a GPU; of --models the first one only"
    )
    args = parser.parse_args()
    n = dict(zip(WORKLOADS, (args.short, args.passages, args.documents), strict=True)) | dict.fromkeys(SETS, args.sets)
    known = dict(MODELS)
    models = [(name, known.get(name, torch.bfloat16)) for name in args.models]
    if args.quick:
        models, n = models[:1], {name: 1 if name == "summaries" else args.sets for name in QUICK}
    result = run(models, n, args.exact, args.output, SECONDS if args.quick else None)
    if not result["rows"]:
        sys.exit("nothing was measured: there was no time for it")
    if args.keep:
        _save(result, args.keep / file_name(result["machine"]["processor"]))
    print(pretty(table(result)).to_string(index=False))
    if result["exactness"]:
        print(agreement(result).to_string(index=False, float_format="%.2g"))


if __name__ == "__main__":
    main()
