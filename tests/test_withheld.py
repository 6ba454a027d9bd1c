"""RACE's numbers without RACE's texts: committed scores and answers, compared with the texts where these can be had."""

import re

import numpy as np
import pandas as pd
import pytest

from permdistill import debias, scores
from permdistill.measure.evaluate import correct
from permdistill.paper import hub, tables, withheld
from permdistill.paper.assets import AssetError
from permdistill.paper.tasks import TASKS


def test_race_stands_in_the_repository_as_numbers_alone():
    """The teacher is the paper's: 62.0 biased (there 61.2), 68.1 debiased (68.3)."""
    race = withheld.read_scores()
    assert race.P.shape == (4894, 24, 4) and len({q.id for q in race.task.questions}) == 4894
    blank = ("", ("option 0", "option 1", "option 2", "option 3"))
    assert {(q.question, q.options) for q in race.task.questions} == {blank}
    assert len(set(race.task.groups)) == 1407 and all(re.fullmatch("[0-9a-f]{16}", unit) for unit in race.task.groups)
    averaged = debias.broadcast(debias.permutation_average(race.P), 24)
    found = [np.mean(correct(P, race.task.questions)) for P in (race.P, averaged)]
    assert [round(100 * share, 1) for share in found] == [62.0, 68.1]


def test_the_table_stands_beside_the_papers():
    shown = tables.pretty(withheld.table())
    theirs = shown[shown.source == "published"]
    assert theirs.accuracy.tolist() == "61.2 68.3 45.6 58.7 26.7 61.4 64.1 26.9 68.0 68.1".split()
    ours = shown[(shown.source == "stored") & (shown.task == "all")].set_index("system")
    assert ours.accuracy["all-orders average"].startswith("68.1 [") and ours["gain over biased"].iloc[-1].startswith("6.3 [")
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
