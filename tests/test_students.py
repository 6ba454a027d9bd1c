"""Students on a tiny random BERT whose vocabulary is made here: no network, no downloaded weights."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetForTokenClassification,
    MPNetModel,
    PreTrainedTokenizerFast,
)

from permdistill import heads
from permdistill.configs import HEADS, StudentConfig
from permdistill.orders import all_orders, to_options
from permdistill.questions import Question
from permdistill.students import Student, build, encoder_key

WORDS = "yes no red green blue tall small old new cat dog bird stone river is it the which what long story".split()


def make_encoder(folder: Path, dropout: float = 0.0) -> str:
    """A random two-layer BERT and a word-level tokenizer, saved as a checkpoint folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = special + WORDS + list("ABCDEF") + [")", "(", ":", "?", "Prediction", "chosen", "not"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=16,  # as in sentence-transformers' checkpoints: shorter than the encoder, and to be ignored
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def some_questions(n: int = 5, k: int = 3, context: str = "") -> list[Question]:
    rng = np.random.default_rng(1)
    options = [tuple(" ".join(rng.choice(WORDS, 1 + o, replace=False)) for o in range(k)) for _ in range(n)]
    return [Question(f"q{i}", context, f"which is {WORDS[i]} ?", own) for i, own in enumerate(options)]


def test_texts_are_what_the_paper_says():
    q = Question("q", "long story", "which ?", ("cat", "dog", "bird"))
    joint, per_option = heads.HEADS["joint"], heads.HEADS["per_option"]
    (text,) = joint.texts(q, [2, 0, 1], None)
    assert (text.first, text.second) == ("long story which ?", "A) bird B) cat C) dog")
    # Option 0 stands at position 1: the teacher said "B".
    assert joint.texts(q, [2, 0, 1], 0)[0].second == "A) bird B) cat C) dog Prediction: B"
    assert [t.second for t in per_option.texts(q, [2, 0, 1], None)] == ["cat", "dog", "bird"]
    chosen = per_option.texts(q, [2, 0, 1], 1)
    assert [t.second for t in chosen] == ["cat (not chosen)", "dog (chosen)", "bird (not chosen)"]


def test_every_head_that_a_config_may_name_is_there():
    assert tuple(heads.HEADS) == HEADS


@pytest.mark.parametrize(
    "change, named",
    [
        ({"head": "both"}, "both"),
        ({"inputs": "gold"}, "gold"),
        ({"k": 27}, "27"),
        ({"max_length": 2}, "2"),
        ({"encoder": ""}, "''"),
    ],
)
def test_config_is_validated(change, named):
    with pytest.raises(ValueError, match=named):
        StudentConfig(**{"encoder": "e", **change})


def test_joint_maps_positions_to_options(encoder):
    student = build(StudentConfig(encoder, "joint", k=3), 0)
    with torch.no_grad():  # a student that always says P = .7, .2, .1 at positions A, B, C
        student.model.classifier.weight.zero_()
        student.model.classifier.bias.copy_(torch.log(torch.tensor([0.7, 0.2, 0.1])))
    orders = all_orders(3)
    p = student.predict_batch(some_questions(), orders, autocast=False)
    assert p.shape == (5, 6, 3) and p.dtype == np.float64
    for j, order in enumerate(orders):
        for position, expected in enumerate([0.7, 0.2, 0.1]):
            assert p[:, j, order[position]] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_predict_equals_one_naive_forward_at_a_time(encoder, head):
    """Unique sequences, length-sorted batches and padding change nothing."""
    student = build(StudentConfig(encoder, head, "prediction", 3), 0)
    student.scale = 3.0
    questions, orders = some_questions(4, context="long story"), all_orders(3)
    decisions = np.random.default_rng(0).integers(3, size=(4, 6))
    p = student.predict_batch(questions, orders, decisions, batch_tokens=100, autocast=False)
    for i, question in enumerate(questions):
        for j, order in enumerate(orders):
            pairs = [(t.first, t.second) for t in student.head.texts(question, order, int(decisions[i, j]))]
            if head == "bi_encoder":
                with torch.no_grad():
                    embedded = [
                        student.model(**student.tokenizer(a or b, return_tensors="pt")).last_hidden_state[0].double().mean(0)
                        for a, b in pairs
                    ]
                cosines = torch.stack([torch.cosine_similarity(embedded[0], option, dim=0) for option in embedded[1:]])
                assert np.abs(p[i, j] - (3 * cosines).softmax(-1).numpy()).max() < 1e-6
                continue
            if head in ("shared_prefix", "cross_option"):
                scores = (scores_alone if head == "shared_prefix" else scores_together)(student, pairs)
                assert np.abs(p[i, j] - scores.softmax(-1).numpy()).max() < 1e-6
                continue
            inputs = student.tokenizer(*map(list, zip(*pairs, strict=True)), return_tensors="pt", padding=True)
            if head == "per_option":
                inputs = {name: value[None] for name, value in inputs.items()}  # the model's own (1, K, token)
            with torch.no_grad():
                naive = student.model(**inputs).logits[0].double().softmax(-1).numpy()
            naive = naive if head == "per_option" else to_options(naive, order)
            assert np.abs(p[i, j] - naive).max() < 1e-6
    assert p.std(axis=(0, 1)).min() > 1e-4  # the random student does tell the inputs apart


def scores_alone(student: Student, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """What the shared-prefix head says of options: plain pairs, of which the first text does not see the second."""
    found = []
    for first, second in pairs:
        inputs = student.tokenizer(first, second, return_tensors="pt")
        option = inputs["token_type_ids"][0].bool()  # of BERT's pairs, with the last separator
        hidden = option[None, :] & ~option[:, None]  # (query, key)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)[None, None]
        with torch.no_grad():
            scores = student.model(**{**inputs, "attention_mask": mask}).logits[0, :, 0].double()
        found.append(scores[option].mean())
    return torch.stack(found)


def scores_together(student: Student, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """What the cross-option head says, told token by token who sees whom: (0, place) begins, (option, place) follows."""
    tokenised = [student.tokenizer(*pair) for pair in pairs]
    ids, who, last = [], [], set()
    for number, one in enumerate(tokenised, 1):
        parts = list(zip(one["input_ids"], one["token_type_ids"], range(len(one["input_ids"])), strict=True))
        for token, part, place in parts if number == 1 else [p for p in parts if p[1]]:
            ids.append(token)
            who.append((number * part, place))
        last.add(len(ids) - 1)
    mask = torch.full((len(ids), len(ids)), -1e9)
    for query, (own, _) in enumerate(who):
        for key, (other, _) in enumerate(who):
            if other in (0, own) or (own and key in last):
                mask[query, key] = 0.0
    inputs = {"input_ids": ids, "token_type_ids": [int(own > 0) for own, _ in who], "position_ids": [at for _, at in who]}
    with torch.no_grad():
        found = student.model(**{n: torch.tensor([v]) for n, v in inputs.items()}, attention_mask=mask[None, None])
    scores, options = found.logits[0, :, 0].double(), torch.tensor([own for own, _ in who])
    return torch.stack([scores[options == number].mean() for number in range(1, len(pairs) + 1)])


def test_options_see_each_other_and_no_other_questions(encoder):
    """Another option changes what the cross-option head says of the rest; questions of the same wording change nothing, nor
    do those that only the tokenizer cannot tell apart."""
    student, order = build(StudentConfig(encoder, "cross_option", k=2), 0), np.arange(2)[None]
    first, second = (Question(n, "long story", "which ?", ("cat", other)) for n, other in (("a", "dog"), ("b", "bird")))
    asked = [first, second, Question("c", "long", "story which ?", ("cat", "dog")), replace(first, question="which  ?")]
    together = student.predict_batch(asked, order, autocast=False)[:, 0]
    alone = np.concatenate([student.predict_batch([q], order, autocast=False)[:, 0] for q in asked])
    assert np.abs(together - alone).max() < 1e-6 and np.abs(alone[2:] - alone[0]).max() < 1e-6
    rows, index = student.encode([first, second], np.broadcast_to(order, (2, 1, 2)))
    with torch.inference_mode():
        scores = student.forward(rows)[:, 0].numpy()[index[:, 0]]
    assert abs(scores[0, 0] - scores[1, 0]) > 1e-5  # of "cat", beside "dog" and beside "bird"


@pytest.mark.parametrize("head", [head for head in HEADS if head != "joint"])
def test_an_option_without_tokens_has_a_probability(encoder, head):
    empty = Question("q", "", "which ?", ("cat", "\u200b"))
    p = build(StudentConfig(encoder, head, k=2), 0).predict_batch([empty], np.arange(2)[None], autocast=False)
    assert np.isfinite(p).all() and p.sum() == pytest.approx(1)


def test_the_shared_prefix_is_read_once():
    rows = [
        {"input_ids": np.array(ids), "token_type_ids": np.array(part), "option": np.array(part)}
        for ids, part in (([7, 8, 9, 1], [0, 0, 0, 1]), ([5, 2], [0, 1]), ([7, 8, 9, 3, 4], [0, 0, 0, 1, 1]))
    ]
    packed, places = heads.pack(rows)
    assert [row["input_ids"].tolist() for row in packed] == [[7, 8, 9, 1, 3, 4], [5, 2]]
    assert packed[0]["option"].tolist() == [0, 0, 0, 1, 2, 2] and packed[0]["place"].tolist() == [0, 1, 2, 3, 3, 4]
    assert packed[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert places.tolist() == [[0, 1], [1, 1], [0, 2]]


def test_the_shared_prefix_head_reads_mpnet_as_it_reads_itself(tmp_path):
    """MPNet adds a bias by distance: of a plain sequence it has to be its own; options packed together get the scores that
    they have alone."""
    config = MPNetConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    model = MPNetForTokenClassification(MPNetConfig(**{**config.to_dict(), "num_labels": 1})).eval()
    states, encoder = torch.zeros(1, 9, 16), model.base_model.encoder
    plain = encoder.compute_position_bias(states)
    with heads._relative_to(model, torch.arange(9)[None]):
        assert torch.equal(encoder.compute_position_bias(states), plain)
    assert torch.equal(encoder.compute_position_bias(states), plain)
    rng = np.random.default_rng(0)
    start = rng.integers(3, 40, 6)
    rows = [
        {"input_ids": np.r_[start, rng.integers(3, 40, n)], "option": np.r_[np.zeros(6, int), np.ones(n, int)]}
        for n in (1, 4, 2)
    ]

    def once(packed):
        ids, place, option = (
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[name]).long() for row in packed], batch_first=True)
            for name in ("input_ids", "place", "option")
        )
        there = (torch.arange(ids.shape[1]) < torch.tensor([[len(row["input_ids"])] for row in packed])).long()
        inputs = {"input_ids": ids, "place": place, "option": option, "attention_mask": there}
        return heads.HEADS["shared_prefix"].outputs(model, inputs)

    with torch.no_grad():
        together = heads.HEADS["shared_prefix"].forward(once, rows)
        alone = torch.cat([heads.HEADS["shared_prefix"].forward(once, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6) and together.std() > 1e-3


def test_different_sequences_are_scored_once(encoder):
    summaries = ["cat", "dog dog", "bird bird bird"]
    pairs = [Question(f"{a}-{b}", "long story", "which ?", (a, b)) for a, b in permutations(summaries, 2)]
    every = np.broadcast_to(all_orders(2), (6, 2, 2))
    rows, index = build(StudentConfig(encoder, "per_option", k=2), 0).encode(pairs, every)
    assert len(rows) == 3 and index.shape == (6, 2, 2)
    assert index[0].tolist() == [[0, 1], [0, 1]] and index[-1].tolist() == [[2, 1], [2, 1]]
    marking = build(StudentConfig(encoder, "per_option", "prediction", 2), 0)
    marked, _ = marking.encode(pairs, every, np.zeros((6, 2), dtype=int))
    assert len(marked) == 6  # each summary chosen and not chosen
    apart, index = build(StudentConfig(encoder, "bi_encoder", k=2), 0).encode(pairs, every)
    assert len(apart) == 4 and index.shape == (6, 2, 3)  # the article and question once, each summary once
    assert index[0].tolist() == [[0, 1, 2], [0, 1, 2]] and index[-1].tolist() == [[0, 3, 2], [0, 3, 2]]
    joint, index = build(StudentConfig(encoder, "joint", k=2), 0).encode(pairs, every)
    assert len(joint) == 6 and index.shape == (6, 2)  # (0-1 in order 1 0) reads as (1-0 in order 0 1)


def test_all_heads_but_joint_are_exactly_order_equivariant(encoder):
    questions, orders = some_questions(6, 4), all_orders(4)

    def spread(student: Student, decisions=None) -> float:
        p = student.predict_batch(questions, orders, decisions, autocast=False)
        return float(np.abs(p - p[:, :1]).max())

    same, order = np.full((6, 24), 2), [2, 0, 3, 1]
    shown = [Question(q.id, q.context, q.question, tuple(q.options[o] for o in order)) for q in questions]
    for head in ("per_option", "shared_prefix", "cross_option", "bi_encoder"):
        student = build(StudentConfig(encoder, head), 0)
        assert spread(student) == 0.0
        # The same decision in all orders leaves nothing that depends on the order.
        assert spread(build(StudentConfig(encoder, head, "prediction"), 0), same) == 0.0
        # Permuting the options themselves permutes the probabilities.
        p, permuted = (student.predict_batch(list(q), orders[:1], autocast=False)[:, 0] for q in (questions, shown))
        assert np.abs(p[:, order] - permuted).max() < 1e-6
    assert spread(build(StudentConfig(encoder, "joint"), 0)) > 1e-3


@pytest.mark.parametrize("head", ["joint", "per_option"])
def test_decisions_must_fit_the_inputs(encoder, head):
    questions, orders = some_questions(2), all_orders(3)
    good = np.zeros((2, 6), dtype=int)
    with pytest.raises(ValueError, match="decisions given"):
        build(StudentConfig(encoder, head, k=3), 0).predict_batch(questions, orders, good)
    student = build(StudentConfig(encoder, head, "prediction", 3), 0)
    with pytest.raises(ValueError, match="decisions missing"):
        student.predict_batch(questions, orders)
    with pytest.raises(ValueError, match=r"'q1', order 4: decision 3"):
        student.predict_batch(questions, orders, good + 3 * (np.arange(12).reshape(2, 6) == 10))
    with pytest.raises(ValueError, match="float64"):
        student.predict_batch(questions, orders, good / 1)
    with pytest.raises(ValueError, match="'q0' has 3 options"):
        build(StudentConfig(encoder, head, k=4), 0).predict_batch(questions, all_orders(4))
    with pytest.raises(ValueError, match="permutations"):
        student.predict_batch(questions, np.zeros((6, 3), dtype=int), good)
    with pytest.raises(ValueError, match=r"orders of shape \(2, 2\)"):
        student.predict_batch(questions, all_orders(2), good)


@pytest.mark.parametrize(
    "head, auto",
    [
        ("joint", AutoModelForSequenceClassification),
        ("per_option", AutoModelForMultipleChoice),
        ("shared_prefix", AutoModelForTokenClassification),
        ("cross_option", AutoModelForTokenClassification),
        ("bi_encoder", AutoModel),
    ],
)
def test_a_saved_student_is_an_ordinary_checkpoint(encoder, tmp_path, head, auto):
    student = build(StudentConfig(encoder, head, k=3), 0)
    student.scale = 2.5 if head == "bi_encoder" else 1.0
    student.save(tmp_path / "s")
    plain = auto.from_pretrained(tmp_path / "s").state_dict()
    assert plain.keys() == student.model.state_dict().keys()
    assert all(torch.equal(value, plain[name]) for name, value in student.model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "s")
    assert tokenizer("yes", "no")["input_ids"] == student.tokenizer("yes", "no")["input_ids"]
    again = Student.from_pretrained(str(tmp_path / "s"))
    assert again.config == student.config and again.scale == student.scale
    p, q = (s.predict_batch(some_questions(), all_orders(3), autocast=False) for s in (student, again))
    assert np.allclose(p, q, atol=1e-6)  # some CPUs' float32 products depend on where in memory a matrix lies
    assert not list((tmp_path / "s").glob(".*"))


def test_a_half_saved_student_does_not_load(encoder, tmp_path, monkeypatch):
    build(StudentConfig(encoder, k=3), 0).save(tmp_path)
    real, moved = os.replace, []

    def killed_after_the_first_file(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_after_the_first_file)
        with pytest.raises(KeyboardInterrupt):
            build(StudentConfig(encoder, k=4), 1).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"permdistill\.json"):
        Student.from_pretrained(tmp_path)
    build(StudentConfig(encoder, k=4), 1).save(tmp_path)
    assert Student.from_pretrained(tmp_path).config.k == 4


def test_the_seed_decides_the_new_head_alone(encoder):
    a, b, c = (build(StudentConfig(encoder, k=3), seed).model for seed in (0, 0, 1))
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)
    assert torch.equal(a.bert.embeddings.word_embeddings.weight, c.bert.embeddings.word_embeddings.weight)
    assert a.dtype == torch.float32 and a.config.id2label == {0: "A", 1: "B", 2: "C"}


@pytest.mark.parametrize(
    "spoil, field",
    [
        (lambda s: s.pop("head"), "field 'head' is None"),
        (lambda s: s.pop("scale"), "field 'scale' is None"),
        (lambda s: s.update(scale=float("nan")), "field 'scale' is nan"),
        (lambda s: s.update(k="3"), "field 'k' is '3'"),
        (lambda s: s.update(k=True), "field 'k' is True"),
        (lambda s: s.update(inputs="guess"), "inputs 'guess'"),
        (lambda s: s.update(inputs="distribution"), "correction"),
        (lambda s: s.update(scale=2.5), "it is not what was saved"),
        (lambda s: s.update(max_length=32), "it is not what was saved"),
        (lambda s: s.update(sha512=s.pop("sha256")), "field 'sha512' is not known"),
        (lambda s: s["sha256"].pop("permdistill.json"), "permdistill.json"),
    ],
)
def test_a_damaged_description_is_refused_by_its_field(encoder, tmp_path, spoil, field):
    build(StudentConfig(encoder, "bi_encoder", "plain", 3, 64), 0).save(tmp_path)
    file = tmp_path / "permdistill.json"
    settings = json.loads(file.read_text())
    spoil(settings)
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"permdistill.json is damaged .*{re.escape(field)}"):
        Student.from_pretrained(tmp_path)
    for junk in ("", "[]", "[" * 5000, "\x00"):
        file.write_text(junk)
        with pytest.raises(ValueError, match="permdistill.json is damaged"):
            Student.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["classifier.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_a_student_that_lacks_weights_is_refused(encoder, tmp_path, lost):
    """They would be random."""
    build(StudentConfig(encoder, "per_option", "plain", 3, 64), 0).save(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if name != lost}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved"):
        Student.from_pretrained(tmp_path)
    without_hashes(tmp_path)
    with pytest.raises(ValueError, match=f"its weights lack {lost}"):
        Student.from_pretrained(tmp_path)


def without_hashes(folder: Path) -> None:
    """What version 0.1 saved."""
    file = folder / "permdistill.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "sha256"}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_student_whose_files_are_not_those_that_were_saved_is_refused(encoder, tmp_path, name):
    student = build(StudentConfig(encoder, "per_option", "plain", 3, 64), 0)
    student.save(tmp_path)
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is not what was saved: restore it"):
        Student.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(name)} is not what was saved: restore it"):
        Student.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(good)
    without_hashes(tmp_path)  # they have no hashes, and load as ever
    assert Student.from_pretrained(tmp_path).config == student.config
    (tmp_path / name).write_bytes(good[:40])
    with pytest.raises(ValueError, match="cannot be loaded .*: restore its files"):
        Student.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", ["joint", "per_option"])
def test_truncation_cuts_the_context_and_never_the_options(encoder, head):
    context, options = " ".join(["story"] * 60 + ["river"] * 40), ("cat cat cat", "dog dog dog", "bird bird bird")
    student = build(StudentConfig(encoder, head, "prediction", 3, max_length=40), 0)
    question = Question("q", context, "which is old ?", options)
    rows, index = student.encode([question], np.array([[[2, 0, 1]]]), np.array([[1]]))
    for row, text in zip(rows, student.head.texts(question, [2, 0, 1], 1), strict=True):
        assert len(row["input_ids"]) == len(row["token_type_ids"]) == 40
        first, second = (student.tokenizer.decode(row["input_ids"][row["token_type_ids"] == part]) for part in (0, 1))
        assert second.replace(" ", "").removesuffix("[SEP]") == text.second.replace(" ", "")
        assert first.replace(" ", "").endswith("whichisold?[SEP]")  # the question stays, after the beginning of the context
        assert first.count("story") == 40 - 3 - 4 - len(student.tokenizer.tokenize(text.second)) and "river" not in first
    # No context left to cut: the question loses its beginning.
    rows, _ = student.encode([Question("q", "", "it " * 50 + "old ?", options)], np.array([[[2, 0, 1]]]), np.array([[1]]))
    assert all("old ? [SEP]" in student.tokenizer.decode(row["input_ids"]) and len(row["input_ids"]) == 40 for row in rows)


@pytest.mark.parametrize("inputs", ["plain", "prediction"])
@pytest.mark.parametrize("head", HEADS)
def test_options_too_long_by_themselves_lose_their_ends_and_are_named(encoder, head, inputs):
    """PIQA has an option of 550 tokens: what no max_length has room for must not stop the other questions."""
    student = build(StudentConfig(encoder, head, inputs, 3, max_length=40), 0)
    long = Question("long", "story", "which ?", (" ".join(["cat"] * 200), "dog", "bird bird"))
    short = Question("short", "story", "which ?", ("cat", "dog", "bird"))
    decisions = np.array([[0], [0]]) if inputs == "prediction" else None
    orders = np.broadcast_to(np.arange(3), (2, 1, 3))
    with pytest.warns(UserWarning, match=r"1 of 2 questions have options that max_length 40 cuts off: 'long'"):
        rows, index = student.encode([short, long], orders, decisions)
    decoded = [student.tokenizer.decode(row["input_ids"]) for row in rows]
    whole = decoded[index[1, 0]] if head == "joint" else decoded[index[1, 0, 1 if head == "bi_encoder" else 0]]
    # Room is left for "(not chosen)", a token more than "(chosen)".
    assert 39 <= max(len(row["input_ids"]) for row in rows) <= 40 and whole.count("cat") > (10 if head == "joint" else 15)
    if head == "joint":
        assert "dog" in whole and "bird bird" in whole
    if inputs == "prediction":
        assert "Prediction : A" in whole if head == "joint" else "( chosen )" in whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone, at = student.encode([short], orders[:1], None if decisions is None else decisions[:1])
    for row, place in zip(alone, dict.fromkeys(index[0].ravel()), strict=True):
        assert row["input_ids"].tolist() == rows[place]["input_ids"].tolist()


def test_max_length_beyond_the_encoders_positions_is_refused(encoder):
    with pytest.raises(ValueError, match="max_length = 257.*256 positions"):
        build(StudentConfig(encoder, max_length=257), 0)


@pytest.mark.parametrize("head", HEADS)
def test_mpnet_has_no_segments_and_shifted_positions(encoder, tmp_path, head):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 34, "pad_token_id": 1}
    MPNetModel(MPNetConfig(**sizes)).save_pretrained(tmp_path)
    student = build(StudentConfig(str(tmp_path), head, k=3, max_length=32), 0)  # 34 positions, two of them reserved
    p = student.predict_batch(some_questions(context="story " * 50), all_orders(3), autocast=False)
    assert p.shape == (5, 6, 3) and p.sum(-1) == pytest.approx(1)
    with pytest.raises(ValueError, match="max_length = 33.*32 positions"):
        build(StudentConfig(str(tmp_path), head, k=3, max_length=33), 0)


def test_bfloat16_stays_near_float32(encoder):
    student = build(StudentConfig(encoder, "per_option", k=3), 0)
    p, q = (student.predict_batch(some_questions(), all_orders(3), autocast=on) for on in (True, False))
    assert 0 < np.abs(p - q).max() < 0.05


def test_encoder_key_follows_the_weights(encoder, tmp_path):
    other = make_encoder(tmp_path, dropout=0.5)  # the same weights under another name
    assert encoder_key(other) == encoder_key(encoder)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoder_key(other) != encoder_key(encoder)
    assert encoder_key("all-MiniLM-L6-v2").startswith("sha256:") and encoder_key("someone/encoder") == "hub:someone/encoder"
