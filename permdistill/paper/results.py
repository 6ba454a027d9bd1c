"""The committed tables and figures as one page, ``figures/README.md``, and the README's headline table.

python -m permdistill.paper results        bring both up to date with figures/*.csv
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from permdistill.paper import tables


class Section(NamedTuple):
    """One table of the page: the name of its file, its heading, and what a reader has to know."""

    name: str
    heading: str
    text: str


SECTIONS = (
    Section(
        "T1_teachers",
        "T1. Teachers, biased and debiased (notebook 01_teachers)",
        "Accuracy of the biased answers (mean over orders), with position weights fitted without labels (prior-matching), fitted "
        'for each question (context prior-matching), and averaged over all orders. "gain" is that average over the biased '
        "answers, paired. ps is permutation sensitivity (total variation). SummEval's pairs are K = 2, and the biased 1.5B "
        "teacher names the first summary nearly always.",
    ),
    Section(
        "T2_students_multiple_choice",
        "T2. Students on multiple choice (notebook 02_students)",
        "ARC-Easy, ARC-Challenge and OpenBookQA as one. The 1.5B teacher taught them with questions that have no gold answers. "
        "`make paper` trains these students.",
    ),
    Section(
        "T3_students_summeval",
        "T3. Students on SummEval (notebook 02_students)",
        "Pairs of summaries, four attributes as one. `make paper` trains these students.",
    ),
    Section(
        "T4_matrix",
        "T4. All students on multiple choice (notebook 03_matrix)",
        "Students that take hours to train together: `make students` does it, and their predictions are kept in `predictions/`. "
        'One row for all seeds of a student. "Untrained" is the sentence encoder\'s own cosine between question and option, which '
        "no teacher taught anything.",
    ),
    Section(
        "T5_summaries",
        "T5. Students on SummEval, stored",
        "At a learning rate of 1e-5, at which students stay near the encoder that they begin with. It was picked after "
        "accuracies on these test questions had been seen, so the rows above the biased teacher do not count as a result.",
    ),
    Section("T6_piqa", "T6. Students on PIQA, stored", "Pairs of which the averaged teacher knows more than of SummEval's."),
    Section("F2_draws", "F2. Black-box draws", "Targets are histograms of so many sampled decisions a question."),
    Section("F3_questions", "F3. Training questions", "The same student, taught by fewer questions."),
    Section(
        "T4_collapse",
        "The collapse check",
        "The joint head in plain distillation. Chance is 25%. A student whose training KL stays at that of 1/K (uniform) has not "
        "even learnt the questions that it was shown.",
    ),
    Section(
        "C1_claims",
        "C1. The paper's claims (notebook 07_claims)",
        "The criterion of each stands in `permdistill/paper/claims.py`.",
    ),
    Section(
        "P1_performance",
        "P1. What all orders cost (notebook 05_shared_prefixes)",
        "Two cores, all arms with the same packed weights and logits of last tokens only, taking turns (`make bench`). Time is in "
        "units of the trie's, the median over rounds with the smallest and largest.",
    ),
    Section("P2_cost", "P2. What an answer costs (notebook 03_matrix)", "Measured by `make cost` on one machine."),
)
FIGURES = {
    "F_positions": "Which positions the teachers prefer; the dashed line is no preference.",
    "D1_debiasers": "What a teacher call buys, for every debiaser of the field on the same scores (notebook 06_debiasers).",
    "F4_encoders": "Encoder, head and input (notebook 03_matrix).",
    "F5_sensitivity_accuracy": "Sensitivity against accuracy (notebook 04_sensitivity_accuracy).",
    "P2_accuracy_cost": "Accuracy against what an answer costs (notebook 03_matrix).",
}


def page(folder: str | Path) -> str:
    """figures/README.md from the CSV files and pictures in ``folder``."""
    folder = Path(folder)
    parts = [
        "# Tables and figures",
        "As `make paper` writes them: points, with 95% bootstrap intervals. CSV and LaTeX lie here.",
    ]
    for section in SECTIONS:
        shown = tables.markdown(_shown(pd.read_csv(folder / f"{section.name}.csv")))
        parts += [f"## {section.heading}", section.text, shown]
        if (folder / f"{section.name}.png").exists():
            parts.append(f"![{section.heading}]({section.name}.png)")
    parts.append("## Figures without a table above")
    parts += [f"![{text}]({name}.png)\n\n{text}" for name, text in FIGURES.items()]
    return "\n\n".join(parts) + "\n"
