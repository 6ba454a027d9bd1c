"""The committed tables and figures as one page, ``figures/README.md``, and the README's headline table.

python -m permdistill.paper results        bring both up to date with figures/*.csv
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from permdistill import debias
from permdistill.files import write_text
from permdistill.paper import cost, systems, tables
from permdistill.paper.paths import ROOT
from permdistill.paper.tasks import title

START, END = "<!-- headline -->", "<!-- /headline -->"
# Tables of the page: their files' names, headings, and what a reader has to know.
SECTIONS = {
    "T1_teachers": """T1. Teachers, biased and debiased (notebook 01_teachers)

Accuracy of the biased answers (mean over orders), with position weights fitted without labels (prior-matching),
fitted for each question (context prior-matching), and averaged over all orders. "gain" is that average over the
biased answers, paired. ps is permutation sensitivity (total variation). SummEval's pairs are K = 2, and the biased
1.5B teacher names the first summary nearly always. Scores are stored (`scores/`); `make paper` computes a random
sample anew.""",
    "T2_race": """T2 in the paper's form: RACE (notebook 01_teachers)

The 1.5B teacher on RACE's test questions, M and H, by stored scores (made on a GPU; prompt "letters", answers in the
cyclic orders), students taught by it, and the paper's own numbers on RACE++ (M, H and C), which come without intervals. The
students are those of T7, which says what they are, and T9's; RACE's texts may not be passed on, so all of this stands in the
repository as numbers alone.""",
    "T2_students_multiple_choice": """T2. Students on multiple choice (notebook 03_students)

ARC-Easy, ARC-Challenge and OpenBookQA as one. The 1.5B teacher taught them, with questions that have no gold answers.
Predictions are stored (`predictions/`); `make paper` trains a small student of each head anew and compares.""",
    "T3_students_summeval": """T3. Students on SummEval (notebook 03_students)

Pairs of summaries, four attributes as one.
Predictions are stored (`predictions/`); `make paper` trains a small student of each head anew and compares.""",
    "T4_matrix": """T4. All students on multiple choice (notebook 05_ablations)

Students that take hours to train together: `make students` does it, and their predictions are kept in `predictions/`.
One row for all seeds of a student. "Untrained" is the sentence encoder's own cosine between question and option,
which no teacher taught anything.""",
    "T5_summaries": """T5. Students on SummEval, stored (notebook 05_ablations)

Trained at a rate of 1e-5, at which students stay near the encoder that they begin with. The rate was picked after
accuracies on these test questions had been seen, so that rows above the biased teacher are no result.""",
    "T6_piqa": """T6. Students on PIQA, stored (notebook 05_ablations)

Pairs of which the averaged teacher knows more than of SummEval's; 1,050 training questions, the whole test
set, of which 191 of 1,837 questions have a goal that training questions have too (but for capitals and spaces).""",
    "T7_scale": """T7. Whole training sets (notebook 06_scale)

All training questions of SocialIQA (33,177, seen four times), PIQA (16,084, four times; 191 of its 1,837 test questions have
a goal that training questions have too) and BoolQ (9,427, three times; two seeds; 952 of its 3,270 test questions have a
passage that training questions have), 30,000 of RACE's (twice); 4% of them are held out, the epoch with the lowest KL on
these is kept; the whole test sets. Where "n_train" is 1000, one look at so many.
"Untrained" is the sentence encoder's own cosine. "Stacked": the student's answer and the teacher's in one order, combined by
K + 2 numbers; two fits, each on 100 test questions of the other half in all orders (once, K! calls each), without gold
answers. "(greedy)": with the teacher's most probable decision; else with a sampled one.""",
    "T8_one_for_all": """T8. One student for every task (notebook 06_scale)

MiniLM, of any number of options, one look at each question; "taught on" says what it learnt where that is not the task
itself. Unseen are all tasks but SocialIQA and PIQA. "Untrained" is the sentence encoder's own cosine. Of BoolQ's answers
62% are "yes".""",
    "T9_one_for_four": """T9. One student of four training sets (notebook 06_scale)

all-mpnet-base-v2, cross-option, one look at SocialIQA's, PIQA's and BoolQ's training questions and 30,000 of RACE's together
("taught on"); beside it the student of each alone (T7; two to four looks) and the encoder's own cosine, untrained.""",
    "F2_draws": """F2. Black-box draws (notebook 05_ablations)

Targets are histograms of so many sampled decisions a question.""",
    "F3_questions": """F3. Training questions (notebook 05_ablations)

The same student, taught by fewer questions.""",
    "F3_scale": """F3 on SocialIQA's whole training set (notebook 06_scale)

MiniLM, shared-prefix; three seeds up to 8,000 questions. 500 are looked at four times, 2,000 twice, more once.""",
    "F2_scale": """F2 on SocialIQA (notebook 06_scale)

MiniLM, shared-prefix, 8,000 questions; "draws" 0: exact targets.""",
    "T7_targets": """Sharpened targets on SocialIQA (notebook 06_scale)

MiniLM, shared-prefix, 8,000 questions; power = 1 / temperature.""",
    "T4_collapse": """The collapse check (notebook 05_ablations)

The joint head in plain distillation. Chance is 25%. A student whose training KL stays at that of 1/K ("uniform") has
not even learnt the questions that it was shown.""",
    "T7_collapse": """The collapse check on SocialIQA (notebook 06_scale)

The joint head in plain distillation, MiniLM at 3e-5, one look. Chance is 33%.""",
    "C1_claims": """C1. The paper's claims (notebook 08_claims)

"Not confirmed" means that the criterion is missed, which is not the same as refuted. Criteria:
`permdistill/paper/claims.py`.""",
    "P1_performance": """P1. What all orders cost (notebook 07_cost)

Two cores, all arms with the same packed weights and logits of last tokens only, taking turns (`make bench`). Time is
in units of the trie's: the median over rounds, with the smallest and largest.""",
    "P2_cost": """P2. What an answer costs (notebook 07_cost)

Measured by `make cost` on one machine.""",
}
FIGURES = {
    "F1_orders": "One question in all its orders (notebook 01_teachers): by label, by option, and the average.",
    "F_positions": "Which positions the teachers prefer (notebook 01_teachers). The dashed line is no preference.",
    "D1_debiasers": "What a call more buys, for every debiaser of the field on the same scores (notebook 02_debiasers): "
    "questions with four options. The other tasks are in the CSV file.",
    "F4_encoders": "Encoder, head and input (notebook 05_ablations).",
    "F5_sensitivity_accuracy": "Sensitivity against accuracy (notebook 04_sensitivity_accuracy).",
    "P2_accuracy_cost": "Accuracy against what an answer costs (notebook 07_cost).",
}


def page(folder: str | Path) -> str:
    """figures/README.md from the CSV files and pictures in ``folder``."""
    folder = Path(folder)
    parts = [
        "# Tables and figures",
        "As `make paper` writes them: points, with 95% bootstrap intervals. CSV and LaTeX lie here.",
    ]
    for name, text in SECTIONS.items():
        parts += [f"## {text}", tables.markdown(_shown(pd.read_csv(folder / f"{name}.csv")))]
        if (folder / f"{name}.png").exists():
            parts.append(f"![{text.splitlines()[0]}]({name}.png)")
    parts.append("## Figures whose tables are in the CSV files")
    parts += [f"{text}\n\n![{name}]({name}.png)" for name, text in FIGURES.items()]
    return "\n\n".join(parts) + "\n"


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for people: T1 as its summary; of tasks that make one pool, the rows over all of them."""
    if "treatment" in frame:
        return tables.summary(frame)
    if "flops" in frame:
        return cost.pretty(frame)
    if "kind" in frame and "task" in frame:
        pooled = frame.task == "all"
        if (frame[pooled].kind == "teacher").sum() == frame.teacher.nunique():
            published = frame.source == "published" if "source" in frame else False
            frame = frame[pooled | published].drop(columns="task")
        else:  # several pools: whose row it is, the task says
            frame = frame[~pooled].drop_duplicates()
    return tables.pretty(frame[[c for c in frame if not c.startswith(("ps_kl", "pb"))]])


def headline(folder: str | Path) -> pd.DataFrame:
    """The README's table: the first teacher and its students of whole training sets, the paper's task first."""
    scale = pd.read_csv(Path(folder) / "T7_scale.csv")
    ends = [systems.BIASED, debias.PRIOR_MATCHING, debias.DEBIASED]
    # Of students of all questions, stacked: with the most probable decision, and with probabilities. The rest is in T7.
    whole = (scale.n_train == 0) | scale.n_train.isna() | (scale.method == systems.UNTRAINED)
    stacks = (scale.method == systems.STACKED) & scale.greedy.eq(True) | (scale.method == systems.STACKED_WHITE_BOX)
    scale = scale[whole & (scale.method.isin([*ends, systems.DISTILLATION, systems.UNTRAINED]) | stacks)]
    every = pd.concat([scale[scale.task == task] for task in ("race", "socialiqa", "piqa", "boolq")])
    # For room, these stand beside two of them alone; T7 has the others.
    every = every[every.task.isin(["race", "socialiqa"]) | ~every.method.isin([debias.PRIOR_MATCHING, systems.UNTRAINED])]
    shown = tables.pretty(every.assign(on=every.task.map(title)))
    shown["ps"] = shown["ps (TV)"].str.replace(r" \[.*", "", regex=True)
    shown["system"] = [_SHORT[method] for method in every.method]
    return shown[["on", "system", "calls", "accuracy", "gain over biased", "ps"]]


_SHORT = {
    systems.BIASED: "teacher, biased",
    debias.PRIOR_MATCHING: "prior-matching",
    debias.DEBIASED: "all-orders average",
    systems.DISTILLATION: "**student**",
    systems.UNTRAINED: "encoder, untaught",
    systems.STACKED: "student + decision",
    systems.STACKED_WHITE_BOX: "student + probabilities",
}


def readme(text: str, folder: str | Path) -> str:
    """The README with its headline table drawn from the CSV files in ``folder``; the rest of ``text`` stays as it is."""
    before, rest = text.split(START)
    return f"{before}{START}\n{tables.markdown(headline(folder))}\n{END}{rest.split(END)[1]}"


def write(root: Path = ROOT) -> None:
    """Bring both pages of a checkout up to date."""
    figures, file = root / "figures", root / "README.md"
    write_text(figures / "README.md", page(figures))
    write_text(file, readme(file.read_text(encoding="utf-8"), figures))
