"""What a student is, for whoever finds it: a model card beside its weights, and the one function that publishes both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill.files import write_text
from permdistill.heads import HEADS
from permdistill.paper import tables
from permdistill.paper.experiments import Scored
from permdistill.paper.models import MODELS
from permdistill.paper.profiles import Run
from permdistill.paper.systems import described, head_title
from permdistill.paper.tasks import TASKS
from permdistill.students import CONFIG_FILE
from permdistill.training import read_log

CARD = "README.md"

_USE = {
    "plain": "student.predict(question, options)",
    "prediction": "student.predict(question, options, decision=i)  # i: the option that the teacher chose, in this order",
    "distribution": "student.predict(question, options, distribution=p)  # p: the teacher's probabilities, in this order",
}


def _licence(name: str) -> str:
    """Of a model or task, as tables name it; "" where it is not known."""
    models = {short: model.licence for full, model in MODELS.items() for short in (full, Path(full).name)}
    return TASKS[name].licence if name in TASKS else models.get(name, "")


def card(folder: str | Path, measured: pd.DataFrame, teacher: str, train_tasks: Sequence[str]) -> str:
    """The model card (Markdown with the hub's metadata) of the student in ``folder``, from its training log.

    measured     the rows of the students' table (:func:`permdistill.paper.tables.students`) of this student and what it is
                 compared with
    train_tasks  what its training questions come from
    """
    from huggingface_hub import ModelCard, ModelCardData

    log = read_log(folder)
    student = log["student"]
    invariant = HEADS[student["head"]].equivariant and student["inputs"] == "plain"
    encoder, unknown = Path(student["encoder"]).name, "licence not known here"
    tags = ["multiple-choice", "permutation-debiasing", "knowledge-distillation"]
    made = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=tags),
        template_path=str(Path(__file__).with_name("card.md")),
        **{name: student[name] for name in ("inputs", "k", "max_length")},
        encoder=encoder,
        encoder_licence=_licence(encoder) or unknown,
        head=head_title(student["head"]),
        teacher=teacher,
        teacher_licence=_licence(teacher) or unknown,
        questions=log["questions"],
        data=", ".join(f"{task} ({_licence(task) or unknown})" for task in dict.fromkeys(train_tasks)),
        use=_USE[student["inputs"]],
        measured=tables.markdown(tables.pretty(measured[[c for c in measured if not c.startswith(("ps_kl", "pb"))]])),
        order="do not depend on the order of the options"
        if invariant
        else "may still depend on the order of the options, see ps",
        settings=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in log["training"].items()),
        key=log["key"][:16],
    )
    return str(made)


def write(folder: Path, table: pd.DataFrame, runs: Sequence[Run], train_on: Scored) -> list[Path]:
    """A card for each student of ``runs`` whose weights are in ``folder``/students, from the students' ``table``. Returns
    their paths."""
    paths = []
    for run in runs:
        home = folder / "students" / run.name
        if not home.is_dir():  # stored predictions come without weights
            continue
        whole = table[table.task == "all"]
        trained = np.array([what == run.what for what in described(whole)])
        own = whole[(whole.kind != "student") | trained].drop(columns=["task", "teacher"])
        write_text(home / CARD, card(home, own, train_on.teacher, train_on.task.members))
        paths.append(home / CARD)
    return paths


def push_to_hub(folder: str | Path, repo: str, private: bool = True) -> str:
    """Publish the student in ``folder`` with its card as ``repo`` on the model hub; returns the address. Nothing else in
    permdistill uploads anything. The token is the hub client's own (``hf auth login``, or HF_TOKEN).

    Raises FileNotFoundError when ``folder`` holds no finished student, or one without a card.
    """
    from huggingface_hub import HfApi

    for file, fix in ((CONFIG_FILE, "give a folder that Student.save finished"), (CARD, "write it with cards.write")):
        if not (Path(folder) / file).exists():
            raise FileNotFoundError(f"{folder} has no {file}: {fix}")
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=[".*", "checkpoint.pt"]))
