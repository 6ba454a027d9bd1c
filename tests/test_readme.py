"""The README's example is run as it stands, with the smallest real model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from permdistill import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    return found


@pytest.mark.slow
def test_own_questions_example(tmp_path):
    (tmp_path / "mine.jsonl").write_text(block("json", '"options"'), encoding="utf-8")
    (command,) = block("sh", "permdistill score").strip().splitlines()
    program, *arguments = command.split()
    assert program == ".venv/bin/permdistill"
    done = subprocess.run(
        [sys.executable, "-m", "permdistill.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 questions scored now" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", block("python", "permutation_sensitivity")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"0\.\d+ \[\[0\.\d+ +0\.\d+ +0\.\d+ *\]\]", done.stdout), done.stdout


def test_first_two_commands():
    first = re.search(r"```sh\n(.*?)```", README, re.S)[1].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make paper", "make test"]


def test_numbers_are_those_of_the_tables():
    assert tables.readme(README, ROOT / "figures") == README
