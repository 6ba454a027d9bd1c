"""What an answer costs: teachers and students on the same questions, on one machine, taking turns.

    python -m permdistill.paper.cost --output figures/cost.json          (`make cost`)

A teacher answers in one order (a biased answer), in all orders one by one (24 prompts), and in all orders through the
shared-prefix engine. A student answers in one order, tokenisation included; its weights do not matter, so they are
untrained. What error correction adds to that is one call of the teacher. Training is measured too, beside the machine's
limit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from permdistill import debias
from permdistill.engine.placement import PackedLinear, has_bfloat16, matmul_peak
from permdistill.files import write_text
from permdistill.lessons import Lesson
from permdistill.orders import all_orders
from permdistill.paper import bench
from permdistill.paper.matrix import LENGTH
from permdistill.paper.models import TEACHERS
from permdistill.paper.paths import committed
from permdistill.paper.systems import head_title
from permdistill.paper.tasks import MULTIPLE_CHOICE, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question, unlabelled
from permdistill.students import StudentConfig, build
from permdistill.teachers import CausalTeacher, load_teacher
from permdistill.training import TrainingConfig, read_log, train

ENCODERS = ("all-MiniLM-L6-v2", "all-mpnet-base-v2")
ONE, EACH, SHARED = "one order", "all orders, one by one", "all orders, shared prefixes"


def one_by_one(model: Any, groups: bench.Groups, labels: Sequence[int]) -> bench.Work:
    """Every prompt alone."""
    return reduce(add, [bench.one_order(model, [[[prompt]]], labels) for group in groups for own in group for prompt in own])


ARMS = {ONE: bench.one_order, EACH: one_by_one, SHARED: bench.shared_trie}


def _questions() -> list[Question]:
    """Test questions of the three sets in turn."""
    tasks = [load_task(task, "test").questions for task in MULTIPLE_CHOICE]
    return unlabelled([question for several in zip(*tasks, strict=False) for question in several])


def parameters_of(teacher: CausalTeacher) -> int:
    """How many parameters a teacher has. Packed weights are not among its module's own; an output layer that is tied to the
    input embedding counts once, also where it is a float32 copy."""
    model = teacher.model
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    more = [t for m in packed for t in (m.weight, m.bias) if t is not None]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    twice = head.numel() if model.config.get_text_config().tie_word_embeddings and head is not embedding else 0
    return sum(t.numel() for t in (*model.parameters(), *more)) - twice


def teacher_rows(teacher: CausalTeacher, rounds: int, each: int) -> list[dict[str, Any]]:
    """Every arm of a teacher in every round, on ``each`` questions a round."""
    template, questions, rows = TEMPLATES["letters"], _questions(), []
    parameters = parameters_of(teacher)
    for number in tqdm(range(rounds), desc=teacher.name, unit="round"):
        chosen = questions[number * each : (number + 1) * each]
        orders = all_orders(len(chosen[0].options))
        labels = teacher.label_tokens(orders.shape[1], template)
        groups = [[teacher.tokenize([question], orders, template)] for question in chosen]
        for arm, run in ARMS.items():
            if number == 0:  # what is done once in a process belongs to no arm
                run(teacher.model, [[groups[0][0][:2]]], labels)
            started = time.perf_counter()
            work = run(teacher.model, groups, labels)
            seconds = time.perf_counter() - started
            rows.append(
                {"kind": "teacher", "teacher": teacher.name, "arm": arm, "parameters": parameters, "round": number}
                | {"seconds": seconds / each, "flops": bench.flops(teacher.model, work) / each}
            )
    return rows


def student_rows(rounds: int, each: int) -> list[dict[str, Any]]:
    """Every encoder and head in every round, on ``each`` questions a round."""
    questions, rows = _questions(), []
    students = {
        (encoder, head): build(StudentConfig(encoder, head, "plain", 4, length), 0)
        for encoder in ENCODERS
        for head, length in LENGTH.items()
    }
    one = all_orders(4)[:1]
    for student in students.values():
        student.predict_batch(questions[:8], one)
    for number in tqdm(range(rounds), desc="students", unit="round"):
        chosen = questions[number * each : (number + 1) * each]
        for (encoder, head), student in students.items():
            started = time.perf_counter()
            student.predict_batch(chosen, one)
            seconds = time.perf_counter() - started
            with FlopCounterMode(display=False) as counter:
                student.predict_batch(chosen, one)
            parameters = sum(p.numel() for p in student.model.parameters())
            rows.append(
                {"kind": "student", "encoder": encoder, "head": head, "parameters": parameters, "round": number}
                | {"seconds": seconds / each, "flops": counter.get_total_flops() / each}
            )
    return rows


def training_rows(rounds: int, n: int) -> list[dict[str, Any]]:
    """Training of every encoder and head in every round, one epoch of the same ``n`` questions with whatever belongs to it
    (tokenising, optimiser, checkpoint), and before each the machine's fastest matrix product."""
    questions, rows = _questions(), []
    cpu = torch.device("cpu")
    dtype = torch.bfloat16 if has_bfloat16(cpu) else torch.float32  # what mixed_precision multiplies in
    operations: dict[tuple[str, str], float] = {}  # counted once: counting takes as long as training
    k = len(questions[0].options)
    lesson = Lesson(questions[:n], np.random.default_rng(0).dirichlet(np.ones(k), size=n))  # what they are costs nothing
    for number in tqdm(range(rounds), desc="training", unit="round"):
        for encoder in ENCODERS:
            for head, length in LENGTH.items():
                config = StudentConfig(encoder, head, "plain", k, length)
                peak = matmul_peak(cpu, dtype, seconds=0.5)
                with tempfile.TemporaryDirectory() as folder:
                    train(config, TrainingConfig(epochs=1), lesson, folder)
                    seconds = read_log(folder)["seconds"]
                    if (encoder, head) not in operations:
                        with FlopCounterMode(display=False) as counter:
                            train(config, TrainingConfig(epochs=1, seed=1), lesson, folder)
                        operations[encoder, head] = counter.get_total_flops() / n
                row = {"encoder": encoder, "head": head, "round": number, "peak": peak}
                rows.append(row | {"seconds": seconds / n, "flops": operations[encoder, head]})
    return rows


def training_table(result: dict[str, Any]) -> pd.DataFrame:
    """One row a system: medians over rounds of questions/s in training, operations a question (forward and backward), and
    the share that both make of the fastest matrix product of the machine."""
    frame = pd.DataFrame(result["training"])
    frame = frame.assign(share=frame.flops / frame.seconds / frame.peak, speed=1 / frame.seconds, gflop=frame.flops / 1e9)
    by = frame.groupby(["encoder", "head"], sort=False)[["speed", "gflop", "share"]].median().reset_index()
    return by.rename(columns={"speed": "questions/s", "gflop": "GFLOP a question", "share": "share of the peak"})


def read(path: str | Path = "") -> dict[str, Any]:
    """What an earlier run wrote; by default the committed one."""
    return json.loads(Path(path or committed("figures/cost.json")).read_text(encoding="utf-8"))


def table(result: dict[str, Any]) -> pd.DataFrame:
    """One row a system: parameters, medians over rounds of seconds and FLOPs a question, and how many times as many
    questions a second that is as the first teacher gives in one order, and in all orders one by one."""
    frame = pd.DataFrame(result["rows"])
    what = ["kind", "teacher", "arm", "encoder", "head"]
    by = frame.groupby([*what, "parameters"], sort=False, dropna=False)[["seconds", "flops"]].median().reset_index()
    seconds = by[by.teacher == by.teacher.dropna().iloc[0]].set_index("arm").seconds
    for name, arm in (("times one order", ONE), ("times all orders", EACH)):
        by[name] = seconds[arm] / by.seconds
    return by


def _short(values: pd.Series) -> list[str]:
    """Three digits, e.g. "6,040"."""
    return [f"{float(f'{value:.3g}'):,g}" for value in values]


def pretty(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`table` for people."""
    teacher, student = frame.teacher + ", " + frame.arm, frame.encoder + ", " + frame["head"].map(head_title, "ignore")
    return pd.DataFrame(
        {
            "system": teacher.fillna(student),
            "parameters, millions": (frame.parameters / 1e6).round(1),
            "questions/s": _short(1 / frame.seconds),
            "GFLOP a question": _short(frame.flops / 1e9),
            "times as fast as one order": _short(frame["times one order"]),
            "times as fast as all orders one by one": _short(frame["times all orders"]),
        }
    )


def of_systems(systems: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`permdistill.paper.ablations.compare` with ``seconds`` and ``flops`` of an answer to a question in
    one order: as many calls of the teacher as it takes (all orders through the shared-prefix engine), and a student's
    own share."""
    teachers, students = (costs.set_index(by)[["seconds", "flops"]] for by in (["teacher", "arm"], ["encoder", "head"]))
    rows = []
    for row in systems.itertuples():
        shared = row.method == debias.DEBIASED
        cost = teachers.loc[(row.teacher, SHARED)] if shared else row.calls * teachers.loc[(row.teacher, ONE)]
        rows.append(cost + students.loc[(row.encoder, row.head)] if row.kind == "student" else cost)
    return systems.assign(seconds=[row.seconds for row in rows], flops=[row.flops for row in rows])


def main() -> None:
    """Entry point of ``python -m permdistill.paper.cost``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("cost.json"))
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS[:2]))
    parser.add_argument("--rounds", type=int, default=3)
    text = "a round, of teachers and students; half as many of the second to train on"
    parser.add_argument("--questions", nargs=2, type=int, default=(2, 64), help=text)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": bench.machine(), "training": training_rows(args.rounds, args.questions[1] // 2)}
    result["rows"] = student_rows(args.rounds, args.questions[1])
    for name in args.teachers:
        result["rows"] += teacher_rows(load_teacher(name), args.rounds, args.questions[0])
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(pretty(table(result)).to_string(index=False))
    print(f"\nTraining\n{training_table(result).to_string(index=False, float_format='{:.3g}'.format)}")


if __name__ == "__main__":
    main()
