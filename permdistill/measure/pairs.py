"""Pairs judged in both orders, as the benchmarks of judges count them: each definition is that of the benchmark's code."""

from __future__ import annotations

import numpy as np

from permdistill.debias import decide
from permdistill.measure.records import Records

TIE, FAILED = 2, 3  # verdicts beside the two options


def verdicts(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of the pairs with one record in each of the two orders, (pair, 2): an option's index, :data:`TIE` or
    :data:`FAILED`, first of the order 0, 1, then of 1, 0; and the gold answers (pair,), -1 where there is none."""
    for block in records.blocks():
        if block.orders.shape[1:] != (2, 2):
            continue
        both = (block.orders == [[0, 1], [1, 0]]).all(axis=(1, 2))
        P, answers = block.P[both], block.answers[both]
        failed = np.isnan(P).any(axis=2)
        D = decide(np.where(failed[..., None], 0.5, P)) if len(P) else P
        found = np.where(D.max(axis=2) < 1, TIE, D.argmax(axis=2)) if len(P) else np.zeros((0, 2), dtype=np.int64)
        return np.where(failed, FAILED, found), answers
    return np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.int64)


def rates(records: Records) -> dict[str, np.ndarray]:
    """{name: 0 or 1 for each pair}, means are the rates; empty without pairs in both orders.

    MT-bench (Zheng et al., NeurIPS 2023, table 2): consistent, biased toward first, biased toward second, error; they sum
    to 1. A pair with an unreadable verdict is an error; one that is inconsistent leans to the position that wins more.
    LLMBar (Zeng et al., ICLR 2024): correct_average, correct_both, equal; a tie is no correct answer, two unreadable
    verdicts are equal. JudgeBench (Tan et al., ICLR 2025): right where the two verdicts count more for the gold answer than
    against it, +1 for it, -1 for the other, 0 for a tie or none. Pairs without a gold answer are left out of the last three.
    """
    v, gold = verdicts(records)
    if not len(v):
        return {}
    first, second = v.T
    error, same = (v == FAILED).any(axis=1), first == second
    # In the order 0, 1 option 0 stands first; in the order 1, 0 it is option 1.
    lean = (first == 0).astype(int) - (first == 1) + (second == 1) - (second == 0)
    found = {
        "consistent (MT-bench)": same & ~error,
        "biased toward first (MT-bench)": ~same & ~error & (lean > 0),
        "biased toward second (MT-bench)": ~same & ~error & (lean < 0),
        "error (MT-bench)": error,
        "equal (LLMBar)": same,
    }
    if (known := gold >= 0).any():
        right = v[known] == gold[known, None]
        wrong = v[known] == 1 - gold[known, None]
        found |= {
            "correct_average (LLMBar)": right.mean(axis=1),
            "correct_both (LLMBar)": right.all(axis=1),
            "accuracy (JudgeBench)": right.sum(axis=1) > wrong.sum(axis=1),
        }
    return {name: np.asarray(values, dtype=float) for name, values in found.items()}
