"""The plan's counts against what the engine does, on tiny models; and against a real LLM at laptop scale."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_hub
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from permdistill import scores
from permdistill.paper import budget, cli, hub, matrix, profiles, tasks
from permdistill.paper.models import TEACHERS
from permdistill.prompts import TEMPLATES
from permdistill.questions import unlabelled
from permdistill.teachers import load_teacher

PAPER = profiles.PROFILES["paper"]
LLAMA, T5 = "meta-llama/Llama-2-7b-chat-hf", "google/flan-t5-xl"
SETTINGS = replace(
    PAPER,
    teachers=(LLAMA, T5),
    tasks=("race_high", "medmcqa", *tasks.WHOLE_SUMMEVAL),
    n_prompts=(0, 0),
    n_others=(5, 5, 5),
)


def test_needs_are_what_the_notebooks_read():
    needs = profiles.needs(profiles.PROFILES["full"])
    assert len({(n.teacher, n.task, n.split, n.template or "usual") for n in needs}) == len(needs)
    by_table = {table: [n for n in needs if n.table == table] for table in ("T1", "T2", "T3", "R1")}
    assert len(by_table["T1"]) == 3 * 13 and {n.teacher for n in by_table["T2"]} == {"qwen2.5-coder-1.5b"}
    assert {n.task for n in by_table["T2"]} == set(tasks.MULTIPLE_CHOICE) and len(by_table["T3"]) == 4
    assert len(by_table["R1"]) == 2 * 6 + 4  # the usual template's are among T1's
    paper = [n for n in profiles.needs(PAPER) if n.table == "R1"]
    assert len(paper) == 2 * 6 + 2 * 4  # the laptop's SummEval is not
    assert {n.task for n in profiles.needs(PAPER) if n.table == "T2"} == {"race_middle", "race_high", "race_c"}


def test_full_profile_scores_what_the_matrix_reads_too():
    settings = profiles.PROFILES["full"]
    needs = matrix.all_needs(settings)
    assert {n.teacher for n in needs} == set(TEACHERS)
    assert {n.template_name for n in needs} == {*profiles.PROMPTS["letters"], *profiles.PROMPTS["summaries"]}
    more = needs[len(profiles.needs(settings)) :]
    trained = [("qwen2.5-coder-0.5b", task, "train") for task in tasks.MULTIPLE_CHOICE]
    large = [("qwen2.5-coder-1.5b", task, "train") for task in ("piqa", "socialiqa", "boolq")]
    assert [(n.teacher, n.task, n.split) for n in more] == [*trained, *large]
    for cell in (cell for part in matrix.MATRIX.values() for cell in part):
        for task, split in [*((t, "train") for t in cell.tasks), *((t, "test") for t in cell.tested)]:
            found = {n.split for n in needs if (n.teacher, n.task) == (cell.teacher, task)}
            assert split in found or (task == "race" and not found)
    assert matrix.all_needs(PAPER) == profiles.needs(PAPER)


def test_profile_with_a_limit_has_no_more_questions_and_the_same_students():
    small = profiles.get("paper-12")
    assert small == PAPER.limited(12) and profiles.get("paper") is PAPER
    assert (small.n_test, small.n_train, small.n_api) == (12, 12, 12) and {p.n_test for p in small.pools.values()} == {12}
    assert (small.teachers, small.tasks, small.runs) == (PAPER.teachers, PAPER.tasks, PAPER.runs)
    needs = matrix.all_needs(profiles.get("full-12"))
    assert {n.n for n in needs if n.template_name != "summaries_letters"} == {12}
    assert {n.n for n in needs if n.template_name == "summaries_letters"} == {140}  # intervals need several documents
    smoke = profiles.PROFILES["smoke"]
    assert profiles.get("smoke-1000") == smoke.limited(1000) and smoke.limited(1000).n_prompts == smoke.n_prompts
    for wrong in ("papers", "paper-", "paper-0", "paper-x", "paper--1", "-3"):
        with pytest.raises(ValueError, match="paper-12|at least 1"):
            profiles.get(wrong)


@pytest.mark.parametrize("name", [LLAMA, T5])
def test_tokens_are_those_that_the_engine_forwards(tiny, name, tmp_path):
    rows = budget.teachers_plan(SETTINGS, n=10**6)
    assert set(rows.lengths) == {"measured"}
    rows = rows[(rows.model == name.split("/")[1]) & (rows.table == "T1")]
    teacher, store = load_teacher(name), scores.Store(tmp_path / "scores")
    assert set(rows.template) == {"brief", "summaries_letters"}
    for row in rows.itertuples():
        needs = [n for n in profiles.needs(SETTINGS) if (n.table, n.teacher, n.split) == ("T1", name, "test")]
        asked = [task for task in (n.load() for n in needs) if task.template.name == row.template]
        before = teacher.tokens_forwarded
        # Sets go through one after the other, as `score` takes them; the attributes of one pair of summaries together.
        sets = [asked] if row.template == "summaries_letters" else [[task] for task in asked]
        scored = sum(
            scores.score(store, teacher, [q for t in own for q in unlabelled(t.questions)], TEMPLATES[row.template])
            for own in sets
        )
        forwarded = teacher.tokens_forwarded - before
        assert (row.questions, len(asked)) == (scored, row.tasks)
        if name == LLAMA:
            assert forwarded == round(row.tokens_shared) < row.tokens_alone / 2
        else:
            assert row.tokens_alone <= forwarded < 1.25 * row.tokens_alone  # padding
            assert row.tokens_shared == row.tokens_alone
    store.compact()
    on_disk = sum(values.nbytes for _, values in store._rows.values())
    assert on_disk == rows.bytes.sum()


def test_a_sample_stands_for_all_of_a_task(tiny):
    whole, part = (
        budget.teachers_plan(SETTINGS, n=n).set_index(["table", "model", "split", "template"]) for n in (10**6, 3)
    )
    assert (part.questions == whole.questions).all()
    assert np.allclose(part.tokens_shared / whole.tokens_shared, 1, atol=0.25)
    assert np.allclose(part.flops_shared / whole.flops_shared, 1, atol=0.25)


@torch.inference_mode()
def test_operations_are_those_that_torch_counts(tiny):
    """torch counts all pairs of places, where the formula for causal models takes those that attend to each other; and it
    counts attention only where that is made of plain products."""
    ids, plain = torch.arange(3, 40)[None], {"attn_implementation": "eager"}
    n = ids.numel()
    with FlopCounterMode(display=False) as counter:
        AutoModelForSeq2SeqLM.from_pretrained(tiny / T5, **plain).eval()(
            ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)
        )
    assert budget.flops(budget.architecture(T5), n, n * n, 1) == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        AutoModelForCausalLM.from_pretrained(tiny / LLAMA, **plain).eval()(ids, logits_to_keep=1)
    assert budget.flops(budget.architecture(LLAMA), n, n * n, 1) == pytest.approx(counter.get_total_flops(), rel=0.02)
    for name in ("google-bert/bert-base-uncased", "FacebookAI/roberta-base"):
        with FlopCounterMode(display=False) as counter:
            AutoModel.from_pretrained(tiny / name, **plain).eval()(ids)
        pooler = 2 * 32 * 32 * (n - 1)  # it sees one token only
        assert budget.encoder_flops(budget.architecture(name), np.array([n])) - pooler == pytest.approx(
            counter.get_total_flops(), rel=0.02
        )


def test_architectures_are_the_real_ones_without_weights(monkeypatch, tmp_path):
    monkeypatch.delenv(hub.LOCAL, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    budget.architecture.cache_clear()
    monkeypatch.setattr(budget, "_at_hand", lambda name: None)
    published = {LLAMA: 6.74, "meta-llama/Llama-2-13b-chat-hf": 13.02, T5: 2.85, "google/flan-t5-xxl": 11.14}
    published |= {"google-bert/bert-base-uncased": 0.1095, "google-bert/bert-large-uncased": 0.335}
    published |= {"FacebookAI/roberta-base": 0.125, "FacebookAI/roberta-large": 0.355}
    published |= {"microsoft/deberta-v3-base": 0.184, "microsoft/deberta-v3-large": 0.434}
    published |= {
        "qwen2.5-coder-1.5b": 1.54,
        "qwen2.5-coder-0.5b": 0.494,
        "smollm2-135m": 0.1345,
        "all-mpnet-base-v2": 0.1095,
    }
    for name, billions in published.items():
        model = budget.architecture(name)
        assert all(p.device.type == "meta" for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03), name
    budget.architecture.cache_clear()


def test_report_says_what_is_guessed_and_what_has_to_be_downloaded(tiny, monkeypatch, capsys):
    monkeypatch.setitem(profiles.PROFILES, "paper", SETTINGS)
    cli.main(["plan", "--profile", "paper", "--sample", "2"])
    shown = capsys.readouterr().out
    for part in (
        "h, A100",
        "h, H100",
        "tokens alone",
        "Llama 2 Community License",
        "In all: A100",
        "Downloads: ",
        "measured",
    ):
        assert part in shown
    assert "guessed" not in shown
    monkeypatch.delenv(hub.LOCAL)
    monkeypatch.setattr(hub, "cached", lambda repo, file="": None)
    for cached in (budget.architecture, budget._tokenizer):
        cached.cache_clear()
    rows = budget.teachers_plan(SETTINGS, n=2)
    assert set(rows.lengths) == {"guessed"}
    train = rows[rows.table == "T2"].iloc[0]
    assert train.questions == 100_568 and train.orders == 24 * train.questions
    # Passages of RACE are 231 to 424 words long, and 24 orders share them.
    assert 400 < train.tokens_alone / train.orders < 700 and 6 < train.tokens_alone / train.tokens_shared < 15


@pytest.mark.long
def test_estimates_hold_for_a_real_llm_at_laptop_scale():
    """SmolLM2 on three sets: tokens with and without sharing, and seconds, from samples of other questions. Seconds
    are the processor's for this process, so that a machine with other work to do measures the same."""
    teacher = load_teacher("smollm2-135m", torch.float32)
    first = budget.sample(budget.grouped(unlabelled(tasks.load_task("openbookqa", "test").questions)), 4)
    speed = budget.rate(teacher, first, TEMPLATES["letters"], time.process_time)
    for task in ("arc_easy", "hellaswag", "socialiqa"):
        questions = unlabelled(tasks.load_task(task, "test").questions)
        asked, others = questions[:16], budget.sample(budget.grouped(questions[16:]))
        counted = budget.count("smollm2-135m", others, TEMPLATES["letters"])
        scale = len(asked) / len(others)
        groups, before, started = budget.grouped(asked), teacher.tokens_forwarded, time.process_time()
        for group in groups:
            teacher.log_probs(group, budget.all_orders(len(group[0].options)), TEMPLATES["letters"])
        seconds, forwarded = time.process_time() - started, teacher.tokens_forwarded - before
        tokens, pairs = counted.shared
        assert scale * tokens == pytest.approx(forwarded, rel=0.25), task
        alone = sum(map(len, teacher.tokenize(asked, budget.all_orders(len(asked[0].options)), TEMPLATES["letters"])))
        assert scale * counted.alone[0] == pytest.approx(alone, rel=0.25), task
        operations = budget.flops(teacher.model, round(scale * tokens), round(scale * pairs), round(scale * counted.rows))
        print(f"{task}: tokens {scale * tokens:.0f} / {forwarded}, seconds {operations / speed:.1f} / {seconds:.1f}")
        assert operations / speed == pytest.approx(seconds, rel=0.25), task


def test_guessed_tokens_are_near_a_real_tokenizers(tiny):
    text = " ".join(
        tiny_hub.sentences()[:1] + ["Students from several neighbouring schools visited the old museum, didn't they?"]
    )
    assert len(budget.guessed_tokens(text)) == pytest.approx(1.4 * len(text.split()), rel=0.25)
