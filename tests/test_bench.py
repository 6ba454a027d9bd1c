"""The benchmark's arms compute the same, its formulas count what they say; exactness on real questions, tiny models."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_trie import CONFIGS, random_model
from transformers import AutoTokenizer

from permdistill.engine import trie
from permdistill.engine.placement import PeakMemory, matmul_peak
from permdistill.orders import all_orders
from permdistill.paper import bench, figures, models
from permdistill.paper.paths import ROOT
from permdistill.prompts import TEMPLATES
from permdistill.teachers import CausalTeacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.folder("smollm2-135m"))


def tiny_teacher(name: str, tokenizer) -> CausalTeacher:
    """A random model of an architecture behind a real tokenizer and chat template."""
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | {"vocab_size": len(tokenizer)})
    for length in ("max_position_embeddings", "n_positions", "sliding_window"):
        if getattr(config, length, None):
            setattr(config, length, 4096)
    model = random_model(config, "eager" if name == "gemma2" else "sdpa")
    return CausalTeacher(f"tiny-{name}", model, tokenizer, f"tiny {name}")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt", "gemma"])
def test_exact_on_200_real_questions(name, tokenizer):
    """All 24 orders in the trie against one prompt at a time, one random order of each question."""
    result = bench.exactness(tiny_teacher(name, tokenizer), 200, orders_each=1)
    assert result["questions"] == result["prompts"] == 200
    assert result["max_dp"] <= 1e-4
    assert result["decisions_changed"] == 0


@pytest.mark.parametrize("workload", bench.WORKLOADS)
def test_arms_agree_and_count_what_they_forward(tokenizer, workload, monkeypatch):
    teacher = tiny_teacher("llama", tokenizer)
    real = bench.summary_pairs
    monkeypatch.setattr(bench, "summary_pairs", lambda articles, systems, *rest: real(articles, min(systems, 4), *rest))
    rows = {row.arm: row for row in bench.measure(teacher, workload, 1, peak=1e11)}
    assert set(rows) == set(bench.ARMS)
    assert max(row.apart_max for row in rows.values()) < 1e-4
    assert rows["trie"].questions == {"short questions": 3, "passages": 2, "summaries": 24}[workload]
    per_question = {arm: row.tokens / row.questions for arm, row in rows.items()}
    assert per_question["trie"] < per_question["cached prefix"] < per_question["padded"]
    assert per_question["one order"] < per_question["padded"]
    assert per_question["forest"] <= per_question["trie"]
    assert rows["padded"].questions == (6 if workload == "summaries" else rows["trie"].questions)
    assert all(row.seconds > 0 and 0 < row.flops and row.host_seconds > 0 for row in rows.values())


def test_a_set_goes_through_in_a_forest_and_rivals_get_a_sample(tokenizer, monkeypatch):
    monkeypatch.setattr(bench, "QUESTIONS_OF_A_SET", 8)
    rows = {row.arm: row for row in bench.measure(tiny_teacher("llama", tokenizer), "PIQA", 1, peak=1e11)}
    assert rows["forest"].questions == rows["trie"].questions == 8 and rows["sorted"].questions == 6
    assert rows["forest"].tokens < 0.8 * rows["trie"].tokens  # what the questions share is paid once
    assert rows["forest"].flops < 0.9 * rows["trie"].flops
    assert max(row.apart_max for row in rows.values()) < 1e-4
    assert bench.table({"rows": [vars(row) for row in rows.values()]}).host_ms.gt(0).all()


def test_questions_of_a_passage_are_one_group(monkeypatch):
    questions = [bench.Question(f"q{i}", f"Passage {i // 2}.", "?", ("a", "b")) for i in range(6)]
    monkeypatch.setattr(bench, "load_task", lambda *_: SimpleNamespace(questions=questions))
    monkeypatch.setattr(bench, "QUESTIONS_OF_A_SET", 4)
    teacher = SimpleNamespace(model=SimpleNamespace(device=CPU))
    assert [[len(group) for group in round] for round in bench.rounds("RACE", teacher, 2)] == [[2, 2], [2]]
    monkeypatch.delenv(bench.hub.LOCAL, raising=False)
    assert not bench.available("RACE") and bench.available("PIQA")


def test_quick_measures_few_arms_and_stops_in_time(tokenizer, monkeypatch, tmp_path, capsys):
    teacher = tiny_teacher("llama", tokenizer)
    monkeypatch.setattr(bench, "load_teacher", lambda name, dtype: teacher)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "QUESTIONS_OF_A_SET", 2)
    monkeypatch.setattr(bench, "QUICK", ("PIQA", "SocialIQA"))
    command = ["bench", "--quick", "--sets", "1", "--models", teacher.name, "--output"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "all.json")])
    bench.main()
    rows = bench.read(tmp_path / "all.json")["rows"]
    assert {row["workload"] for row in rows} == {"PIQA", "SocialIQA"}
    assert {row["arm"] for row in rows} == {"sorted", "trie", "forest"}
    assert "host, ms a question" in capsys.readouterr().out
    monkeypatch.setattr(bench, "SECONDS", -1.0)
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench.main()


def made_up(workloads: list[str], models: tuple[str, ...] = ("qwen2.5-coder-1.5b", "smollm2-135m")) -> dict:
    """A benchmark's result of random numbers of the size of real ones."""
    rng, usual = np.random.default_rng(0), {"padded": 9, "sorted": 5, "cached prefix": 2.5, "trie": 1, "one order": 0.4}
    rows = [
        bench.Row(
            model, "bfloat16", workload, number, arm, 10, 10 * usual.get(arm, 0.8) * rng.lognormal(0, 0.3 * (arm != "trie")),
            1000, 10**12, 0.5, 10**8, 0.001, 0.01, 1.0,
        )
        for model in models for workload in workloads for number in range(3) for arm in bench.ARMS
    ]  # fmt: skip
    return {"machine": {"processor": "NVIDIA H100 80GB HBM3"}, "rows": [vars(row) for row in rows], "exactness": []}


def test_figures_of_a_card_are_kept_apart_from_those_of_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "run", lambda *_: made_up(["PIQA"], ("one",)))
    monkeypatch.setattr(sys, "argv", ["bench", "--output", str(tmp_path / "any.json"), "--keep", str(tmp_path)])
    bench.main()
    assert bench.of_cards(tmp_path).empty and (tmp_path / "bench.json").exists()
    (tmp_path / "bench.json").write_text("of a CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-nvidia-h100-80gb-hbm3.json", "bench.json"]
    assert (tmp_path / "bench.json").read_text() == "of a CPU"
    found = bench.of_cards(tmp_path)
    assert set(found.card) == {"NVIDIA H100 80GB HBM3"} and found.arm.tolist() == list(bench.ARMS)
    assert [*found.columns[:3]] == ["card", "model", "workload"] and "--keep figures" in (ROOT / "Makefile").read_text()


def test_passages_have_the_length_they_claim(tokenizer):
    teacher = tiny_teacher("llama", tokenizer)
    for question in [q for groups in bench.rounds("passages", teacher, 3) for [q] in groups]:
        assert 350 <= len(tokenizer.encode(question.context)) <= 400
        assert question.answer is None


def test_flops_by_formula(tokenizer):
    """A model of one layer, counted by hand."""
    model = tiny_teacher("llama", tokenizer).model
    hidden, middle, kv, layers, vocabulary = 32, 48, 16, 3, len(tokenizer)
    linears = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * middle)
    work = bench.Work(np.zeros(0), tokens=10, pairs=55, rows=2)
    assert bench.flops(model, work) == 2 * linears * 10 + 4 * layers * hidden * 55 + 2 * hidden * vocabulary * 2


def test_result_makes_a_table_with_the_spread(tokenizer):
    teacher = tiny_teacher("llama", tokenizer)
    rows = [vars(row) for row in bench.measure(teacher, "short questions", 2, peak=1e11)]
    table = bench.table(json.loads(json.dumps({"rows": rows})))
    assert table.arm.tolist() == list(bench.ARMS)
    row = table[table.arm == "trie"].iloc[0]
    assert row.ratio == row.ratio_low == row.ratio_high == 1
    assert (table.ratio_low <= table.ratio).all() and (table.ratio <= table.ratio_high).all()
    assert table.rounds.eq(2).all()
    assert bench.pretty(table).shape[0] == len(bench.ARMS)
    assert len(figures.scoring_time(table).axes) == 1


def test_peak_memory_sees_what_was_taken_and_given_back():
    with PeakMemory(CPU) as memory:
        block = torch.ones(50_000_000)
        time.sleep(0.2)  # it looks every few milliseconds, on a loaded machine later
        del block
    assert 190e6 < memory.bytes < 300e6
    with PeakMemory(CPU) as idle:
        pass
    assert idle.bytes < 20e6


def test_matmul_peak_is_a_rate():
    assert 1e9 < matmul_peak(CPU, torch.float32, seconds=0.05) < 1e15


def test_trie_of_many_prompts_stays_within_its_memory(tokenizer):
    """120 orders of five options: more tokens than a pass holds, and no more memory for it."""
    teacher = tiny_teacher("llama", tokenizer)
    question = bench.Question(
        "k5", "", "Which of these is a fruit that grows on trees?", ("an apple", "a stone", "a dog", "a car", "ice")
    )
    prompts = teacher.tokenize([question], all_orders(5), TEMPLATES["letters"])
    assert len(trie.build(prompts)) > 3 * trie.MAX_TOKENS
    labels = teacher.label_tokens(5, TEMPLATES["letters"])
    trie.next_token_log_probs(teacher.model, prompts[:1], labels)
    with PeakMemory(CPU) as memory:
        found, _ = trie.next_token_log_probs(teacher.model, prompts, labels)
    assert found.shape == (120, 5)
    assert memory.bytes < 300e6


def test_a_killed_benchmark_goes_on_where_it_was(tokenizer, monkeypatch, tmp_path):
    teacher, measured = tiny_teacher("llama", tokenizer), []
    monkeypatch.setattr(bench, "load_teacher", lambda name, dtype: teacher)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "SAMPLE", dict.fromkeys(bench.SAMPLE, 1))
    real = bench.summary_pairs
    monkeypatch.setattr(bench, "summary_pairs", lambda articles, systems, *rest: real(articles, min(systems, 3), *rest))
    measure = bench.measure

    def killed_at_passages(teacher, workload, n, peak):
        measured.append(workload)
        if measured == ["short questions", "passages"]:
            raise KeyboardInterrupt
        return measure(teacher, workload, n, peak)

    monkeypatch.setattr(bench, "measure", killed_at_passages)
    arguments = ([(teacher.name, torch.float32)], dict.fromkeys(bench.WORKLOADS, 1), 2, tmp_path / "bench.json")
    with pytest.raises(KeyboardInterrupt):
        bench.run(*arguments)
    result = bench.run(*arguments)
    assert measured == ["short questions", "passages", "passages", "summaries"]
    assert result == bench.read(tmp_path / "bench.json") == bench.run(*arguments)
    limits = bench.limits(result)
    assert limits.workload.tolist() == list(bench.WORKLOADS)
    stopped = result | {"peak_flops": {**result["peak_flops"], "another float32": [1.0]}}
    assert bench.limits(stopped).equals(limits)
    shares = result["time"][f"{teacher.name} float32"]["passages"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert bench.over_one_order(bench.table(result)).workload.tolist() == list(bench.WORKLOADS)
