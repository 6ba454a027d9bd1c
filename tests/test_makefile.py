"""The Makefile as its user meets it: what it lists, what it refuses, and that every recipe's command exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from permdistill.paper.models import TEACHERS
from permdistill.paper.profiles import PROMPTS

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_lists_every_target_and_setting():
    shown = make("help").stdout
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)).split()) - {"FORCE"}
    assert {"paper", "test", "lab", "scores", "audit"} <= phony
    for target in phony:
        assert re.search(rf"^  {target} +\w", shown, re.M), target
    for setting in re.findall(r"^(\w+) \?= ", MAKEFILE, re.M):
        assert setting == "NOTEBOOKS" or re.search(rf"^  {setting}=", shown, re.M), setting
    assert make().stdout == shown


@pytest.mark.parametrize("setting, known", [("TEACHER=alive", "committed or live"), ("PROFILE=ful", "smoke, full or paper")])
def test_unknown_values_are_refused_with_the_known_ones(setting, known):
    result = make("paper", setting)
    assert result.returncode != 0
    assert known in result.stderr and setting.split("=")[1] in result.stderr


def test_notebooks_run_one_after_the_other_in_the_order_of_their_numbers(tmp_path):
    planned = make("-n", "-j4", "paper", f"BUILD={tmp_path}/build").stdout
    ran = re.findall(r"^echo \"== (\S+) \(full\)\"", planned, re.M)
    assert ran == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    # The teachers' table is there within minutes; what takes longer waits for the audit.
    first, second = [place.start() for place in re.finditer("== ", planned)][:2]
    assert first < planned.index("permdistill.cli audit") < second


def test_live_scores_take_the_place_of_the_committed_ones(tmp_path):
    planned = make("-n", "paper", "TEACHER=live", f"BUILD={tmp_path}/build").stdout
    assert "permdistill.cli audit" not in planned
    for teacher in TEACHERS:
        assert re.search(rf"permdistill\.cli score .*{teacher}|for teacher in .*{teacher}", planned), teacher
    for templates in PROMPTS.values():
        assert all(name in planned for name in templates[1:])
    assert f'-r scores "{tmp_path}/build/scores"' in planned
