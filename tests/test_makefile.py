"""The Makefile as its user meets it: what it lists, what it refuses, and that every recipe's command exists."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from permdistill.paper.models import MODELS
from permdistill.paper.profiles import PROFILES
from permdistill.paper.tasks import TASKS
from permdistill.prompts import TEMPLATES

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


POOLS = tuple(PROFILES["full"].pools)
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
RUNS = NOTEBOOKS - {"03_students"} | {f"03_students_{pool}" for pool in POOLS}


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(["make", *arguments], cwd=folder, env=alone, capture_output=True, text=True, check=False)


def test_help_lists_every_target_and_setting():
    shown = make("help").stdout
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)).split()) - {"FORCE"}
    assert {"paper", "test", "lab", "scores", "audit"} <= phony
    for target in phony:
        assert re.search(rf"^  {target} +\w", shown, re.M), target
    for setting in re.findall(r"^(\w+) \?= ", MAKEFILE, re.M):
        assert setting == "NOTEBOOKS" or re.search(rf"^  {setting}=", shown, re.M), setting
    assert make().stdout == shown


@pytest.mark.parametrize(
    "setting, known",
    [("TEACHER=alive", "committed or live"), ("STUDENTS=dead", "stored or live"), ("PROFILE=ful", "smoke, full or paper")],
)
def test_unknown_values_are_refused_with_the_known_ones(setting, known):
    result = make("paper", setting)
    assert result.returncode != 0
    assert known in result.stderr and setting.split("=")[1] in result.stderr


@pytest.mark.parametrize(
    "setting", ["BUILD=my build", "TEACHER=live junk", "PROFILE=smoke full", "BUILD=", "VENV=", "VENV=a b"]
)
def test_a_setting_is_one_word(setting):
    result = make("-n", "paper", setting)
    assert result.returncode != 0 and setting.replace("=", " is '") + "': give one word" in result.stderr


@pytest.mark.parametrize("target", ["venv", "test", "distclean"])
def test_a_folder_that_is_no_environment_is_left_alone(target, tmp_path):
    home = tmp_path / "checkout"  # a stand-in: were the guard broken, it would be the one to go
    (home / "mine").mkdir(parents=True)
    (home / "mine" / "thesis.txt").write_text("years", encoding="utf-8")
    for name in ("Makefile", "requirements.lock", "requirements.sha256", "pyproject.toml"):
        (home / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in (".", "mine"):
        result = make(target, f"VENV={folder}", folder=home)
        assert result.returncode != 0 and f"VENV is '{folder}', which holds something else" in result.stderr
    assert (home / "mine" / "thesis.txt").read_text(encoding="utf-8") == "years" and (home / "Makefile").exists()
    for name in ("new", "empty", "old"):  # not there, empty, or an environment
        (home / "empty").mkdir(exist_ok=True)
        (home / "old").mkdir(exist_ok=True)
        (home / "old" / "pyvenv.cfg").touch()
        assert make("-n", "venv", f"VENV={name}", folder=home).returncode == 0


def test_clean_deletes_only_what_make_paper_made(tmp_path):
    build = tmp_path / "mine"
    build.mkdir()
    (build / "thesis.txt").touch()
    result = make("clean", f"BUILD={build}")
    assert result.returncode != 0 and "which make paper has not made" in result.stderr and (build / "thesis.txt").exists()
    (build / "settings").write_text("mine", encoding="utf-8")  # a file of this name is not yet ours
    assert make("clean", f"BUILD={build}").returncode != 0 and (build / "thesis.txt").exists()
    (build / "settings").write_text("PROFILE=full TEACHER=committed STUDENTS=stored\n", encoding="utf-8")
    assert make("clean", f"BUILD={build}").returncode == 0 and not build.exists()


def checkout(home: Path) -> Path:
    """A stand-in for a checkout with its environment: were a guard broken, it would be the one to go."""
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    for file in ("requirements.lock", "requirements.sha256", "pyproject.toml", ".venv/pyvenv.cfg", ".venv/.installed"):
        (home / file).touch()
    return home


def test_nothing_is_put_into_a_folder_that_is_not_ours(tmp_path):
    """What `make paper` once marked as its own, `make clean` would delete."""
    home = checkout(tmp_path / "checkout")
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").touch()
    (tmp_path / "pyvenv.cfg").touch()  # a checkout in an environment
    (home / ".made-by-permdistill").touch()  # by whatever mistake
    before = sorted(tmp_path.rglob("*"))
    for folder in ("mine", "mine/thesis.txt", ".venv"):
        done = make("paper", f"BUILD={folder}", folder=home)
        assert done.returncode and f"BUILD is '{folder}', which make paper has not made" in done.stderr
    for setting in ("BUILD=.", f"BUILD={home}", "BUILD=..", "BUILD=/", "VENV=.."):
        for target in ("paper", "clean", "distclean"):
            done = make(target, setting, folder=home)
            assert done.returncode and len(done.stderr.splitlines()) == 1
            assert "which holds this checkout" in done.stderr or "has not made" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_any_target_made_is_ours(tmp_path):
    home = checkout(tmp_path / "checkout")
    python = home / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\n", encoding="utf-8")
    python.chmod(0o755)
    (home / "permdistill").symlink_to(ROOT / "permdistill")
    (home / "build").mkdir()
    (home / "build" / "bench.json").touch()  # the folder build is, whatever an earlier version put there
    for build, target in (("build", "bench"), ("audited", "audit"), ("listed", "bench")):
        make(target, f"BUILD={build}", folder=home)  # with a Python that does nothing
        assert (home / build / ".made-by-permdistill").exists()
        (home / build / "scores").mkdir()
        assert make("-n", "paper", f"BUILD={build}", folder=home).returncode == 0
        assert make("clean", f"BUILD={build}", folder=home).returncode == 0 and not (home / build).exists()


def test_notebooks_run_one_after_the_other_in_the_order_of_their_numbers(tmp_path):
    planned = make("-n", "-j4", "paper", f"BUILD={tmp_path}/build").stdout
    ran = re.findall(r"^echo \"== (\S+) \(full\)\"", planned, re.M)
    assert ran == sorted(RUNS)
    for pool in POOLS:  # the students' notebook, once for each pool of tasks
        assert re.search(rf"-r pool {pool} \"notebooks/03_students.ipynb\" \S*03_students_{pool}.part.ipynb", planned), pool
    # The teachers' table is there within minutes; what takes longer waits for the audit.
    first, second = [place.start() for place in re.finditer("== ", planned)][:2]
    assert first < planned.index("permdistill.paper audit --profile full") < second
    assert "permdistill.paper students --audit" in planned and "-r students stored" in planned


def test_live_scores_take_the_place_of_the_committed_ones(tmp_path):
    planned = make("-n", "paper", "TEACHER=live", f"BUILD={tmp_path}/build").stdout
    assert "permdistill.paper audit" not in planned
    assert f'permdistill.paper score --profile full --scores "{tmp_path}/build/scores"' in planned
    assert f'-r scores "{tmp_path}/build/scores"' in planned
    assert "-r students live" in planned and "students --audit" not in planned  # theirs are other scores
    alone = make("-n", "paper", "STUDENTS=live", f"BUILD={tmp_path}/build").stdout
    assert "-r students live" in alone and "students --audit" not in alone and "audit --profile full" in alone
    limited = make("-n", "paper", "TEACHER=live", "PROFILE=full-12", f"BUILD={tmp_path}/build").stdout
    assert "permdistill.paper score --profile full-12 " in limited and "-r profile full-12 " in limited


def test_names_no_task_teacher_template_or_number_that_a_profile_knows():
    """What is scored and audited stands in profiles.py; test_plan.py says that it is all of it."""
    named = {*TASKS, *MODELS, *TEMPLATES} - {"brief", "numbers"}
    assert not [name for name in named if name in MAKEFILE] and "--limit" not in MAKEFILE and "--template" not in MAKEFILE
    assert f'permdistill.paper score --profile full --scores "{ROOT}/scores"' in make("-n", "scores").stdout


def test_every_locked_version_but_torchs_has_hashes():
    """torch is a wheel of its own on every platform and accelerator, with other packages beside it."""
    versions = [line for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines() if "==" in line]
    entries = re.split(r"\n(?=\w)", re.sub(r"^#.*\n", "", (ROOT / "requirements.sha256").read_text("utf-8"), flags=re.M))
    hashed = {re.split(r"[ ;\\]", entry)[0]: re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries}
    spelt = {re.sub(r"[-_.]+", "-", name).lower() for name in versions if not name.startswith("torch==")}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in hashed} == spelt and all(hashed.values())
    planned = make("-n", "venv", "VENV=new").stdout
    assert planned.index("pip install --require-hashes --no-deps -r requirements.sha256") < planned.index(
        "-r requirements.lock"
    )


def test_the_lock_meets_every_minimum():
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    locked = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        Requirement(text) for part in (named["dependencies"], *named["optional-dependencies"].values()) for text in part
    ]
    found = [r for r in listed if canonicalize_name(r.name) in locked and r.specifier]
    assert all(r.specifier.contains(locked[canonicalize_name(r.name)]) for r in found)
    assert {"filelock", "torch", "transformers"} <= {r.name for r in found}


def test_a_folder_with_a_space_in_its_name_will_do(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    (folder / "requirements.lock").touch()
    (folder / "requirements.sha256").touch()
    (folder / "pyproject.toml").touch()
    (folder / ".venv").mkdir()
    for file in ("pyvenv.cfg", ".installed"):
        (folder / ".venv" / file).touch()
    planned = subprocess.run(["make", "-n", "test", "scores", "plan"], cwd=folder, capture_output=True, text=True).stdout
    commands = [line for line in planned.splitlines() if "bin/python" in line]
    assert len(commands) == 4 and all(f'"{folder}/.venv/bin/python" -m ' in line for line in commands)


ODD = ["a b", "a;b", "a'b", 'a"b', "a$b", "a#b", "a%b", "a(b", "a)b", "a:b", "a\\b", "a&b", "a*b", "aéb"]


@pytest.mark.parametrize("name", ODD)
def test_a_checkout_under_an_odd_name_works_or_is_refused_in_one_line(tmp_path, name):
    home = checkout(tmp_path / name)
    python = home / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$0" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))
    done = make("scores", folder=home)
    if set(name) & set('"$:\\'):
        assert done.returncode and f"this folder is '{home}': make cannot work with" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout
    else:
        ran = [str(python), "-m", "permdistill.paper", "score", "--profile", "full", "--scores", str(home / "scores")]
        assert done.returncode == 0 and done.stdout.splitlines()[1:] == ran
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", sorted({*ODD} - {"a b", "aéb", "a$b"}) + ["a$$b"])
def test_a_setting_under_an_odd_name_is_refused_in_one_line(name):
    for setting in ("PYTHON", "VENV", "PROFILE", "BUILD"):
        done = make("-n", "paper", f"{setting}={name}")
        assert done.returncode and f"{setting} is '{name.replace('$$', '$')}': make cannot work with" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_environment_yml_names_the_packages_that_the_project_stands_on():
    """Beside the lock, which pins them: what is named must be in both."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    named = {match.lower() for match in re.findall(r"^ +- ([A-Za-z0-9_-]+)", text, re.M)}
    locked = {line.split("==")[0].lower() for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()}
    stands_on = {"jupyterlab", "papermill", "torch", "transformers", "datasets", "matplotlib", "seaborn", "nbval"}
    assert stands_on <= named and stands_on <= locked
    assert "-r requirements.lock" in text and "-e ." in text
