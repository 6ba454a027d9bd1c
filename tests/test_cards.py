"""Model cards say what was trained and measured; only one function uploads, and only what is finished."""

from __future__ import annotations

import huggingface_hub
import numpy as np
import pytest
from test_experiments import planted
from test_students import make_encoder

import permdistill
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.paper import cards, experiments, profiles, tables


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two students, their table, runs and training questions."""
    folder = tmp_path_factory.mktemp("run")
    encoder = make_encoder(tmp_path_factory.mktemp("tiny"))
    scored = planted("one", n=24)
    training = TrainingConfig(epochs=1, learning_rate=1e-3, batch_size=8)
    runs = [
        profiles.Run(StudentConfig(encoder, "per_option", inputs, 3, 64), training) for inputs in ("plain", "distribution")
    ]
    systems = experiments.baselines(scored)
    systems += [experiments.distil(run, scored, scored, folder) for run in runs]
    return folder, tables.students(scored, systems), runs, scored


def test_card_holds_the_measured_numbers_and_the_recipe(trained):
    folder, table, runs, scored = trained
    for run, path in zip(runs, cards.write(folder, table, runs, scored), strict=True):
        text = path.read_text(encoding="utf-8")
        assert path.parent == folder / "students" / run.name and text.startswith("---\nlibrary_name: transformers")
        own = tables.pretty(table[(table.task == "all") & (table.method == run.what.method)]).iloc[0]
        assert own["accuracy"] in text and own["gain over biased"] in text and f"| {run.title} |" in text
        assert "24\nquestions without gold answers: one (licence not known here)" in text
        assert "learning rate 0.001" in text and "**planted**" in text
        others = {r.title for r in runs} - {run.title}
        assert not any(f"| {title} |" in text for title in others)
    texts = [(folder / "students" / run.name / cards.CARD).read_text(encoding="utf-8") for run in runs]
    assert "do not depend on the order" in texts[0] and "may still depend" in texts[1]


def test_the_cards_example_runs(trained):
    folder, _, runs, scored = trained
    question = scored.task.questions[0]
    plain, corrected = (permdistill.Student.from_pretrained(folder / "students" / run.name) for run in runs)
    p = plain.predict(question.question, question.options)
    assert p.shape == (3,) and p.sum() == pytest.approx(1)
    turned = plain.predict(question.question, question.options[::-1])
    assert turned[::-1] == pytest.approx(p, abs=1e-6)
    assert corrected.predict(question.question, question.options, distribution=scored.P[0, 0]).sum() == pytest.approx(1)
    many = plain.predict_batch(scored.task.questions[:2], np.arange(3)[None])
    assert many[0, 0] == pytest.approx(p, abs=1e-6)
    with pytest.raises(AttributeError, match="no attribute 'Pupil'"):
        permdistill.Pupil  # noqa: B018


def test_push_uploads_a_finished_student_with_its_card_and_nothing_else(trained, tmp_path, monkeypatch):
    folder, table, runs, scored = trained
    cards.write(folder, table, runs, scored)
    called = []

    class Api:
        def create_repo(self, repo, **options):
            called.append(("create", repo, options["private"]))

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            called.append(("upload", repo_id, folder_path))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(FileNotFoundError, match="no permdistill.json"):
        cards.push_to_hub(tmp_path, "me/student")
    (tmp_path / "permdistill.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no README.md: write it with cards.write"):
        cards.push_to_hub(tmp_path, "me/student")
    assert not called
    home = folder / "students" / runs[0].name
    assert cards.push_to_hub(home, "me/student") == "address"
    assert called == [("create", "me/student", True), ("upload", "me/student", home)]
