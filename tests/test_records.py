"""Records of anyone's judge: any orders, any K, any file; all bad ones named at once; and what they show."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re

import numpy as np
import pandas as pd
import pytest

from permdistill import cli, commands
from permdistill.measure import metrics
from permdistill.measure.formats import read
from permdistill.measure.records import with_answers
from permdistill.measure.report import Gate, measure
from permdistill.orders import all_orders, cyclic_orders, to_positions, williams_orders
from permdistill.questions import BadRecords

FOUR = [  # always the first answer on item a, consistent on item b
    {"id": "a", "order": [0, 1], "probabilities": [1, 0]},
    {"id": "a", "order": [1, 0], "probabilities": [1, 0]},
    {"id": "b", "order": [0, 1], "probabilities": [1, 0]},
    {"id": "b", "order": [1, 0], "probabilities": [0, 1]},
]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def problem(tmp_path, data: bytes, name: str = "mine.jsonl") -> str:
    """The message about a file with these bytes."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadRecords) as error:
        read(tmp_path / name)
    return str(error.value)


def records_of(P: np.ndarray, orders: np.ndarray, mass: float = 0.9) -> list[dict]:
    """(item, order, option) -> one record an item and order, by position, as another harness would log them."""
    by_position = to_positions(P, orders)
    return [
        {"id": f"q{i}", "order": order.tolist(), "probabilities": (mass * p).tolist()}
        for i, rows in enumerate(by_position)
        for order, p in zip(orders, rows, strict=True)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("orders", [all_orders(3), cyclic_orders(4), np.array([[0, 1], [1, 0]])])
def test_records_from_elsewhere_become_scores(tmp_path, suffix, orders):
    P = np.random.default_rng(0).dirichlet(np.ones(orders.shape[1]), size=(5, len(orders)))
    records = records_of(P, orders)
    np.random.default_rng(1).shuffle(records)
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = read(path)
    (block,) = found.blocks()
    assert sorted(found.ids) == [f"q{i}" for i in range(5)]
    place = [orders.tolist().index(order) for order in block.orders[0].tolist()]
    assert block.P[np.argsort(found.ids)] == pytest.approx(P[:, place]) and found.mass == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "field 'id' is ''"),
        ({"order": [0, 1, 1]}, r"field 'order' is \[0, 1, 1\]: give a permutation"),
        ({"order": 3}, "field 'order' is 3"),
        ({"probabilities": [0.5, 0.5]}, "give one number a position"),
        ({"probabilities": [0.5, -0.1, 0.2]}, "give numbers in 0..1"),
        ({"probabilities": [0.0, 0.0, 0.0]}, "a sum above 0"),
        ({"probabilities": [0.9, 0.9, 0.9]}, "at most 1"),
        ({"probabilities": "abc"}, "field 'probabilities' is 'abc'"),
        ({"order": [0, 2, 1]}, "this item has it already"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    P = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 6))
    records = records_of(P, all_orders(3))
    records[0] |= change
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with pytest.raises(BadRecords, match=f"mine.jsonl: 1 problem.*\n.*{message}"):
        read(path)


GOOD = b'{"id": "q", "order": [0, 1], "probabilities": [0.5, 0.5]}\n'


def parquet(line: bytes) -> bytes:
    """A parquet file of one record, with a decision."""
    file = io.BytesIO()
    pd.DataFrame([json.loads(line) | {"decision": 0}]).to_parquet(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "r", "order": [0, 1], "probabilities": [0.5, 0', "line 2: not JSON .* is the file cut off here"),
        (b'{"id": "\xe9", "order": [0, 1], "probabilities": [0.5, 0.5]}', "line 2: not UTF-8 .byte 0xe9 at 8.: save"),
        (b'{"id": 12345678901234567890123456, "order": [0, 1], "probabilities": [0.5, 0.5]}', "a number this long"),
        (b'{"id": ' + b"9" * 5000 + b', "order": [0, 1], "decision": 0}', "line 2: not JSON .Exceeds the limit"),
        (b'{"id": "\\ud800", "order": [0, 1], "probabilities": [0.5, 0.5]}', r"'.ud800': half a character"),
        (b'{"id": true, "order": [0, 1], "probabilities": [0.5, 0.5]}', "field 'id' is True: give a string"),
        (
            b'{"id": "r", "order": [false, true], "probabilities": [0.5, 0.5]}',
            r"field 'order' is \[False, True\]: give a perm",
        ),
        (b'{"id": "r", "order": ["0", "1"], "probabilities": [0.5, 0.5]}', "field 'order' is .*: give a permutation"),
        (b'{"id": "r", "order": [0.0, 1.0], "probabilities": [0.5, 0.5]}', "field 'order' is .*: give a permutation"),
        (b'{"id": "r", "order": [0], "probabilities": [1]}', "1 options, give 2 to 26"),
        (b'{"id": "r", "order": [0, 1], "probabilities": [true, false]}', r"is \[True, False\]: give one number a position"),
        (b'{"id": "r", "order": [0, 1], "probabilities": ["0.5", "0.5"]}', r"is \['0.5', '0.5'\]: give one number a pos"),
        (b'{"id": "r", "order": [0, 1], "probabilities": [NaN, 0.5]}', "give numbers in 0..1"),
        (b'{"id": "r", "order": [0, 1], "probabilities": [1e400, 0]}', "give numbers in 0..1"),
        (b'{"id": "r", "order": [0, 1], "probabilities": [1' + b"0" * 400 + b", 0]}", "give numbers in 0..1"),
        (b'{"id": "r", "order": [0, 1], "log_probs": [-1, -1' + b"0" * 400 + b"]}", "logarithms of at most 0"),
        (b'{"id": "r", "order": [0, 1], "log_probs": [null, null]}', "logarithms of at most 0, not all null"),
        (b'{"id": "r", "order": [0, 1], "log_probs": [0.7, -1]}', "logarithms of at most 0"),
        (b'{"id": "r", "order": [0, 1], "log_probs": [-0.1, -0.1]}', "their probabilities sum to 1.81"),
        (b'{"id": "r", "order": [0, 1], "decision": 2}', "field 'decision' is 2: give an option's index in 0..1"),
        (b'{"id": "r", "order": [0, 1], "decision": "C"}', "field 'decision' is 'C'"),
        (b'{"id": "r", "order": [0, 1], "decision": "0"}', "field 'decision' is '0'"),
        (b'{"id": "r", "order": [0, 1], "decision": true}', "field 'decision' is True"),
        (b'{"id": "r", "order": [0, 1]}', "has no verdict: give one of probabilities, log_probs, decision"),
        (
            b'{"id": "r", "order": [0, 1], "probabilities": [1, 0], "decision": 0}',
            "has probabilities and decision",
        ),
        (b'{"id": "r", "order": [0, 1], "decision": 0, "answer": 2}', "field 'answer' is 2: give the index"),
        (b'{"id": "r", "order": [0, 1], "decision": 0, "draw": -1}', "field 'draw' is -1"),
        (b'{"id": "q", "order": [1, 2, 0], "decision": 0}', "this item has 2 options in line 1"),
        (
            b'{"id": "q", "order": [0, 1], "decision": 0}',
            r"line 2: .*'order' is \[0, 1\]: this item has it already, in line 1",
        ),
        (b'["q", [0, 1]]', "line 2: is .*: give one object a line"),
        (b"[" * 100_000, "line 2: not JSON .nested too deeply"),
    ],
)
def test_every_bad_line_is_our_error(tmp_path, line, message):
    found = problem(tmp_path, GOOD + line)
    assert "1 problem(s)" in found and re.search(message, found), found


def test_both_files_are_named_where_two_do_not_fit(tmp_path):
    one, two, three = (tmp_path / name for name in ("a.parquet", "b.jsonl", "c.jsonl"))
    pd.DataFrame([{"id": "q", "order": [0, 1], "decision": 0}]).to_parquet(one)
    own = [{"id": "r", "order": [0, 1]}, {"id": "q", "order": [0, 1]}, {"id": "q", "order": [2, 0, 1]}]
    write(two, [record | {"decision": 0} for record in own])
    write(three, [{"id": "s", "order": [0, 1], "decision": 1}, {"id": "r", "order": [0, 1], "decision": 1}])
    with pytest.raises(BadRecords) as error:
        read([one, two, three])
    lines = str(error.value).splitlines()
    assert lines[0] == "2 files: 3 problem(s)" and len(lines) == 4
    assert f"  {two}, line 3: (id 'q') field 'order' is [2, 0, 1]: this item has 2 options in {one}, row 1" in lines
    already = "field 'order' is [0, 1]: this item has it already, in {} 1; repeated calls need a field 'draw'"
    assert f"  {two}, line 2: (id 'q') {already.format(f'{one}, row')}" in lines
    assert f"  {three}, line 2: (id 'r') {already.format(f'{two}, line')}" in lines


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        (
            "a.json",
            b'[{"id": "q",\n "order": [0, 1], "decision": 0},\n {"id": "\xe9"}]',
            "line 3: not UTF-8 .byte 0xe9 at 9",
        ),
        ("a.csv", b"id,order,decision\nq,0 1,0\n\xe9,0 1,0\nr,0 1,0\n", "line 3: not UTF-8 .byte 0xe9 at 0"),
        ("b.csv", b"\xe9d,order,decision\nq,0 1,0\nr,0 1,0\n", "line 1: not UTF-8 .byte 0xe9 at 0"),
    ],
)
def test_a_byte_that_is_no_text_is_named_with_its_line(tmp_path, name, data, line):
    found = problem(tmp_path, data, name)
    assert "1 problem(s)" in found and re.search(line, found), found


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet.gz", "a.jsonl", "a.json"])
def test_what_is_too_large_to_read_at_once_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("permdistill.measure.rows.WHOLE", 40)
    data = b"[" + b" " * 100_000 + b"]"
    found = problem(tmp_path, gzip.compress(data, mtime=0) if name.endswith(".gz") else data, name)
    assert "1 problem(s)" in found and "more than 40 bytes in one piece, unpacked: write JSONL, one record a line" in found
    monkeypatch.setattr("permdistill.measure.rows.WHOLE", len(GOOD))  # of lines each alone counts
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(GOOD + GOOD.replace(b'"q"', b'"r"'), mtime=0))
    assert read(tmp_path / "b.jsonl.gz").ids == ["q", "r"]


@pytest.mark.parametrize("bom", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_is_named(tmp_path, bom):
    assert "save it as plain UTF-8" in problem(tmp_path, bom + GOOD)


def test_numbers_and_strings_are_not_mixed_as_ids(tmp_path):
    text = b'{"id": 1, "order": [0, 1], "decision": 0}\n{"id": "1", "order": [1, 0], "decision": 0}'
    assert "as a string and as a number; write it as in line 1" in problem(tmp_path, text)


def test_all_bad_records_are_named_at_once(tmp_path):
    bad = b'{"id": "", "order": [0, 1], "decision": 0}\n'
    found = problem(tmp_path, GOOD + b"{\n" + bad * 1500)
    assert "1501 problem(s)" in found and "line 2: not JSON" in found and "line 3: " in found and "and 501 more" in found


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "no records"),
        ("cut.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-30], "damaged or cut off"),
        ("odd.jsonl.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "damaged or cut off"),
        ("odd.parquet", parquet(GOOD).replace(b"decision", b"decisi\xf6n"), "not parquet"),
        ("cut.json", b'[{"id": "q", "order": [0, 1], "decision": 0},\n {"id": "r", "ord', "line 2: not JSON .*cut off"),
        ("cut.parquet", b"PAR1 and then nothing", "not parquet"),
        ("cut.csv", b'id,order,decision\nq,"[0, 1]",0\nr,"[0, 1', "line 3: not CSV .*cut off"),
        ("short.csv", b"id,order,decision\nq,0 1\n", "line 2: 2 cells for 3 columns"),
        ("twice.json", b'[{"id": "q", "order": [0, 1], "decision": 0}] []', "line 1: not JSON"),
    ],
)
def test_every_bad_file_is_our_error(tmp_path, name, data, message):
    found = problem(tmp_path, data, name)
    assert re.search(message, found), found


def test_every_kind_of_file_says_the_same(tmp_path):
    records = [{"id": r["id"], "order": r["order"], "probabilities": [float(p) for p in r["probabilities"]]} for r in FOUR]
    frame = pd.DataFrame(records)
    write(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    write(tmp_path / "lines.json", records)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    spaced = frame.assign(**{name: [" ".join(map(str, v)) for v in frame[name]] for name in ("order", "probabilities")})
    spaced.to_csv(tmp_path / "spaced.csv", index=False)
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert len(list(tmp_path.iterdir())) == 12
    for path in tmp_path.iterdir():
        found = read(path)
        assert found.ids == ["a", "b"] and found.p.tolist() == [1, 0, 1, 0, 1, 0, 0, 1], path
        assert found.orders.tolist() == [0, 1, 1, 0] * 2 and not found.hard.any()


def test_decisions_name_options_by_index_and_positions_by_letter(tmp_path):
    said = [2, "A", "tie", "Tie", None]
    records = [{"id": f"q{i}", "order": [1, 2, 0], "decision": d} for i, d in enumerate(said)]
    found = read(write(tmp_path / "d.jsonl", records))
    third = [1 / 3] * 3
    assert found.p.reshape(5, 3)[:4].tolist() == [[0, 1, 0], [1, 0, 0], third, third]
    assert found.failed.tolist() == [False] * 4 + [True] and found.hard.all() and np.isnan(found.mass).all()
    cells = "\n".join(["id,order,decision", *(f"q{i},1 2 0,{'' if d is None else d}" for i, d in enumerate(said))])
    (tmp_path / "d.csv").write_text(cells, encoding="utf-8")
    assert np.array_equal(read(tmp_path / "d.csv").p, found.p, equal_nan=True)
    pd.DataFrame(records).astype({"decision": "string"}).to_parquet(tmp_path / "d.parquet")
    assert np.array_equal(read(tmp_path / "d.parquet").p, found.p, equal_nan=True)


def test_log_probs_keep_their_label_mass(tmp_path):
    records = [{"id": "q", "order": [1, 0], "log_probs": [np.log(0.12), np.log(0.04)]}]
    records += [{"id": "q", "order": [0, 1], "log_probs": [-2000.0, None]}]
    found = read(write(tmp_path / "l.jsonl", records))
    assert found.p.tolist() == pytest.approx([1, 0, 0.75, 0.25]) and found.mass.tolist() == pytest.approx([0, 0.16])


def test_items_in_any_orders_and_any_k(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for i, k in enumerate((2, 3, 5, 10, 26, 3)):
        for order in (cyclic_orders(k) if i % 2 else williams_orders(k))[: k - (i == 5)]:
            records.append({"id": f"q{i}", "order": order.tolist(), "probabilities": rng.dirichlet(np.ones(k)).tolist()})
    path = write(tmp_path / "any.jsonl", records)
    found = read(path)
    assert found.options.tolist() == [2, 3, 5, 10, 26, 3] and found.counts.tolist() == [2, 3, 5, 10, 26, 2]
    assert found.incomplete.tolist() == [False] * 5 + [True]  # the other item with three options came in three orders
    by_item = {int(i): block for block in found.blocks() for i in block.items}
    for i, k in enumerate((2, 3, 5, 10, 26, 3)):
        block, place = by_item[i], by_item[i].items.tolist().index(i)
        own = {tuple(r["order"]): r["probabilities"] for r in records if r["id"] == f"q{i}"}
        for order, p in zip(block.orders[place], block.P[place], strict=True):
            assert p[order] == pytest.approx(own[tuple(order.tolist())]) and len(p) == k
    report = measure(path)
    assert "6 items, K = 2, 3, 5, 10, 26, 2 to 26 orders" in str(report) and "1 item incomplete" in str(report)
    expected = [metrics.permutation_sensitivity(by_item[i].P)[by_item[i].items.tolist().index(i)] for i in range(6)]
    assert report.tally.ps == pytest.approx(expected)
    fewer = measure(path, complete=True)
    assert len(fewer.records.ids) == 5 and "1 incomplete item left out" in str(fewer)


def test_gold_answers_need_no_texts(tmp_path):
    records = read(write(tmp_path / "r.jsonl", FOUR))
    gold = [{"id": "a", "answer": "B", "k": 2}, {"id": "b", "answer": None}, {"id": "c", "answer": 7}]
    assert with_answers(records, write(tmp_path / "g.jsonl", gold)).answers.tolist() == [1, -1]
    for bad, message in (
        ([{"id": "a", "answer": 0}], "id 'b' has 2 options, .* has no such question"),
        ([{"id": "a", "answer": 2}, {"id": "b"}], "id 'a' has 2 options, .* has answer 2"),
        ([{"id": "a", "options": ["x", "y", "z"], "answer": 0}, {"id": "b"}], "id 'a' has 2 options, .* has 3 options"),
        ([{"id": "a", "options": 3, "answer": 0}, {"id": "b"}], "id 'a' has 2 options, .* has 3 options"),
        ([{"id": "a", "answer": True}], "field 'answer' is True"),
        ([{"id": "a"}, {"id": "a"}], "already used in line 1"),
    ):
        with pytest.raises(BadRecords, match=message):
            with_answers(records, write(tmp_path / "bad.jsonl", bad))
    number = [{"id": "a", "options": 2, "answer": 1}, {"id": "b", "options": 2, "answer": "A"}]
    assert with_answers(records, write(tmp_path / "n.jsonl", number)).answers.tolist() == [1, 0]


def test_complete_and_map_on_the_command_line(tmp_path, capsys):
    path = str(write(tmp_path / "judge.jsonl", [*FOUR, {"id": "c", "order": [0, 1], "decision": 1}]))
    gold = write(
        tmp_path / "g.jsonl", [{"key": name, "n": 2, "gold": right} for name, right in zip("abc", "BAA", strict=True)]
    )
    command = ["measure", path, "--questions", str(gold), "--map", "id=key,options=n,answer=gold"]
    cli.main([*command, "--complete"])
    out = capsys.readouterr().out
    assert "2 items, K = 2, 2 orders; 4 records" in out and "1 incomplete item left out" in out
    assert re.search(r"^accuracy +75\.0 ", out, re.M)  # a: right in one of two orders, b in both
    cli.main(command)
    assert "3 items, K = 2, 1 to 2 orders; 5 records" in (out := capsys.readouterr().out)
    assert re.search(r"^accuracy +60\.0 ", out, re.M)


# --------------------------------------------------------------------------------------------------------------------
# What is shown


def test_four_records_give_a_full_table(tmp_path, capsys):
    path = str(write(tmp_path / "judge.jsonl", FOUR))
    cli.main(["measure", path, "--all", "--csv", str(tmp_path / "out.csv")])
    out = capsys.readouterr().out
    assert out.startswith(
        "No clear preference for a position: the first answer wins 75.0% [50.0, 100.0] of decided pairs, +25.0"
    )
    assert "Another order changes the verdict in 50.0% [0.0, 100.0] of cases." in out
    assert "2 items, K = 2, 2 orders; 4 records: 4 decided, 0 tied, 0 failed" in out
    for name in (
        "first position",
        "flip rate",
        "consistency",
        "verdict agreement",
        "ps (TV)",
        "tied",
        "failed",
        "label mass",
    ):
        assert f"\n{name} " in out
    table = pd.read_csv(tmp_path / "out.csv").set_index("debiaser")
    assert table.loc["all-orders average", "ps"] == 0 and table.loc["biased", "ps"] == 0.5
    assert "no weights make the positions uniform" in table.loc["prior-matching", "note"]
    assert "prior-matching: no weights make" in out.split("not fitted")[1]
    assert table.loc["biased", "first_position"] == 0.75


def test_little_label_mass_is_told(tmp_path, capsys):
    records = [{"id": "q", "order": order, "log_probs": [-2.0, -3.0]} for order in ([0, 1], [1, 0])]
    cli.main(["measure", str(write(tmp_path / "judge.jsonl", records))])
    assert "label mass" in (out := capsys.readouterr().out) and "score with another template, --template-args or" in out


def judge(n: int, first: float, ties: float = 0.0, failures: float = 0.0, seed: int = 0) -> list[dict]:
    """Decisions on ``n`` pairs in both orders: the first answer shown with probability ``first``, else option 0."""
    rng, records = np.random.default_rng(seed), []
    for i in range(n):
        for order in ([0, 1], [1, 0]):
            draw = rng.random()
            if draw < ties:
                said: int | str | None = "tie"
            elif draw < ties + failures:
                said = None
            else:
                said = order[0] if rng.random() < first else 0
            records.append({"id": f"q{i}", "order": order, "decision": said, "answer": 0})
    return records


def test_the_direction_of_the_bias_ties_and_failures(tmp_path):
    report = measure(write(tmp_path / "j.jsonl", judge(400, 0.4, 0.1, 0.05)))
    lines = {line.name: line for line in report.lines}
    first = lines["first position"]
    assert first.even == 0.5 and first.interval.value == pytest.approx(0.7, abs=0.05)
    assert first.interval.low < 0.7 < first.interval.high and report.verdict.startswith(
        "This judge prefers the first answer"
    )
    assert lines["tied"].interval.value == pytest.approx(0.1, abs=0.03)
    assert lines["failed"].interval.value == pytest.approx(0.05, abs=0.03)
    # A tie shares, a failure has no credit: 0.85 * (1 - 0.4 / 2) + 0.1 / 2.
    assert lines["accuracy"].interval.value == pytest.approx(0.73, abs=0.03)
    swapped = judge(400, 0.4)
    for record in swapped:
        record["order"] = record["order"][::-1]
    text = measure(write(tmp_path / "s.jsonl", swapped)).verdict
    assert text.startswith("This judge avoids the first answer")


def test_measures_are_those_of_complete_arrays(tmp_path):
    rng = np.random.default_rng(1)
    orders = all_orders(3)
    P = rng.dirichlet([3, 2, 1], size=(30, 6))
    path = write(tmp_path / "r.jsonl", [r | {"answer": int(r["id"][1:]) % 3} for r in records_of(P, orders, 1.0)])
    found = {line.name: line.interval.value for line in measure(path).lines}
    answers = np.arange(30) % 3
    assert found["accuracy"] == pytest.approx(metrics.accuracy(P, answers).mean())
    assert found["flip rate"] == pytest.approx(metrics.flip_rate(P).mean())
    assert found["consistency"] == found["verdict agreement"] == pytest.approx(metrics.consistency(P).mean())
    assert found["ps (TV)"] == pytest.approx(metrics.permutation_sensitivity(P).mean())
    positions = measure(path).positions
    assert positions.share.sum() == pytest.approx(1)
    seen = metrics.recall_by_position(P, orders, answers).mean(axis=0)
    assert positions.recall.tolist() == pytest.approx((seen[:, 1] / seen[:, 0]).tolist())


def test_repeated_calls_in_one_order_are_no_other_order(tmp_path):
    records = [
        {"id": f"q{i}", "order": [0, 1], "decision": (i + draw) % 2, "draw": draw, "answer": 0}
        for i in range(4)
        for draw in range(2)
    ]
    path = write(tmp_path / "r.jsonl", records)
    report = measure(path, gate=Gate(flip_rate=1.0))
    text = str(report)
    assert "K = 2, 1 orders; 8 records (4 repeat an order)" in text and "no item has verdicts in two orders" in text
    assert not [words for words in ("Another order", "Averaging", "flip rate", "consistency", "ps (TV)") if words in text]
    assert re.search(r"^repeats that differ +100\.0 \[39\.8, 100\.0\]   of the pairs of calls in one order", text, re.M)
    assert not {"ps", "flip", "consistency"} & set(report.table)
    with pytest.raises(ValueError, match="no item has verdicts in two orders"):
        _ = report.rejected
    assert "repeats" not in str(measure(write(tmp_path / "f.jsonl", FOUR)))


def test_measures_of_the_order_are_over_different_orders(tmp_path):
    rng, orders, records = np.random.default_rng(3), all_orders(3), []
    for i in range(12):
        for draw in range(int(rng.integers(5, 9))):
            order, p = orders[rng.integers(4)].tolist(), rng.dirichlet(np.ones(3)).tolist()
            records.append({"id": f"q{i}", "order": order, "probabilities": p, "draw": draw})
    tally = measure(write(tmp_path / "d.jsonl", records)).tally
    for i in range(12):
        own = sorted((r for r in records if r["id"] == f"q{i}"), key=lambda r: (r["order"], r["draw"]))
        P = [np.array(r["probabilities"])[np.argsort(r["order"])] for r in own]
        pairs = [(a, b) for b in range(len(own)) for a in range(b)]
        other, same = ([(a, b) for a, b in pairs if (own[a]["order"] == own[b]["order"]) == s] for s in (False, True))
        agree = {(a, b): P[a].argmax() == P[b].argmax() for a, b in pairs}
        assert tally.orders[i] == len({tuple(r["order"]) for r in own}) < len(own)
        assert tally.ps[i] == pytest.approx(np.mean([np.abs(P[a] - P[b]).sum() / 2 for a, b in other]))
        assert tally.consistency[i] == tally.agreement[i] == pytest.approx(np.mean([agree[pair] for pair in other]))
        assert tally.repeats[i] == pytest.approx(np.mean([not agree[pair] for pair in same]))
        assert tally.flips[i] == pytest.approx(np.mean([not agree[a, b] for a, b in other if a == 0]))


def test_ties_alone_have_no_first_position(tmp_path):
    records = [r | {"decision": "tie"} for r in judge(5, 0.5)]
    report = measure(write(tmp_path / "t.jsonl", records))
    text = f"{report}\n{report.everything()}"
    assert "nan" not in text and "first position" not in text and text.startswith("No verdict is decided.")
    assert re.search(r"^tied +100\.0", text, re.M) and re.search(r"^flip rate +0\.0", text, re.M)


def test_the_preference_for_each_position_is_a_number_of_its_own(tmp_path):
    report = measure(write(tmp_path / "j.jsonl", judge(300, 0.4)))
    for row in report.positions.itertuples():
        for end in ("", "_low", "_high"):
            assert getattr(row, f"preference{end}") == pytest.approx(getattr(row, f"share{end}") - 0.5)
    first, second = report.positions.preference
    assert first == pytest.approx(-second) and first > 0.1
    assert re.search(r" A +50\.0 +\d\d\.\d \[[^]]+\] +\+\d\d\.\d \[\+\d", report.everything())
    assert re.search(r" B +50\.0 +\d\d\.\d \[[^]]+\] +-\d\d\.\d \[-\d", report.everything())


def test_nothing_measurable_is_an_error(tmp_path):
    nothing = write(tmp_path / "n.jsonl", [{"id": "a", "order": [0, 1], "decision": None}])
    with pytest.raises(SystemExit, match="no record has a verdict: give"):
        cli.main(["measure", str(nothing)])
    one = write(tmp_path / "o.jsonl", FOUR[:1])
    with pytest.raises(SystemExit, match="add items, its other orders, or --questions"):
        cli.main(["measure", str(one)])
    two = measure(write(tmp_path / "t.jsonl", [FOUR[0], FOUR[2]]))
    assert "ask in a second order" in str(two) and "flip rate" not in str(two)


def test_the_gate_rejects_what_surely_lies_above(tmp_path, capsys):
    biased, fair = (str(write(tmp_path / f"{f}.jsonl", judge(300, f))) for f in (0.4, 0.0))
    gate = ["--max-flip-rate", "0.1", "--max-position-preference", "0.05"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["measure", biased, *gate])
    assert stopped.value.code == 3
    said = capsys.readouterr().err
    assert "rejected: flip rate" in said and "rejected: position A of 2 wins" in said
    cli.main(["measure", fair, *gate])
    assert not capsys.readouterr().err
    cli.main(["measure", biased, "--max-flip-rate", "0.38"])  # 41.3 [36.0, 47.0]: not above 38 for sure
    one = str(write(tmp_path / "one.jsonl", FOUR[:2]))  # one item has no interval
    for own in (gate[:2], gate[2:], ["--max-flip-rate", "1"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["measure", one, *own])
        said = capsys.readouterr()
        assert stopped.value.code == 3 and "too few items for an interval" in said.err and "nan" not in said.out + said.err
    for threshold in ("10", "nan", "-0.1", "inf"):
        for option in ("--max-flip-rate", "--max-position-preference"):
            with pytest.raises(SystemExit) as stopped:
                cli.main(["measure", fair, f"{option}={threshold}"])
            assert stopped.value.code == 2 and f"{threshold}: give a share, 0 to 1" in capsys.readouterr().err
    alone = write(tmp_path / "alone.jsonl", judge(20, 0.4)[::2])
    with pytest.raises(ValueError, match="no item has verdicts in two orders"):
        _ = measure(alone, gate=Gate(flip_rate=0.1)).rejected


def test_what_steers_a_terminal_is_shown_as_escapes(tmp_path, capsys):
    odd = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    rows = [record | {"systems": [odd, "other"]} for record in FOUR]
    cli.main(["measure", str(write(tmp_path / "pairs.jsonl", rows)), "--all"])
    out = capsys.readouterr().out
    shown = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    assert shown in out and not set("\x1b\x07\x9b\u202e") & set(out)

    def refuse(args: argparse.Namespace) -> None:  # as where a server's words are quoted
        raise ValueError(f"{odd} \udcff\nand more")

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=refuse)
    with pytest.raises(SystemExit) as error:
        commands.main(parser, [])
    assert error.value.code == f"permdistill: {shown} \\udcff\nand more"


@pytest.mark.slow
@pytest.mark.parametrize("n", [25_000, pytest.param(250_000, marks=pytest.mark.long)])
def test_many_records_in_linear_time(tmp_path, n):
    """100,000 records in a tenth of the three minutes and of memory that a million may take; and a million."""
    import time

    import torch

    from permdistill.engine.placement import PeakMemory

    with (tmp_path / "big.jsonl").open("w") as file:
        for i in range(n):
            for order in cyclic_orders(4).tolist():
                file.write(json.dumps({"id": f"q{i}", "order": order, "decision": (i + order[0]) % 4}) + "\n")
    started = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:  # also where a test before took more
        report = measure(tmp_path / "big.jsonl")
        assert str(report) and len(report.records.k) == 4 * n
    seconds = time.perf_counter() - started
    print(f"{4 * n} records: {seconds:.1f} s, {memory.bytes / 1e6:.0f} MB")
    assert seconds < 18 * n / 25_000 and 0 < memory.bytes < 200_000_000 * n / 25_000
