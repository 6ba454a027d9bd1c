"""README and docs/: every example is executed as it stands; what wants other machines is checked word by word."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest

from permdistill import cli, debias
from permdistill.measure.metrics import Interval
from permdistill.orders import cyclic_orders
from permdistill.paper import bench, results
from permdistill.paper import cli as paper_cli

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def block(page: str, language: str, containing: str) -> str:
    (found,) = [b for b in blocks(page, language) if containing in b]
    return found


def command_line(page: str, containing: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's command as it stands, in ``folder``; it must succeed."""
    (command,) = [line for b in blocks(page, "sh") for line in b.splitlines() if containing in line]
    program, *arguments = command.split()
    assert program == ".venv/bin/permdistill"
    done = subprocess.run([sys.executable, "-m", "permdistill.cli", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def several_questions(path: Path, n: int = 3) -> None:
    """The README's question, a few times over: one question alone has no interval."""
    record = json.loads(block("README.md", "json", '"options"'))
    lines = [json.dumps(record | {"id": f"q{i}", "question": f"{i}. {record['question']}"}) for i in range(1, n + 1)]
    path.write_text("\n".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Executed


@pytest.mark.slow
def test_own_questions_and_a_student_of_them(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    done = command_line("README.md", "permdistill score", tmp_path)
    assert "3 questions scored now" in done.stdout
    measure, distil = (block("README.md", "python", words) for words in ("permutation_sensitivity", "Lesson("))
    shown = python(measure + distil, tmp_path)
    number = r"\d(?:\.\d*)?(?:e-\d+)?"
    assert re.match(r"0\.\d+ \[\[0\.\d+ +0\.\d+ +0\.\d+ *\]", shown), shown
    (answer,) = re.findall(rf"^\[({number}) +({number}) +({number}) *\]$", shown, re.M)
    assert sum(map(float, answer)) == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "my-student" / "permdistill.json").exists() and (tmp_path / "explore.html").exists()
    again = 'student = permdistill.Student.from_pretrained("my-student")\nheld_out, P_held_out = questions, P\n'
    again += "new, P_new = questions[:1], P[:1, :1]\n" + block("api.md", "python", "fit_stack")
    assert re.search(
        r"\(1, 1, 3\) \[\[1\.", python(measure + again + "print(answers.shape, answers.sum(axis=-1))", tmp_path)
    )


@pytest.mark.slow
def test_own_model_and_questions_in_the_notebook(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    (command,) = block("README.md", "sh", "papermill notebooks/01").strip().splitlines()
    program, notebook, *arguments = command.split()
    assert program == ".venv/bin/papermill"
    command = [sys.executable, "-m", "papermill", str(ROOT / notebook), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    t1 = pd.read_csv(tmp_path / "build" / "mine" / "tables" / "T1_teachers.csv")
    assert set(t1.teacher) == {"smollm2-135m"} and set(t1.task) == {"mine"} and set(t1.n) == {3}
    assert (tmp_path / "build" / "mine" / "scores" / "smollm2-135m").is_dir()


def test_first_minute(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    done = command_line("README.md", "examples/judge.jsonl", tmp_path)
    assert done.stdout == blocks("README.md", "text")[0]
    assert "Red: do not trust a single order" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_scores_from_another_harness(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    record = json.loads(block("README.md", "json", '"probabilities"'))
    lines = [json.dumps(record | {"id": f"q{i}", "order": order.tolist()}) for i in (1, 2, 3) for order in cyclic_orders(3)]
    (tmp_path / "my-scores.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command_line("README.md", "permdistill measure my-scores", tmp_path)
    table = pd.read_csv(tmp_path / "measured.csv").set_index("debiaser")
    # Always the third position: right in one rotation of three, and never the same option twice.
    assert table.loc["biased", ["accuracy", "consistency", "circular"]].tolist() == pytest.approx([1 / 3, 0, 0])
    assert table.loc["cyclic average", "ps"] == 0


def test_the_page_on_measuring_measures_its_own_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").write_text(block("measure.md", "json", '"probabilities"'), encoding="utf-8")
    (shown, gated) = [words[1:] for words in commands("measure.md") if words[1] == "measure"]
    cli.main(shown)
    out = capsys.readouterr().out
    page = PAGES["measure.md"].lower()
    assert "flip rate" in out and all(name in page for name in ("flip rate", "consistency", "ps (tv)", "label mass"))
    cli.main(gated)  # of two items no interval lies beyond a threshold


def test_the_table_of_adaptive_orders_is_that_of_the_figure():
    titles = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "OpenBookQA": "openbookqa", "CommonsenseQA": "csqa"}
    titles |= {"HellaSwag": "hellaswag", "MMLU": "mmlu", "SocialIQA": "socialiqa", "PIQA": "piqa", "BoolQ": "boolq"}
    d1 = pd.read_csv(ROOT / "figures" / "D1_debiasers.csv").set_index(["task", "debiaser"]).accuracy * 100
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGES["measure.md"].splitlines()]
    start = next(i for i, row in enumerate(rows) if row[0] == "Qwen2.5-Coder 1.5B")
    shown = rows[start : start + 1 + next(i for i, row in enumerate(rows[start + 1 :]) if row[0])]  # to the next teacher
    assert {row[1].split(",")[0] for row in shown} == set(titles)
    kept = []
    for _, title, biased, every, few, more in shown:
        own = d1[titles[title.split(",")[0]]]
        calls = [1.5] if title.endswith(", at 1.5 calls") else [2.6, 8] if more else [2.6]
        assert ("adaptive, 8 calls" in own) == bool(more)
        assert [float(biased), float(every)] == pytest.approx([own["biased"], own["all-orders average"]], abs=0.051)
        for cell, n in zip((few, more), calls, strict=False):
            value, share = map(float, re.fullmatch(r"([\d.]+) \((\d+)%\)", cell).groups())
            exact = (own[f"adaptive, {n:g} calls"] - own["biased"]) / (own["all-orders average"] - own["biased"])
            assert value == pytest.approx(own[f"adaptive, {n:g} calls"], abs=0.051) and share == pytest.approx(
                100 * exact, abs=0.51
            )
        kept.append(float(few.split("(")[1].rstrip("%)")))
    numbers = "one two three four five six seven eight nine".split()
    enough, sets = numbers[sum(share >= 90 for share in kept) - 1], numbers[len(kept) - 1]
    assert f"reached on {enough} of {sets} sets by the larger teacher" in PAGES["measure.md"]


def test_plan_of_an_api_run_asks_nothing(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    done = command_line("api.md", "--dry-run", tmp_path)
    assert "3 items, 96 calls: 0 in the store, 96 to make" in done.stdout and "limits: cost 1.0" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.slow
def test_decisions_of_a_real_server(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    shown = python(block("api.md", "python", "Server("), tmp_path)
    assert "3 items, 24 calls: 0 in the store, 24 to make" in shown and "not asked" in shown
    targets = np.array(re.findall(r"[01]\.\d*", shown.split("\n[[")[1]), dtype=float).reshape(3, 3)
    assert targets.sum(axis=1) == pytest.approx(1, abs=1e-6) and (tmp_path / "replies" / "replies.jsonl").exists()


# --------------------------------------------------------------------------------------------------------------------
# Checked word by word


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for b in blocks(page, "sh") for line in b.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists_with_its_options(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for words in commands(page):
        while "=" in words[0]:  # environment variables
            words = words[1:]
        program, *rest = words
        if program == "make":
            assert re.search(rf"^{rest[0]}:", makefile, re.M), words
            assert all(re.search(rf"^{setting.split('=')[0]} \?=", makefile, re.M) for setting in rest[1:]), words
        elif program == ".venv/bin/permdistill":
            cli.parser().parse_args(rest)
        elif "-m" in rest and rest[rest.index("-m") + 1].startswith("permdistill."):
            module, *own = rest[rest.index("-m") + 1 :]
            {"permdistill.cli": cli, "permdistill.paper": paper_cli}[module].parser().parse_args(own)
        elif program == ".venv/bin/papermill":
            (parameters,) = [c for c in nbformat.read(ROOT / rest[0], 4).cells if "parameters" in c.metadata.get("tags", [])]
            names = [rest[i + 1] for i, word in enumerate(rest) if word == "-r"]
            assert all(re.search(rf"^{name} = ", parameters.source, re.M) for name in names), words
        elif program == ".venv/bin/pip":
            (extra,) = re.findall(r"\[(\w+)\]", words[-1])
            assert extra in extras
        else:
            assert program in ("vllm", "python") and page == "scale.md", words  # engines that want a GPU


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    home = ROOT if page == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    assert not [t for t in targets if not t.startswith("https://") and not (home / t).exists()]
    modules = re.findall(r"`(?:permdistill/)?((?:paper|engine|api)/\w+\.(?:py|csv))`", PAGES[page])
    assert not [m for m in modules if not (ROOT / "permdistill" / m).exists()]


def test_the_readme_fits_a_screen_or_two():
    assert len(README.encode()) <= 12_000


def test_the_readmes_first_two_commands():
    first = blocks("README.md", "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make paper", "make test"]


def test_numbers_are_those_of_the_tables():
    assert results.readme(README, ROOT / "figures") == README
    assert results.page(ROOT / "figures") == (ROOT / "figures" / "README.md").read_text(encoding="utf-8")


def test_numbers_in_the_readmes_words_are_those_of_tables_and_benchmark():
    words = " ".join(README.split())
    p1 = bench.table(bench.read())
    time = p1[p1.model == bench.MODELS[0][0]].set_index(["workload", "arm"]).ratio
    short, passages, summaries = (f"{time[name, 'padded'] / time[name, 'forest']:.2g}" for name in bench.WORKLOADS)
    speeds = f"{short} (short questions), {passages} (passages) and {summaries} times (summaries) as fast as padded batches"
    assert f"On two cores that is {speeds}" in words
    race, t4 = (pd.read_csv(ROOT / "figures" / f"{name}.csv") for name in ("T2_race", "T4_matrix"))
    ours = race[(race.source == "stored") & (race.task == "all")].drop_duplicates("method").set_index("method").accuracy
    ours *= 100
    assert f"from {ours['biased']:.1f} to {ours['all-orders average']:.1f}. **Without a call of it, a student" in words
    t1 = pd.read_csv(ROOT / "figures" / "T1_teachers.csv")
    t1 = t1[(t1.teacher == "qwen2.5-coder-1.5b") & (t1.treatment == debias.DEBIASED) & ~t1.task.str.startswith("summeval")]
    gains = (100 * t1.set_index("task").gain).round()
    assert (gains.between(6, 8).sum(), gains.between(1, 3).sum(), len(gains)) == (5, 4, 9)
    assert t1[t1.gain_low <= 0].task.tolist() == ["hellaswag"]
    assert "gains 6 to 8 points** on RACE and five of nine sets, 1 to 3 on four (HellaSwag unsurely)" in words
    large = t4[(t4.task == "all") & (t4.teacher == "qwen2.5-coder-1.5b")]
    best = 100 * large.groupby("method").accuracy.max()
    had = f"({best['biased']:.1f} biased, {best['all-orders average']:.1f} averaged), of which students had 1,050 questions"
    assert f"{had}, none without a call comes near ({best['distillation']:.1f})" in words
    whole = large[(large.method == "white-box error correction") & (large.encoder == "all-MiniLM-L6-v2")]
    seeing = whole[whole["head"] == "per_option"].gain.iloc[0] * 100
    matched = large[large.method == "prior-matching"].gain.iloc[0] * 100
    assert f"with the teacher's probabilities they gain {seeing:.1f}, no more than prior-matching" in words.replace("W", "w")
    corrected = large[large.method == "error correction"]
    assert seeing <= matched and (corrected.gain_low <= 0).all()  # "from one decision nothing"
    _check_whole_sets(words)
    joint = pd.read_csv(ROOT / "figures" / "T7_collapse.csv").set_index("n_train").accuracy * 100
    assert f"from 33,177 it learns (SocialIQA: {joint[33177]:.1f})" in words and joint[8000] < 35
    t5 = pd.read_csv(ROOT / "figures" / "T5_summaries.csv")
    whole = t5[(t5.task == "all") & (t5.n == t5.n.max())]
    best = 100 * whole.groupby("method").accuracy.max()
    chance = f"at chance ({best['biased']:.1f})"
    assert f"{chance}, untaught encoders reach {best['untrained']:.1f}, taught ones no more" in words
    assert best["distillation"] <= best["untrained"]


def _check_whole_sets(words: str) -> None:
    """What README and docs/api.md say of students of whole training sets: T7 and its differences, T9_alone."""
    t7, gaps, alone = (pd.read_csv(ROOT / "figures" / f"{name}.csv") for name in ("T7_scale", "T7_differences", "T9_alone"))
    own = {task: 100 * rows.set_index(["method", "greedy"]).filter(like="gain") for task, rows in _of_all_questions(t7)}
    decided, white = ("stacked error correction", True), ("stacked white-box error correction", False)
    taught, sampled = ("distillation", False), ("stacked error correction", False)
    best = own["socialiqa"].loc[taught]
    assert (
        f"by {best.gain:.1f} points [{best.gain_low:.1f}, {best.gain_high:.1f}], one seed.** On PIQA it is level, on"
        in words
    )
    assert best.gain_low > 0 and own["piqa"].loc[taught].gain_low < 0 < own["piqa"].loc[taught].gain_high
    assert own["race"].loc[taught].gain_high < 0 and own["boolq"].loc[taught].gain_high < 0
    better = ("race", "socialiqa", "piqa")
    for gain in (own[task] for task in better):
        assert gain.loc[decided].gain_low > 0 and gain.loc[white].gain_low > 0
    assert own["boolq"].loc[white].gain_low <= 0 and own["boolq"].loc[decided].gain_low <= 0  # on BoolQ nothing is better
    first, second, third = (f"{own[task].gain[decided]:.1f}" for task in better)
    assert f"by the teacher's decision {first}, {second} and {third} points (RACE, SocialIQA, PIQA)" in words
    first, second, third = (f"{own[task].gain[white]:.1f}" for task in better)
    rows = {name: _whole_sets(gaps, name) for name in ("prior-matching", "distillation")}
    matching = [_interval(rows["prior-matching"][task, *white], "difference") for task in better]
    said = f"{first}, {second} and {third}, over prior-matching {matching[0]}, {matching[1]} and {matching[2]}"
    assert f"by its probabilities {said}" in words
    assert rows["prior-matching"]["race", *decided].difference_high < 0  # "does not reach"
    over = rows["distillation"]
    assert all(
        over[task, *sampled].difference_low < 0 for task in own
    )  # a sampled answer adds nothing to the student, paired
    assert all(over["socialiqa", *which].difference_low < 0 for which in (decided, white))
    said = f"adds {own['race'].gain[decided]:.1f} points to the biased teacher's answers and"
    said += f" {100 * over['race', *decided].difference:.1f} to the student's alone, its probabilities"
    said += f" {own['race'].gain[white]:.1f} and {100 * over['race', *white].difference:.1f}, a sampled decision takes from"
    assert said in " ".join(PAGES["api.md"].split()) and over["race", *sampled].difference_high < 0
    worse = alone[alone.together_high < 0]
    assert worse.task.tolist() == ["race"] and len(alone) == 4
    assert f"worse than one of each on RACE alone ({_interval(worse.iloc[0], 'together')})" in words


def _whole_sets(gaps: pd.DataFrame, rival: str) -> dict[tuple, Any]:
    """Differences of students of whole sets from a rival: {(task, method, greedy): row}."""
    rows = gaps[(gaps.rival_method == rival) & ~(gaps.n_train > 0)]
    return {(row.tasks, row.method, row.greedy): row for row in rows.itertuples()}


def _interval(row: Any, name: str) -> str:
    return Interval(*(getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))).percent()


def _of_all_questions(t7: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    rows = t7[(t7.task != "all") & ~(t7.n_train > 0) & t7.gain.notna() & (t7.kind == "student")]
    yield from rows.groupby("task")
