"""The explorer and the report: pages that load nothing, right to the digit, in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from html import escape, unescape

import nbformat
import numpy as np
import pytest
from nbformat import v4
from test_experiments import planted
from test_records import FOUR, judge, records_of, write

import permdistill
from permdistill import cli, debias
from permdistill.measure import evaluate, metrics
from permdistill.measure.document import DEFINITIONS, document, light
from permdistill.measure.explore import explore
from permdistill.measure.page import UNIT, embedded
from permdistill.measure.report import HEADLINE, measure
from permdistill.orders import LETTERS, all_orders, cyclic_orders, to_positions
from permdistill.paper import experiments
from permdistill.paper import site as pages
from permdistill.paper.tasks import TASKS
from permdistill.questions import Question

NASTY = "</script><script>document.title = 'taken'</script><!-- \u2028 & \"quoted\" 'and' {{data}}"


def questions_of(n: int, k: int, gold: bool = True) -> list[Question]:
    return [
        Question(
            f"q{i}",
            "a passage" if i % 2 else "",
            f"question {i}?",
            tuple(f"text {i}.{o}" for o in range(k)),
            i % k if gold else None,
        )
        for i in range(n)
    ]


def leaning(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Scores (item, order, option) of a judge that knows a little and prefers the first position."""
    rng, orders = np.random.default_rng(seed), all_orders(k)
    by_position = rng.dirichlet([3.0, *[1.0] * (k - 1)], size=(n, len(orders)))
    return np.take_along_axis(by_position, np.argsort(orders, axis=1)[None], axis=2)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


# --------------------------------------------------------------------------------------------------------------------
# Without a browser


def test_json_inside_a_script_is_the_same_data_and_ends_nothing():
    data = {"a": NASTY, "b": ["\ud800", 1.5, None]}
    text = embedded(data)
    assert json.loads(text) == data and not re.search("[<\u2028\u2029]", text)
    with pytest.raises(ValueError):
        embedded(float("nan"))


def test_the_package_is_light_until_the_explorer_is_asked_for():
    code = """
import permdistill, sys
assert not {'numpy', 'torch'} & set(sys.modules)
assert permdistill.explore and 'torch' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert permdistill.explore is explore


def test_explorers_numbers_are_those_of_the_metrics():
    P, questions = leaning(12, 3), questions_of(12, 3)
    page = data_of(explore(P, questions=questions).page)
    items = page["items"]
    assert np.array([item["p"] for item in items]).reshape(P.shape) / UNIT == pytest.approx(P, abs=0.5 / UNIT)
    assert [item["ps"] for item in items] == pytest.approx(metrics.permutation_sensitivity(P))
    answers = [q.answer for q in questions]
    assert [item["right"] for item in items] == pytest.approx(metrics.accuracy(P, answers))
    mean = debias.permutation_average(P)[:, None]
    assert [item["average"] for item in items] == pytest.approx(metrics.accuracy(mean, answers))
    seats = to_positions(debias.decide(P), all_orders(3)).sum(axis=1)
    for item, own, seat in zip(items, P, seats, strict=True):
        assert item["winners"] == len(set(own.argmax(axis=1)))
        assert item["wins"] == [1 << o for o in own.argmax(axis=1)]
        assert item["lean"] == (seat.argmax() if (seat == seat.max()).sum() == 1 else -1)


def test_a_notebook_that_is_not_trusted_keeps_a_line():
    explorer = explore(leaning(3, 3), questions=questions_of(3, 3), note="Licence: own & free")
    line, frame = re.fullmatch(r'<p>(.*)</p>(<iframe .* srcdoc="[^"<>]*".*></iframe>)', explorer._repr_html_()).groups()
    assert line.startswith("3 questions of 3 options, each in 6 orders.") and 'sandbox="allow-scripts"' in frame
    assert unescape(re.search('srcdoc="([^"]*)"', frame)[1]) == explorer.page
    assert data_of(explorer.page)["note"] == "Licence: own & free" and "3 questions" in repr(explorer)


def test_explorer_takes_the_papers_scores_and_refuses_what_does_not_fit():
    scored = planted("one", n=5)
    page = data_of(explore(scored, {"free": scored.P.mean(axis=1)}).page)
    assert [item["task"] for item in page["items"]] == ["one"] * 5 and page["students"] == ["free"]
    bad = partial(pytest.raises, ValueError)
    with bad(match="0 questions"):
        explore(leaning(3, 3))
    with bad(match="2 questions: give"):
        explore(leaning(3, 3), questions=questions_of(2, 3))
    with bad(match="scores of 3 options: 'q0' and 1 more"):
        explore(leaning(2, 3), questions=questions_of(2, 4))
    with bad(match="student 'small'"):
        explore(scored, {"small": scored.P[:2]})
    with bad(match="orders of shape"):
        explore(leaning(3, 3), questions=questions_of(3, 3), orders=cyclic_orders(3))


def test_six_rows_and_the_rest_with_all(tmp_path, capsys):
    path = str(write(tmp_path / "j.jsonl", judge(60, 0.5, 0.1, 0.05)))
    cli.main(["measure", path])
    first, second, third, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("This judge prefers the first answer") and second.startswith("Another order changes")
    assert third.startswith("Averaging the orders")
    assert [re.split("  +", row)[0] for row in rows] == [line.name for line in measure(path).lines if line.name in HEADLINE]
    assert len(rows) == 6
    cli.main(["measure", path, "--all"])
    shown = capsys.readouterr().out
    assert all(f"\n{line.name} " in shown for line in measure(path).lines)


def test_gain_is_that_of_the_verdicts_averaged(tmp_path):
    P = leaning(40, 3)
    records = [r | {"answer": int(r["id"][1:]) % 3} for r in records_of(P, all_orders(3))]
    answers = np.arange(40) % 3
    gain = metrics.accuracy(P.mean(axis=1, keepdims=True), answers) - metrics.accuracy(P, answers)
    assert measure(write(tmp_path / "r.jsonl", records)).gain.value == pytest.approx(gain.mean())
    assert np.isnan(measure(write(tmp_path / "f.jsonl", FOUR)).gain.value)


def test_the_light_is_in_words(tmp_path):
    def of(records):
        return light(measure(write(tmp_path / "x.jsonl", records)))

    assert of(judge(300, 0.0)).startswith("Green") and of(judge(300, 0.8)).startswith("Red")
    assert of(judge(300, 0.25)).startswith("Amber") and of(judge(20, 0.4)[::2]).startswith("No light")


def test_six_debiasers_cheapest_first_the_average_among_them(tmp_path):
    page = document(measure(write(tmp_path / "r.jsonl", records_of(leaning(12, 4), all_orders(4)))))
    shown = page.split("What debiasing buys")[1].split("</table>")[0]
    names = re.findall('<th scope="row">(.*?)</th><td>([^<]*)</td>', shown)
    assert len(names) == 6 and names[0] == (debias.BIASED, "1") and (debias.DEBIASED, "24") == names[-1]
    assert [float(calls) for _, calls in names] == sorted(float(calls) for _, calls in names)


def test_every_measure_has_a_definition(tmp_path):
    names = {metric.title for metric in evaluate.EVERY.values()}
    path = write(tmp_path / "j.jsonl", judge(60, 0.5, 0.1, 0.05))
    again = [r | {"draw": 1} for r in judge(60, 0.5, seed=1)]
    names |= {line.name for line in measure([path, write(tmp_path / "again.jsonl", again)]).lines}
    assert "repeats that differ" in names
    assert not names - set(DEFINITIONS)
    page = document(measure(path))
    assert (
        all(text.endswith(".") and text.count(". ") <= 1 for text in DEFINITIONS.values())
        and escape(DEFINITIONS["PPA"]) in page
    )


SIX = records_of(leaning(3, 6), all_orders(6))  # 720 orders: as many items as fit
LONG = [
    {"id": f"{NASTY}{i}" * 40, "order": list(range(9)), "decision": i % 9, "draw": j} for i in range(40) for j in range(3)
]
MANY = [
    {"id": f"{k}-{i}", "order": order, "decision": i % k}
    for k in (2, 3, 5, 8)
    for i in range(4)
    for order in cyclic_orders(k).tolist()
]
TIED = [*judge(5, 0.5), *({"id": "t", "order": order, "decision": "tie"} for order in cyclic_orders(3).tolist())]
ALONE, FAILING = judge(30, 0.5)[::2], [r | {"decision": None} for r in judge(9, 0.5)[:2]] + judge(9, 0.5)[2:]


@pytest.mark.parametrize(
    "records",
    [SIX, LONG, MANY, ALONE, FAILING, TIED],
    ids=["six options", "long", "many K", "one order", "failing", "some K tied"],
)
def test_reports_of_odd_records(tmp_path, records):
    page = document(measure(write(tmp_path / "odd.jsonl", records)), [tmp_path / "odd.jsonl"])
    assert len(page.encode()) < 500_000 and page.count("</script>") == 3
    assert "nan" not in page.replace("nance", "") and data_of(page)["labels"] == list(LETTERS)
    assert "beforeprint" in page and "#grids details:not([open])" not in page  # paper shows all items


def test_a_file_whose_name_is_no_utf8_has_a_report_too(tmp_path):
    path = write(tmp_path / os.fsdecode(b"odd\xff<b>.jsonl"), judge(6, 0.5))
    cli.main(["measure", str(path), "--html", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "odd\\udcff&lt;b&gt;.jsonl" in page and "<b>.jsonl" not in page


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The static pages of one executed notebook with a formula, a table and an untold number of dollars."""
    out = v4.new_output(
        "execute_result", {"text/html": "<table class='dataframe'><tr><td>68.3</td></tr></table>"}, execution_count=1
    )
    text = "# 1. A title\n\n**Question.** Does $x_k$\nmatter?\n\nIt costs `$5` or $6."
    cells = [v4.new_markdown_cell(text), v4.new_code_cell("table", outputs=[out], execution_count=1)]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), str(tmp_path / "notebooks" / "01_one.ipynb"))
    monkeypatch.setattr(experiments, "read_scores", lambda *a, n: planted("arc_easy", n=n))
    return pages.write(tmp_path).parent


def test_site_is_static_pages_with_an_index(site, tmp_path):
    index, page = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "01_one"))
    links = re.findall('<a href="([^"]+)">', index)
    assert links == ["01_one.html", "explore.html", "report.html"] and all((site / link).exists() for link in links)
    assert "1. A title</a>" in index and "Does x_k matter?" in index
    assert "<msub><mi>x</mi><mi>k</mi></msub>" in page and "$6." in page and "68.3" in page
    assert f"{TASKS['arc_easy'].licence}." in (site / "explore.html").read_text(encoding="utf-8")
    assert not [
        found for path in site.iterdir() for found in re.findall('(?:src|href)="(http[^"]*)"', path.read_text("utf-8"))
    ]
    with pytest.raises(FileNotFoundError, match="run make paper"):
        pages.write(tmp_path / "nothing")


# --------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def opened(browser, tmp_path):
    """Opens HTML as a file in a browser without network; what it asks for from elsewhere, or fails at, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    asked, failed = [], []
    context.on("request", lambda request: asked.append(request.url))

    def open_page(html: str):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        page = context.new_page()
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert not failed and [url for url in asked if not url.startswith(("file:", "about:", "data:"))] == []


SHOWN = "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => [Number(cell.dataset.p), cell.innerText]))"


def windows(P: np.ndarray, sequence: list[int], n: int) -> np.ndarray:
    """Mean over each order and the n - 1 after it in ``sequence``, (order, option)."""
    start = np.argsort(sequence)
    turned = [np.take(sequence, range(s, s + n), mode="wrap") for s in start]
    return np.stack([P[own].mean(axis=0) for own in turned])


def test_explorer_shows_what_numpy_says(opened):
    P, questions = leaning(9, 4), questions_of(9, 4)
    student = leaning(9, 4, seed=5)
    page = opened(explore(P, {"student": student, "free": student.mean(axis=1)}, questions=questions).page)
    orders = all_orders(4)
    by_ps = np.argsort(-metrics.permutation_sensitivity(P), kind="stable")
    assert page.locator("#list li").count() == 9 and page.locator("#question").inner_text() == questions[by_ps[0]].question
    for place in (0, 4, 8):
        i = int(by_ps[place])
        page.locator("#list li").nth(place).click()
        for view, expected in (("position", to_positions(P, orders)[i]), ("option", P[i])):
            page.click(f'[data-view="{view}"]')
            cells = page.eval_on_selector_all("#grid tbody tr", SHOWN)
            assert np.array([[p for p, _ in row] for row in cells]) == pytest.approx(expected, abs=1e-5)
            for row, order, own in zip(cells, orders, P[i], strict=True):
                for c, (p, text) in enumerate(row):
                    o = order[c] if view == "position" else c
                    tag = str(o + 1) if view == "position" else LETTERS[list(order).index(o)]
                    assert text.split()[0] == tag and abs(float(re.search(r"([\d.]+)%", text)[1]) - 100 * p) <= 0.51
                    assert ("✓" in text) == (o == questions[i].answer) and (", wins" in text) == (own.argmax() == o)
    assert page.locator("#grid tbody tr").count() == 24 and page.locator('[aria-selected="true"]').count() == 1
    # The bars, of the order that is picked, and with the slider.
    i, j, n = int(by_ps[8]), 7, 5
    sequence = data_of(page.content())["sets"][0]["sequence"]
    page.click(f'[data-row="{j}"]')
    page.locator("#n").fill(str(n))
    rows = page.eval_on_selector_all("#bars tbody tr", SHOWN)
    averaged = windows(P[i], sequence, n)
    expected = [
        P[i, j],
        debias.prior_matching(P, orders)[i, j],
        averaged[j],
        P[i].mean(axis=0),
        student[i, j],
        student[i].mean(axis=0),
    ]
    assert np.array([[p for p, _ in row] for row in rows]) == pytest.approx(np.array(expected), abs=2e-5)
    said = page.locator("#answer").inner_text()
    ps = 100 * metrics.permutation_sensitivity(averaged[None])[0]
    assert abs(float(re.match(r"ps ([\d.]+);", said)[1]) - ps) <= 0.06 and f"answer {averaged[j].argmax() + 1} (text" in said
    assert said.endswith("right" if averaged[j].argmax() == questions[i].answer else "wrong")
    page.locator("#n").fill("24")
    assert (
        page.locator("#answer").inner_text().startswith("ps 0.0;")
        and page.locator("#many").inner_text() == "24 of 24 orders"
    )


def test_explorer_is_worked_from_the_keyboard(opened):
    P, questions = leaning(9, 3), questions_of(9, 3)
    page = opened(explore(P, questions=questions, tasks=["even", "odd"] * 4 + ["even"]).page)
    chosen = page.locator('#list [aria-selected="true"]')
    page.focus("#sort")
    for _ in range(3):  # task, text, list
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "list"
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 8), ("Home", 0)):
        page.keyboard.press(key)
        item = page.locator("#list li").nth(place)
        assert (
            chosen.get_attribute("id")
            == item.get_attribute("id")
            == page.locator("#list").get_attribute("aria-activedescendant")
        )
        assert page.locator("#question").inner_text() == item.locator(".ask").inner_text()
    page.focus('#grid [tabindex="0"]')
    page.keyboard.press("ArrowDown")
    assert (
        page.evaluate("document.activeElement.dataset.row")
        == "1"
        == page.locator('#grid [aria-pressed="true"]').get_attribute("data-row")
    )
    page.focus("#n")
    page.keyboard.press("ArrowRight")
    assert page.locator("#n").get_attribute("aria-valuetext") == "2 of 6 orders"
    # Filters and sort keys.
    lean = np.array([item["lean"] for item in data_of(page.content())["items"]])
    page.focus('[data-lean="0"]')
    page.keyboard.press("Enter")
    assert page.locator("#list li").count() == (lean == 0).sum() > 0
    assert page.locator("#found").inner_text() == f"{(lean == 0).sum()} of 9 questions"
    page.keyboard.press("Enter")
    page.select_option("#task", "odd")
    assert page.locator("#list li").count() == 4
    page.select_option("#task", "")
    page.fill("#text", "TEXT 5.1")
    assert page.locator("#list .ask").all_inner_texts() == ["question 5?"]
    page.fill("#text", "nothing like it")
    assert page.locator("#list li").count() == 0
    page.fill("#text", "")
    page.select_option("#sort", "number of different winners")
    winners = np.array([len(set(own.argmax(axis=1))) for own in P])
    shown = [int(text.split("?")[0].split()[1]) for text in page.locator("#list .ask").all_inner_texts()]
    assert (np.diff(winners[shown]) <= 0).all()
    page.select_option("#sort", "biased wrong, average right")
    answers = [q.answer for q in questions]
    gain = metrics.accuracy(P.mean(axis=1, keepdims=True), answers) - metrics.accuracy(P, answers)
    shown = [int(text.split("?")[0].split()[1]) for text in page.locator("#list .ask").all_inner_texts()]
    assert (np.diff(gain[shown]) <= 1e-9).all() and gain[shown[0]] > 0


def test_explorer_has_names_for_those_who_listen_and_fits_a_telephone(opened):
    page = opened(explore(leaning(4, 4), questions=questions_of(4, 4, gold=False), title=NASTY).page)
    assert page.title() == NASTY.replace("\u2028", "\u2028") != "taken" and page.locator("#sort option").count() == 3
    tree = page.locator("body").aria_snapshot()
    for part in (
        "listbox",
        "option",
        "slider",
        "table",
        'columnheader "position A"',
        'rowheader "1 2 3 4"',
        "status",
        "img",
    ):
        assert part in tree, part
    unnamed = page.eval_on_selector_all(
        "button, select, input",
        "found => found.filter(f => !f.innerText && !f.ariaLabel && !(f.labels || []).length).length",
    )
    assert unnamed == 0
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_explorer_in_a_notebooks_frame(opened):
    explorer = explore(leaning(3, 3), questions=questions_of(3, 3))
    page = opened(f"<!doctype html><html><body>{explorer._repr_html_()}</body></html>")
    frame = page.frame_locator("iframe")
    frame.locator("#list li").nth(2).click()
    assert frame.locator("#grid tbody tr").count() == 6


@pytest.mark.slow
def test_report_opens_offline_whatever_its_questions_say(opened, tmp_path, capsys):
    n = 5_000
    records = write(tmp_path / "judge.jsonl", judge(n, 0.4, 0.05, 0.01))
    questions = tmp_path / "texts.jsonl"
    texts = (
        {"id": f"q{i}", "question": f"{NASTY} {i}", "options": [NASTY + "1", NASTY + "2"], "answer": 0} for i in range(n)
    )
    write(questions, list(texts))
    cli.main(["measure", str(records), "--questions", str(questions), "--html", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 500_000
    page = opened(html)
    assert page.title() == "Does the order decide? judge.jsonl"
    assert page.locator("#verdict strong").inner_text() == "Red: do not trust a single order"
    assert page.locator("#verdict p").inner_text() == " ".join(capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert page.locator("#grids details").count() == 20 and page.locator("#grids table.grid").count() == 20
    assert NASTY.split("\u2028")[0].strip() in page.locator("#grids").inner_text()
    items = data_of(html)["items"]
    cells = page.eval_on_selector_all("#grids table.grid tbody tr", SHOWN)
    expected = [
        own for item in items for own in to_positions(np.array(item["p"]).reshape(2, 2) / UNIT, np.array([[0, 1], [1, 0]]))
    ]
    assert np.array([[p for p, _ in row] for row in cells]) == pytest.approx(np.array(expected), abs=1e-5)
    squares = [int(text) for text in page.locator(".square b").all_inner_texts()]
    said = page.locator("section", has=page.locator(".square")).inner_text()
    tied, failed = map(int, re.search(r"(\d+) with a tie, (\d+) with a failed", said).groups())
    assert sum(squares) + tied + failed == n and squares[0] > squares[3]
    assert "permdistill measure" in page.content() and re.search("sha256 [0-9a-f]{64}", page.content())
    assert page.locator("#grids details[open]").count() == 3
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#grids details[open]").count() == 20
    page.emulate_media(media="print")
    assert page.locator("#grids table.grid").last.is_visible()
    page.emulate_media(media="screen")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
