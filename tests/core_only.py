"""Teacher -> debias -> student with nothing but the core's dependencies: ``python core_only.py FOLDER``, see test_walls.py.

FOLDER holds a checkpoint "encoder". What else is installed is hidden as if it were not there: modules and metadata.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def closure() -> set[str]:
    """Canonical names of the distributions that the core brings, extras apart."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found, waiting = {"permdistill"}, [Requirement(text) for text in needed]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if name not in found:
            try:
                more = [Requirement(text) for text in requires(name) or []]
            except PackageNotFoundError:
                continue  # for another machine
            found.add(name)
            waiting += [r for r in more if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


class Only:
    """A finder that finds nothing of other distributions than these."""

    def __init__(self, finder, known: set[str]):
        self.finder, self.known = finder, known
        of = {top: {canonicalize_name(name) for name in names} for top, names in packages_distributions().items()}
        self.refused = {top for top, names in of.items() if not names & known}

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.refused else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *context: [])(*context)
        return [d for d in found if canonicalize_name(d.metadata["Name"]) in self.known]


def program(folder: Path) -> None:
    import numpy as np

    from permdistill import cli, debias, scores
    from permdistill.configs import StudentConfig, TrainingConfig
    from permdistill.lessons import Lesson
    from permdistill.orders import all_orders
    from permdistill.prompts import TEMPLATES
    from permdistill.questions import Question
    from permdistill.students import Student
    from permdistill.teachers import PlantedTeacher
    from permdistill.training import train

    questions = [Question(f"q{i}", "", f"which {i} ?", ("the cat", "the dog", "the tree")) for i in range(12)]
    teacher = PlantedTeacher({q.id: 2 * np.eye(3)[i % 3] for i, q in enumerate(questions)}, np.array([1.0, 0.0, -1.0]))
    store = scores.Store(folder / "scores")
    assert scores.score(store, teacher, questions, TEMPLATES["letters"]) == len(questions)
    P = scores.probabilities(scores.load(store, questions, TEMPLATES["letters"], teacher.model_key))
    config = StudentConfig(str(folder / "encoder"), "per_option", "plain", 3, 64)
    lesson = Lesson(questions, debias.permutation_average(P))
    train(config, TrainingConfig(epochs=1), lesson, folder / "student")
    student = Student.from_pretrained(folder / "student")
    answers = student.predict_batch(questions, all_orders(3))
    assert answers.shape == (12, 6, 3) and np.allclose(answers.sum(-1), 1, atol=1e-5)
    cli.parser().format_help()
    print("\n".join(sorted({name.split(".")[0] for name in sys.modules})))


if __name__ == "__main__":
    known = closure()
    sys.meta_path[:] = [Only(finder, known) for finder in sys.meta_path]
    for hidden in ("datasets", "openai", "matplotlib", "accelerate", "pytest"):
        assert importlib.util.find_spec(hidden) is None, hidden
    program(Path(sys.argv[1]))
