"""Locks, replaced files, stamps, and folders of models: nothing is written through a link, no code in them is run."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_scores import Store, forked, row_of
from test_students import make_encoder

from permdistill import files
from permdistill.api.replies import Replies
from permdistill.configs import StudentConfig
from permdistill.files import STAMPS, intact, locked, remove, replacing, seal, sealed, sha256_of, stamp, stamps
from permdistill.sources import Source
from permdistill.students import Student, build
from permdistill.teachers import load_teacher
from permdistill.training import Checkpoint


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Path]]:
    """A function that copies a folder to a place where this process can read, and write nothing (root can, so: nobody)."""
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)

    def freeze(folder: Path) -> Path:
        copy = Path(shutil.copytree(folder, home / folder.name, symlinks=True))
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)
        return copy

    yield freeze
    if os.getuid() == 0:
        os.seteuid(0)
    for path in home.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(home)


def test_a_lock_does_not_follow_a_link_and_empties_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match=r"\.lock is a symbolic link"), locked(tmp_path / ".lock"):
        pytest.fail("locked through a link")
    assert precious.read_text() == "kept"
    (tmp_path / "other").mkdir()
    os.link(precious, tmp_path / "other" / ".lock")  # a hard link cannot be told from a lock, and stays as it is
    with locked(tmp_path / "other" / ".lock"):
        pass
    assert precious.read_text() == "kept"


def test_a_part_is_not_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / f".new.{os.getpid()}.part").symlink_to(precious)
    with replacing(tmp_path / "new") as part:
        part.write_text("made")
    assert precious.read_text() == "kept" and (tmp_path / "new").read_text() == "made"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "precious"]


def test_what_is_removed_is_never_what_a_link_leads_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for name in ("mine", "mine/thesis", "nothing"):
        (tmp_path / "link").symlink_to(tmp_path / name)
        remove(tmp_path / "link")
        assert not (tmp_path / "link").is_symlink() and (tmp_path / "mine" / "thesis").exists()
    remove(tmp_path / "mine")
    remove(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_a_student_is_not_written_through_a_link(tmp_path):
    make_encoder(tmp_path / "encoder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("kept")
    student, folder = build(StudentConfig(str(tmp_path / "encoder"), k=3), 0), tmp_path / "student"
    folder.mkdir()
    (folder / ".part").symlink_to(tmp_path / "mine")
    student.save(folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]
    assert (tmp_path / "mine" / "config.json").read_text() == "kept"
    Student.from_pretrained(folder)


def test_bytes_are_on_disk_before_a_file_takes_its_place(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    with replacing(tmp_path / "new") as part:
        part.write_text("made")
    assert done == ["fsync", "replace"]


@contextmanager
def full() -> Iterator[None]:
    """A disk on which no file may have more than 400 bytes: the system's own error, in the middle of writing. Not for a
    whole test: pytest's own output may go into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_store(folder: Path) -> Path:
    store = Store(folder)
    store.append([row_of(i) for i in range(40)])
    return store.compact()


def write_replies(folder: Path) -> Path:
    store = Replies(folder)
    for i in range(20):
        store.append({"attempt": f"a{i}", "bound": [200, 1]})
    return store.path


def write_checkpoint(folder: Path) -> Path:
    Checkpoint(folder, "key").save({"model": torch.zeros(1000)})
    return folder / "checkpoint.pt"


def write_student(folder: Path) -> Path:
    build(StudentConfig(str(folder.parent / "encoder"), k=3), 0).save(folder)
    return folder


def write_weights(folder: Path) -> Path:
    with replacing(folder / "weights") as part:
        save_file({"a": torch.zeros(1000)}, part)
    return folder / "weights"


@pytest.mark.parametrize("write", [write_store, write_replies, write_checkpoint, write_student, write_weights])
def test_a_full_disk_is_named_with_what_is_safe(tmp_path, write):
    make_encoder(tmp_path / "encoder")
    (tmp_path / "old").mkdir()
    write(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir() if path.stat().st_size}
    for folder in ("old", "new"):
        safe = "the replies before are kept" if write is write_replies else "what was there before is as it was"
        message = rf"{folder}.* cannot be written \(File too large\): {safe}; make room"
        with pytest.raises(OSError, match=message) as error, full():
            write(tmp_path / folder)
        assert error.value.errno == errno.EFBIG
        left = {path.name for path in (tmp_path / folder).rglob("*") if path.stat().st_size and path.is_file()}
        assert left <= {*before} if folder == "old" else left <= {"replies.jsonl"}
    assert {name: (tmp_path / "old" / name).read_bytes()[: len(bytes_)] for name, bytes_ in before.items()} == before
    if write is write_replies:
        assert Replies(tmp_path / "new").spent.calls > 3  # whole lines are read, the broken one is none


def test_where_nothing_can_be_written_a_lock_is_not_needed(tmp_path, read_only):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").touch()
    (tmp_path / "cache" / "model").mkdir()
    folder, entered = read_only(tmp_path / "cache"), 0
    for lock in (folder / ".lock", folder / "model" / ".lock"):  # one is there, the other is not
        with locked(lock):
            entered += 1
            with pytest.raises(PermissionError):
                (lock.parent / "new").touch()
    assert entered == 2


def test_a_stamp_holds_as_long_as_size_time_and_inode_do(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    right = sha256_of(path)
    assert not intact(path)  # of no known hash
    assert intact(path, right) and stamps(tmp_path)["weights"][0] == right
    with monkeypatch.context() as patch:
        patch.setattr("permdistill.files.sha256_of", lambda path: pytest.fail("read again"))
        assert intact(path, right) and intact(path)
    assert not intact(path, "0" * 64)  # another file is asked for
    os.utime(path, ns=(0, 0))
    assert intact(path) and intact(path, right)  # read again, and found right
    found = path.stat()
    path.write_bytes(b"weightz")
    assert not intact(path, right) and not intact(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert intact(path, right)  # changed with care: only who reads it can tell
    assert not intact(path, right, thorough=True)
    path.unlink()
    assert not intact(path, right)


def test_a_seal_tells_whether_anything_has_changed(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(b"weights")
    assert sealed(path)  # never sealed: nothing is known
    seal(path)
    good = path.read_bytes()
    assert sealed(path) and good.startswith(b"weights")
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert sealed(path) == (7 <= place < 15)  # a seal that is none any more says nothing
    path.write_bytes(b"")
    assert sealed(path)


def test_a_checkpoint_with_other_bytes_is_not_gone_on_with(tmp_path):
    """torch.load compares no checksums: it gave other weights, or what lay in memory."""
    checkpoint = Checkpoint(tmp_path, "key")
    checkpoint.save({"model": {"w": torch.arange(100.0)}})
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    place = good.index(torch.arange(90.0, 100.0).numpy().tobytes())
    assert torch.equal(checkpoint.load()["model"]["w"], torch.arange(100.0))
    path.write_bytes(good[:place] + b"\x01" + good[place + 1 :])
    with pytest.warns(UserWarning, match="checkpoint.pt is damaged .other bytes than were saved"):
        assert checkpoint.load() is None


def test_one_file_found_right_does_not_vouch_for_its_neighbour(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    stamp(tmp_path)
    (tmp_path / "b").write_text("changed")
    os.utime(tmp_path / "a", ns=(0, 0))
    assert intact(tmp_path / "a") and not intact(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"a": []}', '{"a": null}', '{"a": 5}', '{"a": [[], 1]}'])
def test_stamps_that_are_none_count_for_nothing(tmp_path, text):
    (tmp_path / "a").write_text("a")
    (tmp_path / STAMPS).write_text(text)
    assert not intact(tmp_path / "a") and intact(tmp_path / "a", sha256_of(tmp_path / "a"))


def test_a_read_only_folder_is_read_each_time(tmp_path, read_only):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights").write_bytes(b"weights")
    right = sha256_of(tmp_path / "cache" / "weights")
    folder = read_only(tmp_path / "cache")
    for _ in range(2):
        assert intact(folder / "weights", right)
    assert not (folder / STAMPS).exists()


def test_nothing_is_loaded_that_may_bring_code_of_its_own():
    """Each call of from_pretrained and from_config says so, or takes its arguments from Source.arguments, which does."""
    functions = [
        function
        for path in sorted(Path(files.__file__).parent.rglob("*.py"))
        if re.search(r"\.from_(pretrained|config)\(", text := path.read_text(encoding="utf-8"))
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
    ]
    found = 0
    for function in functions:
        text = ast.unparse(function)
        told = ".arguments" in text or "'trust_remote_code': False" in text
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", "") not in ("from_pretrained", "from_config"):
                continue
            if ast.unparse(call.func) == "Student.from_pretrained":
                continue
            given = {word.arg or f"**{ast.unparse(word.value)}": ast.unparse(word.value) for word in call.keywords}
            assert given.get("trust_remote_code") == "False" or (told and {"**at", "**settings"} & {*given}), ast.unparse(
                call
            )
            found += 1
    assert found >= 12 and Source(lambda: "x", "y").arguments["trust_remote_code"] is False


def test_code_that_lies_in_a_models_folder_is_never_run(tmp_path):
    """Also when somebody (a script, a pipe of `yes`) would say that it may be."""
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    config = {"model_type": "evil", "auto_map": {n: "evil.Evil" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "yes").write_text("y\n" * 9)

    def load() -> None:
        for number, file in enumerate((open(tmp_path / "yes"), open(tmp_path / "said", "a"), open(tmp_path / "err", "a"))):
            os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
        for load in (load_teacher, lambda f: build(StudentConfig(f, "joint", "plain", 2), 0)):
            try:
                load(str(tmp_path))
            except (ValueError, OSError) as error:
                print(type(error).__name__, flush=True)

    with forked(load) as process:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    said = (tmp_path / "said").read_text()
    assert status == 0 and len(said.split()) == 2, (tmp_path / "err").read_text()
    assert "[y/N]" not in said + (tmp_path / "err").read_text() and not (tmp_path / "ran").exists()
