"""Other tools' files in their true layouts, written here; and each benchmark's own statistics of pairs, in closed form."""

from __future__ import annotations

import json
import time
import zipfile

import numpy as np
import pytest

from permdistill.measure.formats import FORMATS, read
from permdistill.measure.pairs import FAILED, TIE, rates, verdicts
from permdistill.orders import all_orders
from permdistill.questions import BadRecords


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def said(records) -> list[tuple]:
    """(id, order, probabilities by position or None) of each record."""
    found = []
    for i, item in enumerate(records.item):
        own = slice(records.starts[i], records.starts[i] + records.k[i])
        p = None if records.failed[i] else records.p[own].round(3).tolist()
        found.append((records.ids[item], records.orders[own].tolist(), p))
    return found


def lm_eval(doc_id: int, choices: list[str], likelihoods: list[float], target: str) -> dict:
    pairs = [[str(v), "False"] for v in likelihoods]
    return {
        "doc_id": doc_id,
        "doc": {"question": "Which?", "choices": choices},
        "target": target,
        "arguments": {f"gen_args_{i}": {"arg_0": "Which?", "arg_1": f" {'ABCD'[i]}"} for i in range(len(choices))},
        "resps": [[pair] for pair in pairs],
        "filtered_resps": pairs,
        "doc_hash": "0",
        "prompt_hash": "0",
        "target_hash": "0",
        "acc": 1.0,
    }


def test_lm_evaluation_harness_reruns_in_other_orders(tmp_path):
    named = "samples_race_2026-01-31T12-00-0{}.123456.jsonl"
    first = lines(tmp_path / named.format(1), [lm_eval(0, ["ice", "fire", "air"], [-1.0, -2.0, -1500.0], "0")])
    second = lines(tmp_path / named.format(2), [lm_eval(0, ["air", "ice", "fire"], [-1.0, -1.0, -1e4], "1")])
    found = read([first, second])
    assert [row[1] for row in said(found)] == [[0, 1, 2], [2, 0, 1]] and found.answers.tolist() == [0]
    e = 1 / (1 + np.exp(-1))
    assert said(found)[0][2] == pytest.approx([e, 1 - e, 0], abs=1e-3) and said(found)[1][2] == [0.5, 0.5, 0]
    assert np.isnan(found.mass).all() and not found.hard.any()  # likelihoods of texts are no label mass
    with pytest.raises(BadRecords, match="2.123456.jsonl, line 1: not as in lm-eval.*its options are"):
        read([first, lines(second, [lm_eval(0, ["x", "ice", "fire"], [-1, -1, -1], "1")])])


def test_lm_evaluation_harness_tasks_count_from_0_each(tmp_path):
    anatomy = lm_eval(0, ["ice", "fire", "air"], [-1.0, -2.0, -3.0], "0")
    virology = lm_eval(0, ["x", "ice", "fire"], [-1.0, -2.0, -3.0], "1")
    paths = [tmp_path / f"samples_mmlu_{name}_2026-01-31T12-00-00.123456.jsonl" for name in ("anatomy", "virology")]
    assert read(lines(paths[0], [anatomy])).ids == ["0"]
    found = read([lines(paths[0], [anatomy]), lines(paths[1], [virology])])
    assert found.ids == ["mmlu_anatomy 0", "mmlu_virology 0"] and found.answers.tolist() == [0, 1]
    again = lines(
        tmp_path / paths[1].name.replace("00-00.", "30-00."), [lm_eval(0, ["fire", "x", "ice"], [-3, -1, -2], "2")]
    )
    assert read([*paths, again]).counts.tolist() == [1, 2]  # a run of the same task in another order


def test_likelihoods_without_the_question_are_no_options(tmp_path):
    """acc_mutual_info: K choices after the question, then the same K alone."""
    row = lm_eval(0, ["ice", "fire", "air"], [-1.0, -2.0, -3.0, -9.0, -0.1, -0.1], "1")
    row["arguments"] |= {f"gen_args_{i}": {"arg_0": "", "arg_1": f" {'ABC'[i - 3]}"} for i in (3, 4, 5)}
    row["doc"] = {"question": "Which?", "choices": ["ice", "fire", "air"]}
    found = read(lines(tmp_path / "samples_a.jsonl", [row | {"acc_mutual_info": 0.0}]))
    assert found.options.tolist() == [3] and found.answers.tolist() == [1]
    assert said(found)[0][1:] == ([0, 1, 2], pytest.approx(np.exp([-1, -2, -3]) / np.exp([-1, -2, -3]).sum(), abs=1e-3))


def inspect_sample(choices: list[str], answer: str, target: str, epoch: int = 1, explanation: str = "ANSWER: A") -> dict:
    score = {"value": "C", "answer": answer, "explanation": explanation}
    return {"id": "q", "epoch": epoch, "input": "Which?", "choices": choices, "target": target, "scores": {"choice": score}}


def test_inspect_logs_with_shuffled_choices(tmp_path):
    # multiple_choice(shuffle=True): the log looks as if nothing had been shuffled, only the explanation tells.
    explanation = "Choices were shuffled before generating a response, the following was sent to the model:\n\n"
    explanation += "A) fire\nB) ice\nand snow\nC) air\nShuffled answer:\nANSWER: B"
    samples = [
        inspect_sample(["ice\nand snow", "fire", "air"], "A", "A", 1, explanation),
        inspect_sample(["fire", "air", "ice\nand snow"], "C", "C", 2),  # dataset.shuffle_choices: its own order
        inspect_sample(["ice\nand snow", "fire", "air"], "", "A", 3),  # no answer was read
    ]
    log = {"version": 2, "status": "success", "eval": {"task": "t"}, "samples": samples}
    (tmp_path / "log.json").write_text(json.dumps(log), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "log.eval", "w") as packed:
        packed.writestr("header.json", json.dumps({key: log[key] for key in ("version", "status", "eval")}))
        for sample in samples:
            packed.writestr(f"samples/q_epoch_{sample['epoch']}.json", json.dumps(sample))
    for name in ("log.json", "log.eval"):
        found = read(tmp_path / name)
        expected = [([0, 1, 2], None), ([1, 0, 2], [0, 1, 0]), ([1, 2, 0], [0, 0, 1])]
        assert [row[1:] for row in said(found)] == expected and found.answers.tolist() == [0]
    (tmp_path / "cut.eval").write_bytes((tmp_path / "log.eval").read_bytes()[:-30])
    with pytest.raises(BadRecords):
        read(tmp_path / "cut.eval")


def test_a_sample_of_an_inspect_log_that_is_too_large_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("samples/q_epoch_1.json", json.dumps(inspect_sample(["ice", "fire"], "A", "A")))
        packed.writestr("samples/r_epoch_1.json", "[" + " " * 100_000 + "]")
    monkeypatch.setattr("permdistill.measure.rows.WHOLE", 1000)
    with pytest.raises(BadRecords, match="sample 2: more than 1,000 bytes in one piece, unpacked"):
        read(tmp_path / "log.eval")


def test_an_explanation_without_end_holds_nobody_up(tmp_path):
    """Two thousand of each took hours: a regular expression tried each beginning with each end."""
    said = "Choices were shuffled " * 2000 + "x:\n\n" * 2000 + "\nShuffled answer" * 2000
    log = {"samples": [inspect_sample(["ice", "fire"], "A", "B", explanation=said)]}
    (tmp_path / "log.json").write_text(json.dumps(log), encoding="utf-8")
    started = time.process_time()
    assert read(tmp_path / "log.json").counts.tolist() == [1] and time.process_time() - started < 2


@pytest.mark.parametrize(
    "row",
    [
        {"doc_id": 1, "filtered_resps": [[10**400], [-1.0]]},
        {"samples": [{"id": 1, "choices": ["a", "b"], "epoch": float("inf")}]},
    ],
)
def test_numbers_beyond_all_floats_are_named(tmp_path, row):
    with pytest.raises(BadRecords, match="line 1: not as in"):
        read(lines(tmp_path / "far.jsonl", [row]))


def test_a_row_of_pandalm_without_a_result_is_named(tmp_path):
    with pytest.raises(BadRecords, match=r"line 1: not as in PandaLM results: no field '\*_result'"):
        read(lines(tmp_path / "x.jsonl", [{"idx": 1}]), "pandalm")


def test_fastchat_pairs_are_unswapped(tmp_path):
    row = {"question_id": 81, "model_1": "a", "model_2": "b", "judge": ["gpt-4", "pair-v2"], "turn": 1, "tstamp": 1.0}
    rows = [
        row | {"g1_winner": "model_1", "g2_winner": "model_2"},  # the first answer both times
        row | {"g1_winner": "tie", "g2_winner": "error", "turn": 2},
    ]
    found = read(lines(tmp_path / "gpt-4_pair.jsonl", rows))
    assert found.ids == ["gpt-4/pair-v2 81 turn 1 a b", "gpt-4/pair-v2 81 turn 2 a b"]
    assert [row[1:] for row in said(found)] == [([0, 1], [1, 0]), ([1, 0], [1, 0]), ([0, 1], [0.5, 0.5]), ([1, 0], None)]


def test_judgebench_verdicts_are_by_position(tmp_path):
    row = {"pair_id": "p", "question": "?", "response_A": "x", "response_B": "y", "label": "B>A", "judge_name": "arena_hard"}
    first = {"judgment": {"judge_model": "m", "prompt": "", "response": ""}, "decision": "A>B"}
    rows = [row | {"judgments": [first, first]}, row | {"pair_id": "o", "judgments": [None, first | {"decision": "A=B"}]}]
    found = read(lines(tmp_path / "dataset=judgebench,judge_model=m.jsonl", rows))
    assert [row[1:] for row in said(found)] == [([0, 1], [1, 0]), ([1, 0], [1, 0]), ([0, 1], None), ([1, 0], [0.5, 0.5])]
    assert found.answers.tolist() == [1, 1]
    alone = read(lines(tmp_path / "alone.jsonl", [row | {"judgments": [first | {"decision": "B>A"}]}]))  # --single_game
    assert said(alone) == [("p", [0, 1], [0, 1])] and alone.answers.tolist() == [1]


def test_llmbar_results_are_unswapped(tmp_path):
    row = {"input": "?", "output_1": "x", "output_2": "y", "label": 2}
    result = {
        "swap = False": {"completion": ["", ""], "winner": "1"},
        "swap = True": {"completion": ["", ""], "winner": "2"},
    }
    (tmp_path / "result.json").write_text(json.dumps([row | {"results": [{}, result]}] * 2, indent=2), encoding="utf-8")
    found = read(tmp_path / "result.json")
    assert [row[1:] for row in said(found)] == [([0, 1], [1, 0]), ([1, 0], [1, 0])] * 2 and found.answers.tolist() == [1, 1]
    paths = [
        tmp_path / name / "gpt4" / "result.json" for name in ("Natural", "GPTInst")
    ]  # each subset counts from its start
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes((tmp_path / "result.json").read_bytes())
    both = read(paths)
    assert both.counts.tolist() == [2] * 4 and {name.split()[0] for name in both.ids} == {
        "Natural/gpt4/result.json", "GPTInst/gpt4/result.json"
    }  # fmt: skip


def test_pandalm_results_by_position_with_the_annotators_majority(tmp_path):
    row = {"idx": 7, "cmp_key": "bloom-7b_opt-7b", "instruction": "?", "input": ""}
    votes = {"annotator1": 2, "annotator2": 2, "annotator3": 0}
    given = row | {"response1": "x", "response2": "y", "pandalm_result": "1"} | votes
    turned = row | {"response1": "y", "response2": "x", "pandalm_result": "Tie"}
    for name, one in (("a.json", given), ("b.json", turned)):
        (tmp_path / name).write_text(json.dumps([one]), encoding="utf-8")
    found = read([tmp_path / "a.json", tmp_path / "b.json"])
    assert said(found) == [("7", [0, 1], [1, 0]), ("7", [1, 0], [0.5, 0.5])] and found.answers.tolist() == [1]
    (tmp_path / "c.json").write_text(json.dumps([row | {"gpt_result": "garbage"}]), encoding="utf-8")
    assert said(read(tmp_path / "c.json")) == [("7", [0, 1], None)]


def test_alpaca_eval_annotations_have_the_order_that_its_seed_gave(tmp_path):
    row = {"output_1": "x", "generator_1": "ref", "output_2": "y", "generator_2": "mine", "annotator": "gpt4"}
    instructions = [f"Say {i}" for i in range(40)]
    values = [1, 2, 1.5, None, 1.25]
    rows = [row | {"instruction": t, "preference": values[i % 5]} for i, t in enumerate(instructions)]
    (tmp_path / "annotations.json").write_text(json.dumps(rows), encoding="utf-8")
    found = read(tmp_path / "annotations.json")
    assert 8 < sum(order == [1, 0] for _, order, _ in said(found)) < 32
    for (_, order, p), value in zip(said(found), values * 8, strict=True):
        expected = {1: [1, 0], 2: [0, 1], 1.5: [0.5, 0.5], None: None, 1.25: [0.75, 0.25]}[value]
        assert p == (expected and [expected[o] for o in order])
    assert np.isnan(found.mass).all()  # a preference is a share between the two, not of the whole probability


def test_pride_arrays_in_all_or_cyclic_orders(tmp_path):
    rng = np.random.default_rng(0)
    full, cyclic = rng.dirichlet(np.ones(4), size=24), rng.dirichlet(np.ones(4), size=4)
    rows = [{"type": "metric", "data": {"accuracy": 0.5}}]
    for i, p in enumerate((full, cyclic, cyclic[0])):
        rows.append({"type": "result", "data": {"idx": i, "prompt": "", "options": [], "probs": p.tolist(), "ideal": "C"}})
    found = read(lines(tmp_path / "anatomy.jsonl", rows[1:] + rows[:1]))
    assert found.counts.tolist() == [24, 4, 1] and found.answers.tolist() == [2, 2, 2]
    assert [order for name, order, _ in said(found) if name == "0"] == all_orders(4).tolist()
    assert np.array([p for name, _, p in said(found) if name == "1"]) == pytest.approx(cyclic, abs=1e-3)
    assert np.isnan(found.mass).all()  # a softmax over the labels alone
    virology = lines(tmp_path / "virology.jsonl", rows[1:])
    both = read([tmp_path / "anatomy.jsonl", virology])
    assert both.ids == [f"{subject} {i}" for subject in ("anatomy", "virology") for i in range(3)]


def test_an_unknown_layout_says_what_is_expected(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"foo": 1}])
    with pytest.raises(BadRecords, match="field 'id' is None: give a string"):
        read(path)
    with pytest.raises(BadRecords, match="line 1: not as in JudgeBench outputs: no field 'judgments'"):
        read(path, "judgebench")
    with pytest.raises(ValueError, match="format 'csv': give one of records, lm-eval"):
        read(path, "csv")
    assert len(FORMATS) == 9


# --------------------------------------------------------------------------------------------------------------------
# Statistics of the benchmarks

# (verdict in the order 0, 1; verdict in the order 1, 0), as options; the gold answer is option 0
CASES = [(0, 0), (1, 1), (0, 1), (1, 0), ("tie", "tie"), (0, "tie"), (1, "tie"), (0, None), (None, None)]


@pytest.fixture
def cases(tmp_path):
    rows = [
        {"id": f"{i}", "order": order, "decision": decision, "answer": 0}
        for i, pair in enumerate(CASES)
        for order, decision in zip(([0, 1], [1, 0]), pair, strict=True)
    ]
    return read(lines(tmp_path / "cases.jsonl", rows))


def test_verdicts_of_pairs(cases):
    found, gold = verdicts(cases)
    code = {"tie": TIE, None: FAILED}
    assert found.tolist() == [[code.get(v, v) for v in pair] for pair in CASES] and gold.tolist() == [0] * 9


def test_rates_are_those_of_each_benchmark(cases):
    found = {name: values.tolist() for name, values in rates(cases).items()}
    assert found["consistent (MT-bench)"] == [1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert found["biased toward first (MT-bench)"] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert found["biased toward second (MT-bench)"] == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert found["error (MT-bench)"] == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    # LLMBar: statistics.json counts winner == label in each order, in both, and winner == winner, None == None too.
    labels = ["1"] * 9
    winners = [[{0: "1", 1: "2"}.get(v, v) for v in pair] for pair in CASES]
    average = [((a == y) + (b == y)) / 2 for (a, b), y in zip(winners, labels, strict=True)]
    assert found["correct_average (LLMBar)"] == average
    assert found["correct_both (LLMBar)"] == [a == b == y for (a, b), y in zip(winners, labels, strict=True)]
    assert found["equal (LLMBar)"] == [a == b for a, b in winners]
    # JudgeBench: +1 for the label, -1 for its opposite; right when the sum is above 0.
    assert found["accuracy (JudgeBench)"] == [1, 0, 0, 0, 0, 1, 0, 1, 0]
