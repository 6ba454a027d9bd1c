"""RACE's numbers without RACE's texts: committed scores and answers, compared with the texts where these can be had."""

import re

import numpy as np
import pandas as pd
import pytest

from permdistill import debias, scores
from permdistill.measure.evaluate import correct
from permdistill.orders import cyclic_orders
from permdistill.paper import ablations, experiments, hub, matrix, race, tables, tasks, withheld
from permdistill.paper.assets import AssetError
from permdistill.paper.tasks import TASKS


def test_race_stands_in_the_repository_as_numbers_alone():
    """The teacher is the paper's: 62.0 biased (there 61.2), 68.1 debiased (68.3)."""
    scored = withheld.read_scores()
    assert scored.P.shape == (4894, 24, 4) and len({q.id for q in scored.task.questions}) == 4894
    blank = ("", ("option 0", "option 1", "option 2", "option 3"))
    assert {(q.question, q.options) for q in scored.task.questions} == {blank}
    assert len(set(scored.task.groups)) == 1407 and all(re.fullmatch("[0-9a-f]{16}", unit) for unit in scored.task.groups)
    averaged = debias.broadcast(debias.permutation_average(scored.P), 24)
    found = [np.mean(correct(P, scored.task.questions)) for P in (scored.P, averaged)]
    assert [round(100 * share, 1) for share in found] == [62.0, 68.1]


def test_the_table_stands_beside_the_papers():
    shown = tables.pretty(race.table())
    theirs = shown[shown.source == "published"]
    assert theirs.accuracy.tolist() == "61.2 68.3 45.6 58.7 26.7 61.4 64.1 26.9 68.0 68.1".split()
    ours = shown[(shown.source == "stored") & (shown.task == "all")].set_index("system")
    average = ours.loc["all-orders average"]
    assert average.accuracy.startswith("68.1 [") and average["gain over biased"].startswith("6.3 [")
    student = "all-mpnet-base-v2, cross-option head, distillation"
    assert student in ours.index and f"{student}, 1000 questions" in ours.index  # weak or strong, each has its row
    assert "all-mpnet-base-v2, bi-encoder head, untrained" in ours.index
    assert set(shown.task) == {"race_middle", "race_high", "all", "RACE++"}


def test_a_row_without_scores_is_said(tmp_path):
    (tmp_path / withheld.FILE).parent.mkdir(exist_ok=True)
    rows = pd.DataFrame({"id": ["race_high/test/1"], "key": ["0" * 32], "answer": [1], "passage": ["0" * 16]})
    rows.to_parquet(tmp_path / withheld.FILE)
    with pytest.raises(scores.MissingScores, match="1 of 1 rows of .* are not in"):
        withheld.read_scores(folder=tmp_path)


def test_the_file_has_checksums(tmp_path, monkeypatch):
    rows = pd.read_parquet(withheld.COMMITTED / withheld.FILE)
    monkeypatch.setattr(withheld, "found", lambda: rows)
    withheld.write(tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / withheld.FILE), rows)
    bytes_ = bytearray((tmp_path / withheld.FILE).read_bytes())
    bytes_[len(bytes_) // 2] ^= 4
    (tmp_path / withheld.FILE).write_bytes(bytes_)
    with pytest.raises(OSError, match="CRC"):
        withheld.read_scores(tmp_path)


def test_the_file_is_what_the_texts_give():
    try:
        hub.check([TASKS["race_high"].repo])
    except AssetError as error:
        pytest.skip(f"RACE cannot be had here: {error}")
    found = withheld.found()
    assert found.equals(pd.read_parquet(withheld.COMMITTED / withheld.FILE))


RACES = [cell for part in ("scale", "one for four") for cell in matrix.MATRIX[part] if "race" in (*cell.tasks, *cell.tested)]


def _hide(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ablations, "at_hand", lambda task: task != "race")
    patch.setattr(ablations, "asked", ablations.asked.__wrapped__)


def test_a_part_of_race_is_none(tmp_path, monkeypatch):
    """Whoever has loaded one level, or one split, has not what students learn from."""
    monkeypatch.setenv(hub.LOCAL, str(tmp_path))
    assert not tasks.at_hand("race") and tasks.at_hand("boolq")
    for level in ("middle", "high"):
        for split in ("train", "validation", "test"):
            assert not tasks.at_hand("race")
            (file := tmp_path / "ehovy" / "race" / level / f"{split}-00000-of-00001.parquet").parent.mkdir(
                parents=True, exist_ok=True
            )
            file.touch()
    assert tasks.at_hand("race")


def test_students_of_race_are_not_trained_without_its_texts(tmp_path, monkeypatch, capsys):
    _hide(monkeypatch)
    monkeypatch.setattr(ablations, "train", lambda *args: pytest.fail("trained"))
    assert ablations.make(RACES[:1], tmp_path / "kept", tmp_path / "work") == 0
    assert capsys.readouterr().out.startswith("not trained, since RACE's texts are not on this machine (docs/scale.md): ")
    with pytest.raises(ablations.MissingPredictions, match="RACE's texts are not on this machine"):
        ablations.differences(RACES[:1], new=True)


def test_students_of_race_answer_without_its_texts(monkeypatch, tmp_path):
    """On a machine that has none: nothing of RACE is looked up, and what is stored has to be of these settings and ids."""
    _hide(monkeypatch)
    monkeypatch.setattr(experiments, "load_task", lambda *args: pytest.fail("texts are read"))
    alone = [cell for cell in RACES if cell.tested == ("race",)]
    for cell in alone:
        assert ablations.answer(cell).P.shape == (4894, 4, 4)
    test = ablations.asked(alone[0].teacher, ("race",))
    assert set(test.task.members) == {"race"} and len(set(test.task.groups)) == 1407
    ids, orders, P, about = experiments.read_predictions(ablations.path(alone[0]))
    for wrong in ({"run": about["run"] | {"power": 2.0}}, {"tasks": ["race", "boolq"]}, {"teacher": "another"}, {}):
        mine = experiments.Scored("mine", test.task, P) if wrong else experiments.Scored("mine", test.task.first(40), P[:40])
        experiments.save_predictions(ablations.path(alone[0], tmp_path), mine, orders, mine.P, about | wrong)
        with pytest.raises(ablations.MissingPredictions, match="another recipe, scores or questions"):
            ablations.answer(alone[0], tmp_path)


def test_stored_students_of_race_are_those_of_its_texts():
    if not tasks.at_hand("race"):
        pytest.skip("RACE is not on this machine")
    for cell in RACES:
        assert experiments.read_predictions(ablations.path(cell))[3]["key"] == ablations.key(cell), cell.run.name
    train = experiments.read_scores(RACES[0].teacher, "race", "train")
    assert train.P.shape == (30000, 4, 4) and train.orders.tolist() == cyclic_orders(4).tolist()
    with_texts, without = ablations.asked(RACES[0].teacher, ("race",)), ablations._withheld("race")
    assert [q.id for q in with_texts.task.questions] == [q.id for q in without.task.questions]
    assert (with_texts.P == without.P).all() and with_texts.task.members == without.task.members
    units = [{group: i for i, group in enumerate(dict.fromkeys(s.task.groups))} for s in (with_texts, without)]
    assert [units[0][g] for g in with_texts.task.groups] == [units[1][g] for g in without.task.groups]
