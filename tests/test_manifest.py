"""The manifest names what was run and hashes what came of it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time

import pytest

from permdistill.paper import manifest


def executed(parameters: dict) -> str:
    times = {"start_time": "2024-01-01T00:00:00+00:00", "end_time": "2024-01-01T00:00:02+00:00", "duration": 2.0}
    return json.dumps({"metadata": {"papermill": {"parameters": parameters, **times}}, "cells": []})


def test_manifest_of_a_run(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "full" / "tables").mkdir(parents=True)
    (tmp_path / "notebooks" / "01_a.ipynb").write_text(executed({"profile": "smoke"}))
    (tmp_path / "notebooks" / "02_b.part.ipynb").write_text("half-writ")
    (tmp_path / "full" / "tables" / "t1.csv").write_text("a,b\n")
    assert manifest.main([str(tmp_path), "--measure", "01_a", "--", sys.executable, "-c", "x = bytearray(50_000_000)"]) == 0
    path = manifest.write(tmp_path)
    found = json.loads(path.read_text())
    assert path == tmp_path / "manifest.json"
    assert list(found["notebooks"]) == ["01_a"]
    assert found["notebooks"]["01_a"]["parameters"] == {"profile": "smoke"}
    assert found["notebooks"]["01_a"]["seconds"] == 2.0
    assert found["resources"]["01_a"]["peak_memory_bytes"] > 50_000_000
    assert found["products"]["full/tables/t1.csv"] == hashlib.sha256(b"a,b\n").hexdigest()
    assert {"torch", "transformers", "numpy"} <= set(found["packages"])
    assert not list(tmp_path.rglob("*.part"))


def test_failed_command_hands_on_its_status_and_leaves_no_record(tmp_path):
    assert manifest.main([str(tmp_path), "--measure", "x", "--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert not list(tmp_path.rglob("*.json"))


def test_what_a_killed_make_left_running_is_waited_for(tmp_path, capfd):
    """Two kernels would write the same files."""
    ran: list[int] = []
    (tmp_path / "resources").mkdir()
    with open(tmp_path / "resources" / "x.lock", "a") as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        again = threading.Thread(target=lambda: ran.append(manifest.main([str(tmp_path), "--measure", "x", "--", "true"])))
        again.start()
        said = "waiting for the end of x, which a killed make has left running"
        while again.is_alive() and said not in capfd.readouterr().err:
            time.sleep(0.01)
        assert again.is_alive() and not ran
    again.join()
    assert ran == [0]


def test_the_lock_outlives_the_process_that_measures(tmp_path):
    """The command holds it too."""
    look = "any(os.path.samefile(f'/dev/fd/{n}', sys.argv[1]) for n in range(3, 64) if os.path.exists(f'/dev/fd/{n}'))"
    code, lock = f"import os, sys; sys.exit(not {look})", str(tmp_path / "resources" / "x.lock")
    assert manifest.main([str(tmp_path), "--measure", "x", "--", sys.executable, "-c", code, lock]) == 0


def test_a_command_ends_with_the_make_that_started_it(tmp_path, monkeypatch):
    parents = iter([7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    started = time.monotonic()
    assert manifest.main([str(tmp_path), "--measure", "x", "--", "sleep", "60"]) == -signal.SIGTERM
    assert time.monotonic() - started < 30 and not list(tmp_path.rglob("*.json"))


def test_notebook_that_was_not_executed_is_refused(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_a.ipynb").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match="01_a.ipynb was not executed"):
        manifest.write(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_wrong_arguments_print_the_usage(capsys):
    assert manifest.main(["a", "b"]) == 2
    assert "usage" in capsys.readouterr().err
