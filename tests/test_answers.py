"""Final answers of longer replies: read where they are stated, and nothing else; a label that may start a word is none."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Next, serving

from permdistill.api import answers
from permdistill.api.answers import NO_ANSWER, TWO_ANSWERS, final_answer, plain, without_thoughts
from permdistill.api.ask import FIRST, ask
from permdistill.api.endpoint import Endpoint, EndpointError
from permdistill.api.jobs import (
    CUT,
    NO_OPTION,
    Job,
    calls_in_orders,
    drawn,
    drawn_calls,
    plan,
    read_answer,
    read_decision,
    unlisted,
)
from permdistill.api.replies import Replies, content_key
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question

LETTERS = TEMPLATES["letters"]
LABELS, ANIMALS = tuple("ABCD"), ("a cow", "an eagle", "A trout", "C. elegans")

# What people's models say to "Which animal can fly?", with what a careful reader would note: a label, or None for nothing.
# A reply of the second list states an answer that no rule reads; that is counted, below.
READ = [
    # English
    ("The answer is B.", "B"),
    ("The correct answer is B.", "B"),
    ("the answer is: B", "B"),
    ("Answer: B", "B"),
    ("ANSWER: (B)", "B"),
    ("Final answer: B. an eagle", "B"),
    ("The answer is option B.", "B"),
    ("The answer is (B) an eagle.", "B"),
    ("The correct option is B because eagles have wings.", "B"),
    ("The best choice is D", "D"),
    ("The answer to this question is C.", "C"),
    ("I think the answer is B: an eagle.", "B"),
    ("Cows walk, trout swim, worms crawl. Therefore, the answer is B.", "B"),
    ("The answer is therefore B", "B"),
    ("The answer is an eagle.", "B"),
    ("The answer is a trout.", "C"),
    ("The answer is C. elegans.", "D"),
    ("It is tempting to say the answer is A, but the answer is B.", "B"),
    ("At first the answer is A seems fine.\nThinking of wings, the answer is B.", "B"),
    ("If the answer is A, cows would have wings. The answer is B.", "B"),
    # A label or an option alone
    ("B", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("**B**", "B"),
    ("Eagles have wings.\n\nB", "B"),
    ("Eagles have wings, the others do not.\n\n**B.**", "B"),
    ("B. an eagle", "B"),
    ("B) An eagle.", "B"),
    ("an eagle", "B"),
    ("A trout", "C"),
    ("C. elegans", "D"),
    ("D. C. elegans", "D"),
    ("Wings are needed.\n\nAn eagle.", "B"),
    ("A", "A"),
    # LaTeX and markdown
    (r"\boxed{B}", "B"),
    (r"The final answer is $\boxed{B}$.", "B"),
    (r"$\boxed{\text{B}}$", "B"),
    (r"So we get \[\boxed{\textbf{(B)}}\]", "B"),
    (r"\boxed{\text{B. an eagle}}", "B"),
    (r"\boxed{an eagle}", "B"),
    (r"Both ways lead to \boxed{C}, so \boxed{C}.", "C"),
    (r"The answer is \(\mathbf{B}\).", "B"),
    ("### Answer: **B**", "B"),
    ("**Answer:** B) an eagle", "B"),
    ("The answer is **B. an eagle**.", "B"),
    ("- A cow walks\n- An eagle flies\n- A trout swims\n\n**Answer: B**", "B"),
    ("1. A cow: no wings\n2. An eagle: wings\n\nThe answer is `B`.", "B"),
    # Thoughts
    ("<think>The answer is A. No, wait.</think>\n\nB", "B"),
    ("So A or B?</think>The answer is B.", "B"),
    ("<think>\n\n</think>\n\nB", "B"),
    ("[THINK]Perhaps C[/THINK]Answer: B", "B"),
    ("<|channel|>analysis<|message|>A? No.<|end|><|channel|>final<|message|>B", "B"),
    ("<think>Cows? No.</think><answer>B</answer>", "B"),
    ("<answer>\nB) an eagle\n</answer>", "B"),
    ("Student answer: A. Correct answer: B. First of all, it has wings; the others are wrong.", "B"),
    ("In other words, the answer is B.", "B"),
    ("Your best choice is B.", "B"),
    ("So your answer is B.", "B"),
    ("Let's answer: B", "B"),
    ("Question 1's answer: B", "B"),
    ("Statement 2 is false, so the answer is B.", "B"),
    ("On the contrary, the answer is B.", "B"),
    ("The answer is B. The first option is incorrect because cows walk.", "B"),
    ("Answer: B\nExplanation: 'a cow' is incorrect.", "B"),
    ("The answer is B. The claim is not true for cows.", "B"),
    ("<answer>B</answer>\nHope this helps!", "B"),
    # Other languages
    ("Die Antwort ist B.", "B"),
    ("Die richtige Antwort lautet: B", "B"),
    ("Antwort: B, weil Adler Flügel haben.", "B"),
    ("La bonne réponse est la B.", "B"),
    ("Réponse : B", "B"),
    ("La respuesta correcta es la B.", "B"),
    ("Respuesta: B) an eagle", "B"),
    ("La risposta corretta è B.", "B"),
    ("A resposta correta é a letra B.", "B"),
    ("Het juiste antwoord is B.", "B"),
    ("Odpowiedź: B", "B"),
    ("Правильный ответ: B", "B"),
    ("答案是B。", "B"),
    ("正确答案：（B）", "B"),
    ("老鹰会飞，因此选B。", "B"),
    ("答えはBです。", "B"),
    ("정답은 B입니다.", "B"),
]
SILENT = [
    # Nothing is stated, or not one thing
    ("A trout swims, so it is B", None),
    ("A cow cannot fly.", None),
    ("C. elegans is a worm.", None),
    ("I cannot answer that.", None),
    ("I'm sorry, but I can't help with that.", None),
    ("N/A", None),
    ("Answer: N/A", None),
    ("", None),
    ("A or B", None),
    ("The answer is A or B.", None),
    ("The answer is A and C.", None),
    ("Answer: A, B", None),
    ("Answer: A/B", None),
    ("The answer is not A.", None),
    ("The answer isn't B.", None),
    ("I don't think the answer is B.", None),
    ("It is unlikely that the answer is B.", None),
    ("Many would say the answer is A.", None),
    ("Whether the answer is A depends.", None),
    ("Is the answer A?", None),
    ("The answer is A?", None),
    ("The answer is a bird.", None),
    ("The answer is A trout or a cow.", None),
    ("The answer is A. I mean, a trout? Hmm.", None),
    ("The answer is B. No, C.", None),
    ("The answer is B. Wait, cows can jump.", None),
    ("Answer: B\nOn reflection, A fits better.", None),
    ("答案不是B。", None),
    ("Die Antwort ist nicht B.", None),
    (r"\boxed{A} or \boxed{B}", None),
    (r"\boxed{2}", None),
    (r"The answer is A. \boxed{B}", None),
    ("The answer is A.\n\nB", None),
    ("Wrong options:\nA\nC\nD", None),
    ("Not correct:\nC", None),
    ("B\nNo, wait.\nC", None),
    ("A. a cow\nB. an eagle\nC. A trout\nD. C. elegans", None),
    ("The answer is B. a cow", None),
    ("The answer is B: A trout", None),
    ("Answer: B (wrong)", None),
    (r"It is not \boxed{B}", None),
    ("The answer is B if it must be a bird.", None),
    ("<think>The answer is B.", None),
    ("B <think>or is it", None),
    ("Answer: B\n\nQuestion: Which animal can swim?\nAnswer: C", None),
    ("La respuesta no es A.", None),
    ("La respuesta tampoco es A.", None),
    ("La respuesta nunca es A.", None),
    ("A resposta nem é A.", None),
    ("Antwort: A. Das ist falsch.", None),
    ("Respuesta: A. Eso es falso.", None),
    ("<answer>None</answer> A", None),
    ("La risposta non è A.", None),
    ("A resposta não é A.", None),
    ("It is false that the answer is A.", None),
    ("The opposite of the right answer is A.", None),
    ("Nobody believes that the answer is A.", None),
    ("My first guess was: The answer is A. Then I thought of an eagle.", None),
    ("A common answer is A.", None),
    ("One answer is A, another answer is B.", None),
    ("The user's answer is A, which cannot be.", None),
    ("The correct answer: B. The student's answer: A.", None),
    ("The answer is A. But that's incorrect, since cows can't fly. An eagle can.", None),
    ("The answer is A. This is false.", None),
    ("Answer: A. Just kidding, an eagle flies.", None),
    (r"\boxed{A} is incorrect", None),
    ("<answer>A</answer> or <answer>B</answer>", None),
    # A careful reader would take these; the rules do not.
    ("B. No, C.", "C"),
    ("B is the correct answer.", "B"),
    ("Option B is correct.", "B"),
    ("the answer is b", "B"),
    ("The answer is B. A trout swims, and a cow walks.", "B"),
    ("It must be the eagle.", "B"),
    ("I would pick B here", "B"),
    ("Doğru cevap B'dir.", "B"),
]


@pytest.mark.parametrize("reply, label", READ)
def test_a_stated_answer_is_read(reply, label):
    position, rule = final_answer(reply, LABELS, ANIMALS)
    assert position is not None, rule
    assert LABELS[position] == label and set(rule.split("+")) <= set(answers.RULES)


@pytest.mark.parametrize("reply, label", SILENT)
def test_nothing_is_guessed(reply, label):
    position, why = final_answer(reply, LABELS, ANIMALS)
    assert position is None and why in (NO_ANSWER, TWO_ANSWERS)


def test_precision_and_what_is_left_unread():
    said = [(LABELS[p] if (p := final_answer(reply, LABELS, ANIMALS)[0]) is not None else None, label)
            for reply, label in READ + SILENT]  # fmt: skip
    read = [(found, label) for found, label in said if found is not None]
    assert len(said) >= 100 and all(found == label for found, label in read)
    assert len(read) == len(READ) >= 60
    assert sum(found is None and label is not None for found, label in said) == 8  # of those that state something


@pytest.mark.parametrize(
    "rule, reply, position",
    [
        ("stated", "The answer is B.", 1),
        ("boxed", r"\boxed{C}", 2),
        ("label", "Wings.\nB", 1),
        ("option", "Wings.\nan eagle", 1),
        ("stated+boxed", r"The answer is \boxed{B}", 1),
        ("stated+label", "Answer: B\n\nB", 1),
    ],
)
def test_each_rule_alone(rule, reply, position):
    assert final_answer(reply, LABELS, ANIMALS) == (position, rule)
    for name, one in answers.RULES.items():
        found = one(plain(reply), answers.Shown(LABELS, ANIMALS))
        assert (found is not None) == (name in rule.split("+")), name
        assert found is None or found.positions == {position}


def test_what_may_be_a_label_and_an_option_is_nothing():
    """Blood groups, and numbers as labels of numbers."""
    groups = ("O", "AB", "A", "B")
    assert final_answer("The answer is A.", LABELS, groups) == (None, TWO_ANSWERS)
    assert final_answer("B", LABELS, groups) == (None, TWO_ANSWERS)
    assert final_answer("The answer is C.", LABELS, groups) == (2, "stated")
    assert final_answer("The answer is AB.", LABELS, groups) == (1, "stated")
    assert final_answer("A. O", LABELS, groups)[0] == 0
    numbers = tuple("123")
    assert final_answer(r"\boxed{2}", numbers, ("2", "5", "7")) == (None, TWO_ANSWERS)
    assert final_answer(r"\boxed{5}", numbers, ("2", "5", "7")) == (1, "boxed")
    assert final_answer("The answer is 2.5", numbers, ("2.5", "5", "7")) == (0, "stated")
    assert final_answer("Answer: 3", numbers, ("x", "y", "z")) == (2, "stated")


def test_thoughts_are_dropped():
    assert without_thoughts("<think>A</think> B") == "B" and without_thoughts("A</think>B") == "B"
    assert without_thoughts("<Thinking>A</Thinking>\nB") == "B" and without_thoughts("x <think> y") == ""


@pytest.mark.parametrize("again", ["answer: ", r"\boxed{A}", "a cow\n", "故\n"])
def test_a_megabyte_without_end_holds_nobody_up(again):
    """A body may be so long; what is read of it takes seconds at most, where it took hours."""
    started = time.process_time()
    final_answer("答案" + again * (10**6 // len(again)) + "\na cow", LABELS, ANIMALS)
    assert final_answer(again * (10**6 // len(again)) + "\n.\nAnswer: B.", LABELS, ANIMALS)[0] in (1, None)
    assert time.process_time() - started < 8


def test_a_cut_reply_has_no_final_answer():
    said = {"message": {"content": "The answer is B."}}
    assert read_answer(said | {"finish_reason": "stop"}, LABELS, ANIMALS) == {"position": 1, "rule": "stated"}
    for reason in ("length", None, "content_filter"):
        assert read_answer(said | {"finish_reason": reason}, LABELS, ANIMALS) == {"failed": CUT}
    assert read_answer(said | {"finish_reason": "stop", "stop_reason": "\n"}, LABELS, ANIMALS) == {"failed": CUT}
    assert read_answer({"message": {"content": None}, "finish_reason": "stop"}, LABELS, ANIMALS) == {"failed": NO_ANSWER}


# --------------------------------------------------------------------------------------------------------------------
# One token or a few: a label that may be the start of a word

NOUNS = st.sampled_from(["trout", "elegans", "coli", "Lincoln", "J. Smith", "cell", "-1", "'s ally", "B"])
OPTIONS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([" ", ". "]), NOUNS).map("".join), min_size=4, max_size=4, unique=True
)
TAILS = st.sampled_from([" swims, so it is B", " is no answer, C is", ", and so D", " swims.\n\nB is it", ""])
ENDS = st.sampled_from(["stop", "length", None, "content_filter"])


def pieces(text: str, cut: int) -> str:
    """The first ``cut`` tokens: labels, words and marks."""
    import re

    return "".join(re.findall(r"\s*\w+|\s*[^\w\s]", text)[:cut])


@given(OPTIONS, st.integers(0, 3), TAILS, st.integers(1, 8), ENDS, st.sampled_from(["", "The answer is ", "**"]))
def test_a_reply_that_begins_with_an_option_is_never_its_first_letter(options, which, tail, cut, reason, before):
    """ "A trout swims, so it is B" is no A, in either mode, wherever the server cuts it."""
    whole = before + options[which] + tail
    said = pieces(whole, cut)
    if reason == "stop":  # a server says so of a whole reply only
        said = whole
    choice = {"message": {"content": said}, "finish_reason": reason}
    first = LABELS.index(options[which][0])
    for read in (read_decision, read_answer):
        position = read(choice, LABELS, options).get("position")
        assert position is None or position == which or (position == first and options[first] == options[which][3:]), said


@pytest.mark.parametrize(
    "said, reason, position",
    [("A", "stop", 0), ("A", "length", CUT), ("A.", "length", CUT), ("A. a", "length", 0), ("A. a cow", "length", 0)]
    + [("(B) an eagle", "stop", 1), ("B: eagles", "stop", NO_OPTION), ("A trout", "length", NO_OPTION), ("A.", "stop", 0)]
    + [("C. elegans", "length", NO_OPTION), ("A. co", "length", NO_OPTION), ("B\nan ea", "length", 1)]
    + [("A, a", "length", NO_OPTION), ("D. C. elegans", "stop", 3), ("A", None, CUT), ("A. a trout", "stop", NO_OPTION)],
)  # fmt: skip
def test_a_decision_is_a_label_that_ends_or_is_followed_by_its_option(said, reason, position):
    expected = {"position": position} if isinstance(position, int) else {"failed": position}
    assert read_decision({"message": {"content": said}, "finish_reason": reason}, LABELS, ANIMALS) == expected


# --------------------------------------------------------------------------------------------------------------------
# Over HTTP


def make_questions(n: int) -> list[Question]:
    return [Question(f"q{i}", "", f"Which animal can fly, {i}?", ("a cow", "an eagle", "a trout")) for i in range(n)]


def eagle(chat) -> str:
    """The label of the eagle, as the last message shows it."""
    (line,) = [line for line in chat[0]["content"].splitlines() if line.endswith("an eagle")]
    return line[0]


def prose(chat) -> str:
    return f"A trout swims, so it is {eagle(chat)}"


@pytest.mark.parametrize("settings", [{}, {"reply_tokens": 2}, {"reply_tokens": 40}, {"extra_body": {"max_tokens": 1}}])
@pytest.mark.parametrize("mode", ["decisions", "answer"])
def test_prose_is_never_recorded_and_stops_the_run_early(mode, settings, tmp_path):
    with serving(prose) as server:
        job = Job(Endpoint(server.url, "m", **settings), LETTERS, drawn_calls(make_questions(30), 4), mode, tries=2)
        with pytest.raises(EndpointError, match=rf"the first {FIRST} replies name no option .*they begin .*A"):
            ask(job, Replies(tmp_path), concurrency=1)
        assert server.answered.total() == FIRST
    assert (drawn(job, Replies(tmp_path), partial=True).decisions == -1).all()
    with pytest.raises(ValueError, match="extra_body has 'stop'"):
        Job(Endpoint("http://127.0.0.1:1/v1", "m", extra_body={"stop": [" "]}), LETTERS, [], mode)


def test_answers_of_a_model_that_thinks_first(tmp_path):
    """Planned, cut here and there, killed by a limit, gone on with, and each reply's rule in the store."""
    said = [
        "<think>Cows? No. {}?</think>\n\n{}",
        "Wings. The answer is {}.",
        r"So \boxed{{{}}}",
        "an eagle",
        "I'm sorry, but I can't say.",
    ]
    said += [*said[:4], "Either {} or a trout.", "Either A or B."]  # a refusal, and two at once

    def think(chat) -> str:
        number = int(chat[0]["content"].split("fly, ")[1].split("?")[0])
        return said[number].format(*[eagle(chat)] * 2)

    questions = make_questions(11)
    with serving(think) as server:
        endpoint = Endpoint(server.url, "m", reply_tokens=30, reasoning_effort="low", extra_body={"top_k": 0})
        job = Job(endpoint, LETTERS, drawn_calls(questions, 3), "answer", tries=2)
        assert endpoint.request("answer") == endpoint.sampling("answer") == {
            "max_tokens": 30, "temperature": 1.0, "top_p": 1.0, "reasoning_effort": "low", "top_k": 0
        }  # fmt: skip
        first = plan(job, Replies(tmp_path))
        assert (first.calls, first.completion_tokens, first.mass) == (33, 990, None)
        from permdistill.api.endpoint import Limits

        stopped = ask(job, Replies(tmp_path), Limits(calls=10))
        assert stopped.stopped and stopped.calls == 10
        report = ask(job, Replies(tmp_path))
    assert report.complete == 8 and report.failed == {f"{NO_ANSWER} in 2 replies": ["q4", "q9", "q10"]}
    total = Counter[str](stopped.read) + report.read
    assert total == {"label": 6, "stated": 6, "boxed": 6, "option": 6, NO_ANSWER: 18}
    found = drawn(job, Replies(tmp_path))
    positions = {i: set(own) for i, own in enumerate(found.decisions.tolist())}
    assert positions == {i: {-1} if i in (4, 9, 10) else {1} for i in range(11)}
    rules = Counter(row["rule"] for key in _keys(job) if "rule" in (row := Replies(tmp_path).get(key) or {}))
    assert rules == {"label": 6, "stated": 6, "boxed": 6, "option": 6}
    assert "read" in str(report) and "label mass" in str(report)
    assert plan(job, Replies(tmp_path)).mass == pytest.approx(24 / 42)


def test_records_of_stated_answers_measure(tmp_path):
    import json

    from permdistill import cli
    from permdistill.measure.report import measure

    rows = [{"id": q.id, "question": q.question, "options": q.options, "answer": 1} for q in make_questions(4)]
    path, records = tmp_path / "mine.jsonl", tmp_path / "said.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def think(chat) -> str:
        return (
            "I can't say."
            if "fly, 0" in chat[0]["content"]
            else f"<think>Cows? No.</think>Wings. The answer is {eagle(chat)}."
        )

    with serving(think) as server:
        command = [
            "ask",
            "--base-url",
            server.url,
            "--model",
            "m",
            "--questions",
            str(path),
            "--mode",
            "answer",
            "--draws",
            "6",
        ]
        with pytest.raises(SystemExit, match="1 items are incomplete"):
            cli.main([*command, "--tries", "1", "--replies", str(tmp_path / "replies"), "--records", str(records)])
    report = measure(records, path)
    found = {line.name: line.interval.value for line in report.lines}
    assert report.records.hard.all() and len(report.records.k) == 24 and report.tally.failed.sum() == 6
    assert found["failed"] == 0.25 and found["accuracy"] == 0.75 and found["flip rate"] == found["ps (TV)"] == 0


def _keys(job: Job) -> list[str]:
    return [key for call in job.calls for key in job.keys(call)]


def test_a_cut_thought_is_counted_as_cut(tmp_path):
    with serving(lambda chat: "<think>" + "so " * 50) as server:
        job = Job(Endpoint(server.url, "m", reply_tokens=20), LETTERS, drawn_calls(make_questions(2), 2), "answer", tries=1)
        report = ask(job, Replies(tmp_path))
    assert report.failed == {f"{CUT} in 1 reply": ["q0", "q1"]} and report.read == {CUT: 4}
    assert report.completion_tokens == 80


def test_keys_change_with_what_is_set_only():
    plainly = Endpoint("http://127.0.0.1:1/v1", "m")
    question = make_questions(1)
    keys = [
        Job(endpoint, LETTERS, drawn_calls(question, 1), mode).identity(drawn_calls(question, 1)[0])
        for mode in ("decisions", "answer")
        for endpoint in (
            plainly,
            Endpoint("http://127.0.0.1:1/v1", "m", reply_tokens=9),
            Endpoint("http://127.0.0.1:1/v1", "m", reasoning_effort="low"),
        )
    ]
    assert len(set(keys)) == 6
    assert plainly.sampling("decisions") == {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}  # as it ever was
    assert plainly.request("decisions")["max_tokens"] == 4
    with pytest.raises(ValueError, match="reply_tokens = 1: give at least 2"):
        Endpoint("http://127.0.0.1:1/v1", "m", reply_tokens=1)


def test_decisions_that_version_01_read_by_their_first_token_are_asked_again(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    (call,) = drawn_calls(make_questions(1), 1)
    old = content_key(call.question, call.order, LETTERS, endpoint.model_key, endpoint.sampling("decisions"), 0, 0)
    kept = {"key": old, "attempt": "a", "reply": "r", "tokens": [9, 1], "position": 0}
    store = Replies(tmp_path)
    store.append({"attempt": "a", "bound": [90, 1]}, kept)
    job = Job(endpoint, LETTERS, [call])
    assert old in store and job.found(store, call)[0] is None and list(job.todo(store).values()) == [call]
    # A limit of one's own came with the new reader: nothing is paid again.
    longer = Job(Endpoint("http://127.0.0.1:1/v1", "m", reply_tokens=9), LETTERS, [call])
    own = longer.endpoint.sampling("decisions")
    assert longer.identity(call) == content_key(call.question, call.order, LETTERS, endpoint.model_key, own, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities: forms of a label


def test_the_bound_counts_every_form_that_is_not_listed():
    """The least of the top tokens is the most that others may have, the drawn one's may be less."""
    top = [{"token": token, "logprob": value} for token, value in ((" A", -0.1), ("B", -3.0), ("a", -4.0), ("The", -5.0))]
    choice = {"logprobs": {"content": [{"token": "C", "logprob": -9.0, "top_logprobs": top}]}}
    (call,) = drawn_calls(make_questions(1), 1)
    job = Job(Endpoint("http://127.0.0.1:1/v1", "m"), LETTERS, [call], "logprobs")
    row = job.read(choice, call)
    assert row["floor"] == -5.0 and row["listed"] == [2, 0, 0]

    def bound(n: int, mass: float) -> float:
        absent = min(n * math.exp(-5), 1 - mass)  # no more than what is listed leaves
        return absent / (mass + absent)

    mass = sum(map(math.exp, (-3, -9)))
    every = mass + math.exp(-0.1) + math.exp(-4)
    assert unlisted(job, row) == pytest.approx(bound(2 + 3 + 3, every))
    exact = Job(job.endpoint, LETTERS, [call], "logprobs", variants=False)
    assert unlisted(exact, row) == pytest.approx(bound(1, mass))
    del row["listed"]  # as it was stored before: at least one other form of A was there
    assert unlisted(job, row) == pytest.approx(bound(3 + 3 + 3, every))


def listed(probabilities: dict[str, float]):
    import numpy as np

    return lambda chat: Next(list(probabilities).__getitem__, np.log(list(probabilities.values())), 9)


def test_forms_of_a_label_are_summed_and_their_mass_is_shown(tmp_path):
    """ " A" of 95% beside "B" of 4% is an A; each reading is made of the same replies."""
    import numpy as np

    from permdistill.api.jobs import probabilities

    with serving(listed({" A": 0.90, "a": 0.05, "B": 0.04, "The": 0.01})) as server:
        job = Job(Endpoint(server.url, "m"), LETTERS, calls_in_orders(make_questions(1)[:1]), "logprobs")
        report = ask(job, Replies(tmp_path))
        paid = server.answered.total()
        exact = Job(job.endpoint, LETTERS, job.calls, "logprobs", variants=False)
        assert ask(exact, Replies(tmp_path)).calls == 0 and server.answered.total() == paid
    P, worst = probabilities(job, Replies(tmp_path))
    by_position = P[0][np.arange(6), [call.order[0] for call in job.calls]]
    assert by_position == pytest.approx(0.95 / 0.99) and report.mass == pytest.approx(0.99)
    # 1% each in two more forms of A, three of B and all four of C, but together no more than the 1% that is left.
    assert worst == report.bound == pytest.approx(0.01)
    assert "label mass        0.99; unlisted forms of labels may have 1.0% of a distribution" in str(report)
    alone, _ = probabilities(exact, Replies(tmp_path))
    assert alone[0][np.arange(6), [call.order[1] for call in job.calls]] == pytest.approx(1)  # B gets everything
    assert "label mass of the replies in the store 0.04; the model wants to say something else" in str(
        plan(exact, Replies(tmp_path))
    )


def test_labels_that_are_listed_in_other_forms_only(tmp_path):
    with serving(listed({" A": 0.6, " B": 0.3, " C": 0.05, "The": 0.05})) as server:
        job = Job(Endpoint(server.url, "m"), LETTERS, calls_in_orders(make_questions(1)), "logprobs")
        assert ask(job, Replies(tmp_path)).complete == 1
        exact = Job(job.endpoint, LETTERS, job.calls, "logprobs", variants=False)
        report = ask(exact, Replies(tmp_path))
    assert report.calls == 0 and report.failed == {"no label among the top logprobs in 1 reply": ["q0"]}
    assert job.record(Replies(tmp_path), job.calls[0])["probabilities"] == pytest.approx([0.6, 0.3, 0.05])
    assert exact.record(Replies(tmp_path), job.calls[0])["decision"] is None  # failed for good


def test_the_command_reads_answers_and_shows_what_it_asks(tmp_path, capsys):
    import json

    from permdistill import cli

    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps({"id": q.id, "question": q.question, "options": q.options}) for q in make_questions(3))
    )
    with serving(lambda chat: f"Wings.\n\nAnswer: {eagle(chat)}") as server:
        command = ["ask", "--base-url", server.url, "--model", "m", "--questions", str(tmp_path / "mine.jsonl")]
        command += ["--replies", str(tmp_path / "replies"), "--mode", "answer", "--draws", "2", "--max-reply-tokens", "50"]
        cli.main([*command, "--dry-run"])
        assert "6 calls: 0 in the store, 6 to make" in (out := capsys.readouterr().out) and " 300 completion tokens" in out
        cli.main([*command, "--records", str(tmp_path / "said.jsonl")])
        assert "read              stated 6" in capsys.readouterr().out
        cli.main([*command, "--dry-run", "--reasoning-effort", "low"])
        assert "6 to make" in capsys.readouterr().out  # another key
        cli.main([*command, "--dry-run"])
        assert "0 to make" in (out := capsys.readouterr().out) and "label mass of the replies in the store 1.00" in out
    assert {json.loads(line)["decision"] for line in (tmp_path / "said.jsonl").read_text().splitlines()} == {1}
