"""Loaders of the hub's data sets, on files in each set's true layout that :mod:`tiny_hub` writes."""

from __future__ import annotations

import shutil

import datasets
import pytest
import tiny_hub

from permdistill.paper import hub, profiles, readers, tasks
from permdistill.paper.assets import AssetError
from permdistill.paper.tasks import HUB_CHOICE, RACE, TASKS

N = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    for name, repo in tiny_hub.REPOS.items():
        if repo.kind == "dataset":
            tiny_hub.write_data(home, name, N)
    return home


@pytest.fixture(autouse=True)
def tiny(folder, monkeypatch):
    monkeypatch.setenv(hub.LOCAL, str(folder))
    return folder


def changed(folder, tmp_path, monkeypatch, name: str, path: str, change) -> None:
    """Another hub, in which a function has changed the rows of one file."""
    shutil.copytree(folder / name, tmp_path / name)
    kind = "parquet" if path.endswith(".parquet") else "json"
    rows = datasets.load_dataset(
        kind, data_files=str(tmp_path / name / path), split="train", cache_dir=str(tmp_path / "read")
    )
    tiny_hub.write_rows(change(rows), tmp_path / name / path)
    monkeypatch.setenv(hub.LOCAL, str(tmp_path))


@pytest.mark.parametrize("task", HUB_CHOICE)
def test_questions_and_gold_answers_are_those_of_the_files(task):
    own = TASKS[task]
    seeds = {"race_high": (0, 2), "race_middle": (3, 5), "race_c": (20, 22), "cosmosqa": (None, 31), "medmcqa": (None, 41)}
    for split, seed in zip(("train", "test"), seeds.get(task, (None, 51)), strict=True):
        if split not in own.splits:
            with pytest.raises(ValueError, match=f"task '{task}', split 'train': give one of .* or train, which .*{task}"):
                tasks.load_task(task, split)
            continue
        loaded = tasks.whole(task, split)
        assert len(loaded.questions) == N and not loaded.left_out
        for number, (question, made) in enumerate(zip(loaded.questions, tiny_hub.texts(seed), strict=False)):
            passage, text, options, answer = made
            if task == "cosmosqa" and number % 2:  # "None of the above choices .", which would mean another thing elsewhere
                place = question.options.index("None of the other choices .")
                assert place != answer
                options = [*options[:place], question.options[place], *options[place + 1 :]]
            assert question.options == tuple(options) and question.options[question.answer] == options[answer]
            assert question.question == (f"{number}. {text}" if task == "medmcqa" else text)
            if task == "medmcqa":
                assert question.context == ""
            elif not task.startswith("race_") or task == "race_c" or number % 2 == 0:
                assert question.context == passage
            else:
                assert question.context == loaded.questions[number - 1].context
        assert {question.answer for question in loaded.questions} > {loaded.questions[0].answer}


def test_ids_name_the_texts_whatever_the_rows_order(folder, tmp_path, monkeypatch):
    before = {q.id: q for q in tasks.whole("race_high", "test").questions}
    assert all(name.startswith("race_high/test/") for name in before)
    changed(
        folder,
        tmp_path,
        monkeypatch,
        "ehovy/race",
        "high/test-00000-of-00001.parquet",
        lambda rows: rows.select(range(7, 1, -1)),
    )
    after = {q.id: q for q in tasks.whole("race_high", "test").questions}
    assert len(after) == 6 and after.items() <= before.items()
    # Two questions on one passage, whose example_id they share, are two.
    (first, *_), (second, *_) = [(q.id, q) for q in before.values()][:2]
    assert first != second


@pytest.mark.parametrize(
    "reason, spoilt, field",
    [
        ("repeated or empty option", {"answers": ["same"] * 4}, "options"),
        ("does not fit the schema", {"label": 7}, "answer"),
    ],
    ids=["options", "label"],
)
def test_rows_that_do_not_fit_are_counted_and_many_are_an_error(folder, tmp_path, monkeypatch, reason, spoilt, field):
    path = "val.json"

    def spoil(n):
        def change(rows):
            kept = rows.to_list()
            for row in kept[:n]:
                row.update(spoilt)
            return datasets.Dataset.from_list([*kept, kept[-1]], features=rows.features)

        return change

    changed(folder, tmp_path, monkeypatch, "metaeval/reclor", path, spoil(2))
    loaded = tasks.whole("reclor", "test")
    assert loaded.left_out == {reason: 2, "repeated": 1} and len(loaded.questions) == N - 2
    shutil.rmtree(tmp_path / "metaeval")
    (tmp_path / "more").mkdir()
    changed(folder, tmp_path / "more", monkeypatch, "metaeval/reclor", path, spoil(3))
    with pytest.raises(ValueError, match=rf"metaeval/reclor, test: 3 of 9 rows: {reason}.*row 0, .*field '{field}'"):
        tasks.whole("reclor", "test")
    # Each reason has a share of its own: 3 of 9 rows are within 0.4.
    monkeypatch.setattr(readers, "MAX_BAD", dict.fromkeys(readers.MAX_BAD, 0.0) | {reason: 0.4})
    assert TASKS["reclor"].reader("test").left_out == {reason: 3, "repeated": 1}


def test_authors_slips_are_borne_longer_than_another_layout():
    assert readers.MAX_BAD["does not fit the schema"] < readers.MAX_BAD["repeated or empty option"] < 0.5


def test_changed_columns_and_missing_data_are_errors_with_their_names(folder, tmp_path, monkeypatch):
    path = "test.jsonl"
    changed(folder, tmp_path, monkeypatch, "tasksource/race-c", path, lambda rows: rows.rename_column("option", "options"))
    with pytest.raises(AssetError, match="tasksource/race-c"):  # datasets itself finds that the splits differ
        tasks.whole("race_c", "test")
    for split in ("train", "dev"):
        file = tmp_path / "tasksource/race-c" / path.replace("test", split)
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / split))
        tiny_hub.write_rows(rows.rename_column("option", "options"), file)
    with pytest.raises(AssetError, match=r"no column 'option' \(columns: id, article, question, options, label\)"):
        tasks.whole("race_c", "test")
    with pytest.raises(AssetError, match="holds no folder ehovy/race"):
        tasks.whole("race_high", "test")


def test_training_questions_that_stand_in_any_held_out_part_of_race_are_left_out(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "ehovy/race", tmp_path / "ehovy/race")
    test = datasets.load_dataset(
        "parquet", data_files=str(folder / "ehovy/race/middle/test-00000-of-00001.parquet"), split="train"
    )

    def leak(rows):
        taken = test[0]
        row = {"id": "x", "article": "Else.", "question": taken["question"], "option": taken["options"][::-1], "label": 0}
        return datasets.Dataset.from_list([*rows.to_list(), row], features=rows.features)

    changed(folder, tmp_path, monkeypatch, "tasksource/race-c", "train.jsonl", leak)
    loaded = tasks.whole("race_c", "train")
    assert loaded.left_out == {"also held out": 1} and len(loaded.questions) == N


def test_all_pairs_of_summeval_by_document():
    tests, trains = (tasks.load_task("summeval16_coherence", split) for split in ("test", "train"))
    assert len(tests.questions) == len(trains.questions) == N // 2 * 6  # 4 systems: 6 pairs
    assert not set(tests.groups) & set(trains.groups)
    assert tests.template.name == "summaries_letters" and tests.k == 2
    rows = {row["id"]: row for row in tiny_hub._summeval(N, 4)}
    for question in tests.questions:
        _, _, document, pair = question.id.split("/")
        first, second = (rows[document]["coherence"][int(system)] for system in pair.split("-"))
        assert question.options == tuple(rows[document]["machine_summaries"][int(system)] for system in pair.split("-"))
        assert question.answer == (None if first == second else int(second > first))
        assert question.context == rows[document]["text"]


def test_paper_tasks_are_known_and_race_is_what_students_learn():
    for task in profiles.PROFILES["paper"].tasks:
        assert "test" in TASKS[task].splits
    assert profiles.PROFILES["paper"].pools["multiple_choice"].tasks == RACE
    assert [*TASKS["medmcqa"].splits] == ["test"] and [*TASKS["race_c"].splits] == ["test", "train"]
    with pytest.raises(ValueError, match="task 'racing', split 'test'.*race_middle"):
        tasks.load_task("racing", "test")
    assert sum(TASKS[task].published["train"] for task in RACE) == 100_568  # as the paper counts them
    assert sum(TASKS[task].published["test"] for task in RACE) == 5_642
